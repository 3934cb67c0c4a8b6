"""OFT as PEFT has it, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from modgraft.computation.oft import OFT
from modgraft.core.sites import Site
from modgraft.store.formats.peft.folder import (
    PREFIX,
    Folder,
    Group,
    Piece,
    Written,
    check_whole,
)
from modgraft.store.formats.peft.options import OFTOptions


def read(folder: Folder, said: OFTOptions) -> Group:
    """Return an OFT."""
    if said.use_cayley_neumann and _version(said.peft_version) < (0, 18):
        folder.refuse(
            f"use_cayley_neumann was another series before PEFT 0.18, and it is of "
            f"{said.peft_version or 'an older one'}; train it with a newer PEFT"
        )
    terms = said.num_cayley_neumann_terms if said.use_cayley_neumann else None
    by_count = said.r > 0
    method = OFT(
        block=32 if by_count else said.oft_block_size, blocks=said.r if by_count else None,
        shared=said.block_share, terms=terms,
    )  # fmt: skip
    pieces, labels = [], []
    paths = {
        p: end for end in (".oft_R", ".oft_embedding_R") for p in folder.sites(f"{end}.weight")
    }
    for path, end in sorted(paths.items(), key=lambda item: list(folder.modules).index(item[0])):
        layer, key = folder.modules[path], f"{PREFIX}{path}{end}.weight"
        if not isinstance(layer, nn.Linear | nn.Embedding):
            folder.refuse(
                f"OFT at {path}, a {type(layer).__name__}: PEFT turns what each window of its "
                f"input holds and adds the windows up, which no change of its weight computes"
            )
        width = layer.weight.shape[1]
        size = width // said.r if by_count else said.oft_block_size
        if size < 1 or width % size:
            folder.refuse(
                f"OFT at {path}: its input of {width} features is not made of blocks of {size}, "
                f"and PEFT took another size there; train it with a size that divides all widths"
            )
        shape = (1 if said.block_share else width // size, size * (size - 1) // 2)
        folder.take(key, *shape)
        labels.append(folder.label(path))
        pieces.append(Piece(f"{labels[-1]}:skew", shape, lambda key=key: folder.tensor(key)))
    folder.check_targets(said, list(paths))
    return Group(method, labels, pieces)


def _version(text: str | None) -> tuple[int, ...]:
    numbers = (text or "0").partition("@")[0].split(".")[:2]
    return tuple(int(n) if n.isdecimal() else 0 for n in numbers)


def write(name: str, method: OFT, sites: Sequence[tuple[Site, OFT]]) -> Written:
    """Return an OFT as PEFT has it."""
    for site, _ in sites:
        check_whole(name, "OFT", site, (nn.Linear, nn.Embedding))
    tensors: dict[str, Tensor] = {
        f"{s.path}.oft_{'embedding_' if isinstance(s.module, nn.Embedding) else ''}R.weight": p.skew
        for s, p in sites
    }
    said = {
        "r": method.blocks or 0, "oft_block_size": 0 if method.blocks else method.block,
        "block_share": method.shared, "use_cayley_neumann": method.terms is not None,
        "num_cayley_neumann_terms": method.terms or 5, "bias": "none",
    }  # fmt: skip
    return Written(tensors, said, [site.path for site, _ in sites])
