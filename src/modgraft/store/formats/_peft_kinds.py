"""IA³, VeRA, OFT, trainable tokens, prompts and prefixes as PEFT has them, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modgraft.computation.oft import OFT
from modgraft.computation.prefix import Prefix, key_value_shape
from modgraft.computation.prompts import SoftPrompt
from modgraft.computation.rescale import Rescale
from modgraft.computation.trainable_tokens import TrainableTokens
from modgraft.computation.vera import VeRA, projections
from modgraft.core.embeddings import reading_of
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import LINEAR, stored, weight_matrix
from modgraft.core.sites import Site, find
from modgraft.store.formats._peft_folder import (
    PREFIX,
    Folder,
    Group,
    IA3Options,
    OFTOptions,
    Piece,
    PrefixOptions,
    PromptOptions,
    TokensOptions,
    VeraOptions,
    Written,
    ends_in,
)

_MAPS = (nn.Conv2d, nn.Conv3d)

# -- IA³ -------------------------------------------------------------------------------------------


def read_ia3(folder: Folder, said: IA3Options) -> list[Group]:
    """Return an IA³: what scales outputs, and what scales inputs."""
    paths, end = folder.sites(".ia3_l"), ".ia3_l"
    found: dict[Literal["output", "input"], tuple[list[str], list[Piece]]]
    found = {"output": ([], []), "input": ([], [])}
    for path in paths:
        layer, key = folder.modules[path], PREFIX + path + end
        if not isinstance(layer, (*LINEAR, *_MAPS)):
            folder.refuse(f"IA³ at {path}, a {type(layer).__name__}: PEFT has none there")
        inner = ends_in(said.feedforward_modules or [], path)
        if inner is None:
            folder.refuse(
                f"feedforward_modules={said.feedforward_modules!r:.80} is a pattern that is not "
                f"run, since it may take long; write a list of names in its place"
            )
        if isinstance(layer, _MAPS):
            size = layer.in_channels if inner else layer.out_channels
            folder.take(key, 1, size, *[1] * (layer.weight.dim() - 2))
        else:
            rows, columns = weight_matrix(layer).shape
            size = columns if inner else rows
            folder.take(key, *((1, size) if inner else (size, 1)))
        sites, pieces = found["input" if inner else "output"]
        label = folder.label(path)
        sites.append(label)
        pieces.append(Piece(f"{label}:phi", (size,), lambda key=key: folder.tensor(key).flatten()))
    folder.check_targets(said, paths)
    return [
        Group(Rescale(where=where), *of, suffix="_input" if where == "input" else "")
        for where, of in found.items()
        if of[0]
    ]


@torch.no_grad()
def write_ia3(name: str, sites: Sequence[tuple[Site, Rescale]]) -> Written:
    """Return scales as an IA³; the other parts of a fused layer are scaled by 1."""
    tensors: dict[str, Tensor] = {}
    inner: dict[str, bool] = {}
    for site, place in sites:
        layer, path, is_inner = site.module, site.path, place.where == "input"
        if not isinstance(layer, (*LINEAR, *_MAPS)) or site.parameter is not None:
            raise ModgraftError(
                f"{name!r} is at {site.label}, and PEFT has no IA³ at a {type(layer).__name__}"
            )
        if is_inner and site.part is not None:
            raise ModgraftError(
                f"{name!r} scales the input of a part, {site.label}; PEFT's IA³ scales that of all "
                f"of the layer"
            )
        if inner.setdefault(path, is_inner) != is_inner or (path in tensors and not site.part):
            raise ModgraftError(f"PEFT's IA³ scales {path} once, and there are two scales of it")
        whole = site.part.padded(place.phi - 1, -1) + 1 if site.part else place.phi
        tensors[path] = tensors[path] * whole if path in tensors else whole
    shaped = {
        f"{path}.ia3_l": phi.view(1, -1, *[1] * (layer.weight.dim() - 2))
        if isinstance(layer := _layer(sites, path), _MAPS)
        else phi.view(1, -1)
        if inner[path]
        else phi.view(-1, 1)
        for path, phi in tensors.items()
    }
    return Written(shaped, {"feedforward_modules": [p for p in tensors if inner[p]]}, list(tensors))


def aim_inner(paths: Sequence[str], said: dict[str, Any]) -> None:
    """Write ``feedforward_modules`` in the way of ``target_modules``, of which it is a part."""
    inner = said["feedforward_modules"]
    if isinstance(said["target_modules"], str):
        said["feedforward_modules"] = "|".join(re.escape(path) for path in inner)
        return
    short = sorted({path.rpartition(".")[2] for path in inner})
    means = [path for path in paths if ends_in(short, path)]
    if said["target_modules"] == sorted({path.rpartition(".")[2] for path in paths}):
        if sorted(means) == sorted(inner):
            said["feedforward_modules"] = short
        else:
            said["target_modules"] = list(paths)


def _layer(sites: Sequence[tuple[Site, Any]], path: str) -> Any:
    return next(site.module for site, _ in sites if site.path == path)


# -- VeRA ------------------------------------------------------------------------------------------


def read_vera(folder: Folder, said: VeraOptions) -> Group:
    """Return a VeRA; A and B are drawn as PEFT draws them where they were not saved."""
    method = VeRA(said.r, said.d_initial, said.vera_dropout, said.projection_prng_key)
    paths, pieces, rows, columns = folder.sites(".vera_lambda_b"), [], 0, 0
    for path in paths:
        layer, label = folder.modules[path], folder.label(path)
        if not isinstance(layer, LINEAR):
            folder.refuse(f"VeRA at {path}, a {type(layer).__name__}: PEFT has none there")
        out, into = weight_matrix(layer).shape
        rows, columns = max(rows, out), max(columns, into)
        for ours, end, size in (("b", "vera_lambda_b", out), ("d", "vera_lambda_d", said.r)):
            key = f"{PREFIX}{path}.{end}"
            folder.take(key, size)
            pieces.append(Piece(f"{label}:{ours}", (size,), lambda key=key: folder.tensor(key)))
    sizes = {"A": (said.r, columns), "B": (rows, said.r)}
    for ours, size in sizes.items() if paths else ():
        key = f"base_model.vera_{ours}"
        if said.save_projection:
            folder.take(key, *size)

        def make(ours: str = ours, key: str = key) -> Tensor:
            if said.save_projection:
                return folder.tensor(key)
            return projections(said.r, rows, columns, said.projection_prng_key)[ours]

        pieces.append(Piece(f"{folder.label(paths[0])}:{ours}", size, make))
    folder.check_targets(said, paths)
    return Group(method, [folder.label(path) for path in paths], pieces)


def write_vera(name: str, method: VeRA, sites: Sequence[tuple[Site, VeRA]]) -> Written:
    """Return a VeRA as PEFT has it, with A and B."""
    for site, _ in sites:
        _check_whole(name, "VeRA", site, LINEAR)
    tensors: dict[str, Tensor] = {
        f"{site.path}.vera_lambda_{ours}": tensor
        for site, place in sites
        for ours, tensor in (("b", place.b), ("d", place.d))
    }
    first = sites[0][1]
    said = {
        "r": method.rank, "d_initial": method.initial, "vera_dropout": method.dropout,
        "projection_prng_key": method.seed, "save_projection": True, "bias": "none",
    }  # fmt: skip
    shared = {f"vera_{ours}": first.get_buffer(ours) for ours in ("A", "B")}
    return Written(tensors, said, [site.path for site, _ in sites], shared)


# -- OFT -------------------------------------------------------------------------------------------


def read_oft(folder: Folder, said: OFTOptions) -> Group:
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


def write_oft(name: str, method: OFT, sites: Sequence[tuple[Site, OFT]]) -> Written:
    """Return an OFT as PEFT has it."""
    for site, _ in sites:
        _check_whole(name, "OFT", site, (nn.Linear, nn.Embedding))
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


# -- trainable tokens ------------------------------------------------------------------------------


def read_tokens(folder: Folder, said: TokensOptions) -> list[Group]:
    """Return trainable tokens."""
    end = ".trainable_tokens_delta"
    return _tokens(folder, dict.fromkeys(folder.sites(end), said.token_indices), end)


def read_tokens_beside(folder: Folder, indices: list[int] | dict[str, list[int]]) -> list[Group]:
    """Return the trainable tokens of a LoRA."""
    end = ".token_adapter.trainable_tokens_delta"
    by_path: dict[str, list[int]] = {}
    for path in folder.sites(end):
        by_name = [ids for name, ids in _items(indices) if path.endswith(name)]
        if not by_name:
            folder.refuse(f"trainable_token_indices says nothing of {path}, which has some")
        by_path[path] = by_name[0]
    if not by_path:
        folder.refuse("trainable_token_indices is set, and the file has no rows of tokens")
    return _tokens(folder, by_path, end)


def _items(indices: list[int] | dict[str, list[int]]) -> Iterator[tuple[str, list[int]]]:
    return iter(indices.items() if isinstance(indices, dict) else [("", indices)])


def _tokens(folder: Folder, by_path: Mapping[str, list[int]], end: str) -> list[Group]:
    """Return a group for each choice of tokens; tied tables hold one set of rows."""
    firsts: dict[int, str] = {}
    groups: dict[tuple[int, ...], tuple[list[str], list[Piece]]] = {}
    for path, ids in by_path.items():
        layer, key = folder.modules[path], f"{PREFIX}{path}{end}"
        if not isinstance(layer, nn.Embedding | nn.Linear):
            folder.refuse(f"trainable tokens at {path}, a {type(layer).__name__}")
        width = layer.weight.shape[1]
        folder.take(key, len(ids), width)
        first = firsts.setdefault(id(stored(layer, None)), key)
        sites, pieces = groups.setdefault(tuple(ids), ([], []))
        if folder.label(path) not in sites:
            sites.append(folder.label(path))
        if first == key:
            name = f"{folder.label(path)}:rows"
            pieces.append(
                Piece(name, (len(ids), width), lambda key=key, own=path: _rows(folder, key, end))
            )
    for sites, _ in groups.values():
        sites += [label for label in _tied(folder.model, sites) if label not in sites]
    order = list(folder.modules).index
    return [
        Group(TrainableTokens(ids=ids), sorted(sites, key=order), pieces, suffix="_tokens")
        for ids, (sites, pieces) in groups.items()
    ]


def _tied(model: nn.Module, sites: Sequence[str]) -> list[str]:
    """Return the other layers that PEFT changes with the input's embedding, as tied to it."""
    table, config = asked(model, "get_input_embeddings"), getattr(model, "config", None)
    modules = dict(model.named_modules())
    if not getattr(config, "tie_word_embeddings", False) or table is None:
        return []
    if not any(modules[site] is table for site in sites):
        return []
    kinds = (nn.Embedding, nn.Linear)
    own = stored(table, None)
    return [p for p, m in modules.items() if isinstance(m, kinds) and stored(m, None) is own]


def asked(model: nn.Module, name: str) -> nn.Module | None:
    """Ask a transformers model for one of its layers, None where it has none."""
    ask: Callable[[], Any] | None = getattr(model, name, None)
    try:
        return None if ask is None else ask()
    except NotImplementedError:
        return None


def _rows(folder: Folder, key: str, end: str) -> Tensor:
    """Return rows, which all tables of one weight must have alike."""
    found = folder.tensor(key)
    own = stored(folder.modules[key.removeprefix(PREFIX).removesuffix(end)], None)
    for path, module in folder.modules.items():
        other = f"{PREFIX}{path}{end}"
        again = other in folder.file.entries and stored(module, None) is own
        if again and not torch.equal(folder.tensor(other), found):
            folder.refuse(f"{key} and {other} are rows of one weight here, and differ")
    return found


def write_tokens(
    name: str,
    method: TrainableTokens,
    sites: Sequence[tuple[Site, TrainableTokens]],
    model: nn.Module,
    beside: bool,
) -> Written:
    """Return trainable tokens as PEFT has them, alone or beside a LoRA."""
    for site, _ in sites:
        _check_whole(name, "trainable tokens", site, (nn.Embedding, nn.Linear))
    own = [(site, place) for site, place in sites if "rows" in place._parameters]
    here = {site.path for site, _ in sites}
    there = {site.path for site, _ in own} | set(_tied(model, [site.path for site, _ in own]))
    if here != there:
        raise ModgraftError(
            f"{name!r} is at {', '.join(sorted(here))}, and PEFT would change "
            f"{', '.join(sorted(there))}, with what is tied to the embedding of the input; implant "
            f"it there"
        )
    kept = own if beside else sites
    end = f"{'.token_adapter' if beside else ''}.trainable_tokens_delta"
    tensors: dict[str, Tensor] = {f"{site.path}{end}": place.rows for site, place in kept}
    paths, ids = [site.path for site, _ in own], list(method.ids)
    if beside:
        return Written(tensors, {"trainable_token_indices": dict.fromkeys(paths, ids)}, [])
    return Written(tensors, {"token_indices": ids}, paths)


# -- prompts ---------------------------------------------------------------------------------------


def read_prompt(folder: Folder, said: PromptOptions) -> Group:
    """Return a soft prompt."""
    length, twice = said.num_virtual_tokens, said.num_transformer_submodules == 2
    if said.num_transformer_submodules not in (None, 1, 2) or (
        twice and said.task_type != "SEQ_2_SEQ_LM"
    ):
        folder.refuse(
            f"num_transformer_submodules={said.num_transformer_submodules} with "
            f"task_type={said.task_type!r} is not understood"
        )
    method = SoftPrompt(length=length, at_start=True)
    width = reading_of(folder.model).width
    key = "prompt_embeddings"
    folder.take(key, length * (1 + twice), width)  # PEFT puts the first half before the encoder
    piece = Piece(":phi", (length, width), lambda: folder.tensor(key)[:length])
    return Group(method, [""], [piece])


def write_prompt(name: str, method: SoftPrompt, model: nn.Module, place: SoftPrompt) -> Written:
    """Return a soft prompt as PEFT has it."""
    reading = reading_of(model)
    if not method.at_start and method.after(reading.first):
        raise ModgraftError(
            f"{name!r} stands after the class token, and PEFT puts a prompt before it; PEFT has "
            f"the place of SoftPrompt(length={method.length}, at_start=True)"
        )
    if reading.inside:
        raise ModgraftError(f"{name!r} stands among image patches, where PEFT has no prompt")
    said = {
        "num_virtual_tokens": method.length, "token_dim": reading.width,
        "num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM",
    }  # fmt: skip
    return Written({"prompt_embeddings": place.phi}, said, [])


def read_prefix(folder: Folder, said: PrefixOptions) -> Group:
    """Return a prefix: [k, 2·L·d], the keys and the values of each layer in turn."""
    if said.num_transformer_submodules not in (None, 1):
        folder.refuse(
            f"a prefix of an encoder-decoder (num_transformer_submodules="
            f"{said.num_transformer_submodules}) is a cache whose relative positions are counted, "
            f"which is not computed here"
        )
    length, heads, layers = said.num_virtual_tokens, said.num_attention_heads, said.num_layers
    sites = find(folder.model, "self_attention")
    if len(sites) != layers or heads < 1:
        folder.refuse(f"it has keys of {layers} layers, and this host attends in {len(sites)}")
    for i, site in enumerate(sites):
        here = key_value_shape("Prefix", site)
        width = said.token_dim // heads
        if here != (heads, width, width) or getattr(site.module, "layer_idx", i) != i:
            folder.refuse(
                f"{site.label} attends with keys of {here[0]} heads of {here[1]} features, and it "
                f"has {heads} of {width}"
            )
    key = "prompt_embeddings"
    folder.take(key, length, 2 * layers * said.token_dim)
    shape = (length, heads, said.token_dim // heads)
    pieces = [
        Piece(
            f"{site.label}:{ours}", shape,
            lambda n=2 * i + j: folder.tensor(key).view(length, 2 * layers, *shape[1:])[:, n],
        )
        for i, site in enumerate(sites)
        for j, ours in enumerate(("keys", "values"))
    ]  # fmt: skip
    method = Prefix(length=length, counted=True)
    return Group(method, [site.label for site in sites], pieces)


def write_prefix(
    name: str, method: Prefix, sites: Sequence[tuple[Site, Prefix]], model: nn.Module
) -> Written:
    """Return a prefix as PEFT has it."""
    length = method.length
    if not method.counted:
        raise ModgraftError(
            f"{name!r} leaves the text its positions, and PEFT counts on after the prefix; it has "
            f"the place of Prefix(length={length}, counted=True)"
        )
    if method.reparametrise is not None:
        raise ModgraftError(
            f"{name!r} comes from an MLP, which PEFT does not save; mg.fold_prefix(host, {name!r}, "
            f"into=…) makes the prefix that it computes"
        )
    every = [site.label for site in find(model, "self_attention")]
    shapes = {(p.heads, p.width, p.value_width) for _, p in sites}
    if [site.label for site, _ in sites] != every or len(shapes) != 1:
        raise ModgraftError(
            f"{name!r} is at {len(sites)} of {len(every)} layers that attend, and PEFT has one "
            f"at all of them, of one shape"
        )
    heads, width, values = shapes.pop()
    if width != values:
        raise ModgraftError(f"{name!r} has keys and values of unequal width, which PEFT has not")
    both: list[Tensor] = [
        t for _, place in sites for t in (place.keys, place.values)
    ]  # 2·L of [k, heads, d]
    said = {
        "num_virtual_tokens": length, "token_dim": heads * width, "num_layers": len(sites),
        "num_attention_heads": heads, "num_transformer_submodules": 1,
        "encoder_hidden_size": None, "prefix_projection": False,
    }  # fmt: skip
    return Written({"prompt_embeddings": torch.stack(both, 1).flatten(1)}, said, [])


def _check_whole(name: str, what: str, site: Site, kinds: tuple[type[nn.Module], ...]) -> None:
    if site.part is not None or site.parameter is not None or not isinstance(site.module, kinds):
        raise ModgraftError(
            f"{name!r} changes {site.label}: PEFT's {what} changes the whole of a "
            f"{' or '.join(k.__name__ for k in kinds)}"
        )
