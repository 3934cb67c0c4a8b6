"""LoRA as PEFT has it, and back: ``lora_A`` ``[r, in]`` and ``lora_B`` ``[out, r]`` at each layer.

At an embedding they are turned round, at a convolution they are kernels, and for the weights of
experts they are those of all experts in one. DoRA's magnitude is all of it there and a difference
from the host's here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.lora import LoRA
from modgraft.core.errors import an, warn
from modgraft.core.layers import (
    CONVOLUTIONS,
    WEIGHTED,
    keeps_inputs_first,
    stored,
    weight_matrix,
)
from modgraft.core.precision import wide
from modgraft.store.formats.peft.folder import PREFIX, Folder, Group, Piece
from modgraft.store.formats.peft.options import LoraOptions
from modgraft.store.formats.peft.targets import by_pattern

Make = Callable[[], Tensor]
_A, _B, _A_EMBEDDING = ".lora_A.weight", ".lora_B.weight", ".lora_embedding_A"


def read(folder: Folder, said: LoraOptions, host: Mapping[str, str]) -> Group:
    """Return the LoRA of a folder.

    Args:
        folder: the folder.
        said: its options.
        host: the keys of the file that are weights of the host, by their names there.
    """
    reader = _Reader(folder, said, host)
    paths = folder.sites(_A) + folder.sites(_A_EMBEDDING)
    layers = [p for p in paths if not reader.parameters(p)]
    for path in sorted(paths, key=list(folder.modules).index):
        if path in layers:
            reader.layer(path)
        else:
            reader.experts(path)
    folder.check_targets(said, layers)
    reader.check_tied(paths)
    _warn_of_patterns(folder, said, [reader.known[s] for s in reader.ranks])
    ranks = {s: r for s, r in reader.ranks.items() if r != said.r}
    alphas = {s: a for s, a in reader.alphas.items() if a != said.lora_alpha}
    method = LoRA(
        rank=said.r, alpha=said.lora_alpha, dropout=said.lora_dropout, rslora=said.use_rslora,
        dora=said.use_dora, bias=said.lora_bias, rank_pattern=ranks or None,
        alpha_pattern=alphas or None,
    )  # fmt: skip
    return Group(method, list(reader.ranks), reader.pieces)


def _warn_of_patterns(folder: Folder, said: LoraOptions, paths: Sequence[str]) -> None:
    for name, patterns in (("rank", said.rank_pattern), ("alpha", said.alpha_pattern)):
        left = [each for each in patterns or {} if not any(by_pattern({each: 1}, p) for p in paths)]
        if left:
            warn(
                f"{folder.path}: {name}_pattern has {left[0]!r:.80}, which matches no layer that "
                f"is changed; it means nothing, in PEFT too",
            )


class _Reader:
    def __init__(self, folder: Folder, said: LoraOptions, host: Mapping[str, str]) -> None:
        self.folder, self.said, self.host = folder, said, host
        self.ranks: dict[str, int] = {}
        self.known: dict[str, str] = {}  # what PEFT's patterns know each site by
        self.alphas: dict[str, float] = {}
        self.pieces: list[Piece] = []

    def parameters(self, path: str) -> list[str]:
        """Return the parameters of a layer that are changed by their names."""
        wanted = self.said.target_parameters or []
        names = [n for n, p in self.folder.modules[path]._parameters.items() if p is not None]
        full = {name: f"{path}.{name}" for name in names}
        return [
            n for n, f in full.items() if f in wanted or any(f.endswith(f".{w}") for w in wanted)
        ]

    def check_tied(self, paths: Sequence[str]) -> None:
        """Refuse a layer whose change PEFT would tie to that of another, as its weight is tied."""
        if not self.said.ensure_weight_tying:
            return
        owners: dict[int, list[str]] = {}
        for path, layer in self.folder.modules.items():
            if isinstance(layer, WEIGHTED):
                owners.setdefault(id(stored(layer, None)), []).append(path)
        for tied in owners.values():
            if len(tied) > 1 and (self.said.trainable_token_indices or set(tied) & set(paths)):
                self.folder.refuse(
                    f"ensure_weight_tying changes {' and '.join(tied)} alike, which is not "
                    f"computed here; merge it in PEFT, or train it without that"
                )

    def _site(self, label: str, rank: int, path: str) -> None:
        """Take down a site, which PEFT's patterns know by a path."""
        said = self.said
        asked = by_pattern(said.rank_pattern or {}, path)
        asked = said.r if asked is None else asked
        if rank != asked:
            self.folder.refuse(f"{path} has tensors of rank {rank}, and its options say {asked}")
        alpha = by_pattern(said.alpha_pattern or {}, path)
        self.known[label] = path
        self.ranks[label], self.alphas[label] = rank, said.lora_alpha if alpha is None else alpha

    def _factors(
        self, label: str, path: str, rank: int, shape: Sequence[int], a: Make, b: Make
    ) -> None:
        """Take down the factors of a change of a ``shape``, [(E,) out, in], at a site.

        A rank above the smaller side, which no LoRA has here, becomes that: BA is one factor then,
        the identity the other, and α is such that s stays.
        """
        self._site(label, rank, path)
        *front, out, into = shape
        least = min(out, into)
        if rank > least:
            scale, first, second = self._scale(label), a, b
            self.ranks[label], self.alphas[label], rank = least, 1.0, least
            self.alphas[label] = scale / self._scale(label)

            def whole() -> Tensor:
                B = wide(second())
                return B @ first().to(B.dtype)

            def identity() -> Tensor:
                return torch.eye(least).expand(*front, least, least)

            a, b = (whole, identity) if out == least else (identity, whole)
        self._piece(label, "A", (*front, rank, into), a)
        self._piece(label, "B", (*front, out, rank), b)

    def _piece(self, label: str, name: str, shape: Sequence[int], make: Any) -> None:
        self.pieces.append(Piece(f"{label}:{name}", tuple(shape), make))

    def layer(self, path: str) -> None:
        """Read what is at a layer of one weight."""
        layer, folder = self.folder.modules[path], self.folder
        if not isinstance(layer, WEIGHTED):
            folder.refuse(
                f"{path} is {an(type(layer).__name__)}, which PEFT changes in a way of its own; "
                f"LoRA is read at linear layers, embeddings, convolutions and target_parameters"
            )
        label, start = folder.label(path), PREFIX + path
        if isinstance(layer, nn.Embedding):
            entries, width = layer.weight.shape
            rank = folder.take(start + _A_EMBEDDING, None, entries).shape[0]
            folder.take(f"{start}.lora_embedding_B", width, rank)
            a, b = f"{start}.lora_embedding_B", start + _A_EMBEDDING
            made = (lambda: folder.tensor(a).T, lambda: folder.tensor(b).T)
            self._factors(label, path, rank, (entries, width), *made)
        elif isinstance(layer, CONVOLUTIONS):
            self._convolution(path, label, layer)
        else:
            rows, columns = weight_matrix(layer).shape
            rank = folder.take(start + _A, None, columns).shape[0]
            folder.take(start + _B, rows, rank)
            made = (lambda: folder.tensor(start + _A), lambda: folder.tensor(start + _B))
            self._factors(label, path, rank, (rows, columns), *made)
        if self.said.use_dora:
            self._magnitude(path, label, layer)
        if self.said.lora_bias:
            scale, rows = self._scale(label), weight_matrix(layer).shape[0]
            folder.take(f"{start}.lora_B.bias", rows)
            self._piece(label, "b", (rows,), lambda: scale * folder.tensor(f"{start}.lora_B.bias"))

    def _scale(self, label: str) -> float:
        rank = self.ranks[label]
        return self.alphas[label] / (math.sqrt(rank) if self.said.use_rslora else rank)

    def _convolution(self, path: str, label: str, layer: Any) -> None:
        folder, start, groups = self.folder, PREFIX + path, layer.groups
        if why := not_as_peft(layer):
            folder.refuse(f"LoRA at {path}: {why}")
        rows, each, *kernel = layer.weight.shape
        rank = folder.take(start + _A, None, each * groups, *kernel).shape[0]
        if rank % groups:
            folder.refuse(f"{path} has {groups} groups, which do not share {rank} rows of lora_A")
        folder.take(start + _B, rows, rank // groups, *[1] * len(kernel))
        columns = each * math.prod(kernel)

        def a() -> Tensor:
            whole = folder.tensor(start + _A)
            grid = whole.unflatten(1, (groups, each)).unflatten(0, (groups, -1))
            own = torch.stack([grid[g, :, g] for g in range(groups)])  # [g, r / g, each, k…]
            if grid.count_nonzero() != own.count_nonzero():
                folder.refuse(
                    f"LoRA at {path}, a convolution of {groups} groups: PEFT's branch reads all "
                    f"channels where each group reads its own, so that no change of the layer's "
                    f"weight computes it; leave out such layers in PEFT"
                )
            return own.flatten(2).flatten(0, 1)  # [r, each · k…]

        def b() -> Tensor:
            own = folder.tensor(start + _B).flatten(1)  # [out, r / g]
            return torch.block_diag(*own.chunk(groups)) if groups > 1 else own

        self._factors(label, path, rank, (rows, columns), a, b)

    def _magnitude(self, path: str, label: str, layer: nn.Module) -> None:
        folder, key = self.folder, f"{PREFIX}{path}.lora_magnitude_vector"
        rows, columns = weight_matrix(layer).shape
        outs = columns if isinstance(layer, nn.Embedding) else rows
        shape = [1, outs, *[1] * (layer.weight.dim() - 2)]  # type: ignore[operator, union-attr]
        folder.take(key, *(shape if isinstance(layer, CONVOLUTIONS) else [outs]))
        if getattr(layer, "groups", 1) > 1:
            folder.refuse(f"DoRA at {path}: PEFT computes none at a convolution of several groups")
        whole = self.host.get(f"{label}.weight")

        def make() -> Tensor:
            matrix = weight_matrix(layer)
            if whole is not None:  # the host's is replaced by one in the file
                matrix = folder.tensor(whole).to(matrix.dtype).reshape(matrix.shape)
            return folder.tensor(key).flatten().to(wide(matrix).dtype) - norms(layer, matrix)

        self._piece(label, "magnitude", (outs,), make)

    def experts(self, path: str) -> None:
        """Read what is at parameters of a layer, the last one outermost."""
        layer, folder = self.folder.modules[path], self.folder
        for depth, name in enumerate(reversed(self.parameters(path))):
            start = f"{PREFIX}{path}{'.base_layer' * depth}"
            single = name == "weight" and isinstance(layer, WEIGHTED)
            label = folder.label(path) if single else f"{folder.label(path)}.{name}"
            stack, rows, columns, turned = lies(layer, name)
            inner, outer = (rows, columns) if turned else (columns, rows)
            total = folder.take(start + _A, None, inner).shape[0]
            if total % stack:
                folder.refuse(f"{start + _A} has {total} rows for {stack} experts")
            rank = total // stack
            folder.take(start + _B, outer, total)

            def factors(start: str = start, stack: int = stack, turned: bool = turned) -> Any:
                A, B = folder.tensor(start + _A), folder.tensor(start + _B)
                A, B = A.unflatten(0, (stack, -1)), B.unflatten(1, (-1, stack)).permute(2, 0, 1)
                return (A.mT, B.mT) if turned else (B, A)  # left, right of what is stored

            first = keeps_inputs_first(layer, None if single else name)
            has_three = layer._parameters[name].dim() == 3  # type: ignore[union-attr]

            def a(factors: Any = factors, first: bool = first, three: bool = has_three) -> Tensor:
                left, right = factors()
                found = left.mT if first else right
                return found if three else found[0]

            def b(factors: Any = factors, first: bool = first, three: bool = has_three) -> Tensor:
                left, right = factors()
                found = right.mT if first else left
                return found if three else found[0]

            out, into = (columns, rows) if first else (rows, columns)
            front = (stack,) if has_three else ()
            self._factors(label, f"{path}.{name}", rank, (*front, out, into), a, b)


def lies(layer: nn.Module, name: str) -> tuple[int, int, int, bool]:
    """Return how many matrices a parameter holds, of what shape, and whether PEFT says that its
    rows are inputs."""
    weight = stored(layer, name)
    stack = weight.shape[0] if weight.dim() == 3 else 1
    turned = weight.dim() == 3 and bool(getattr(layer, "is_transposed", False))
    return stack, weight.shape[-2], weight.shape[-1], turned


def not_as_peft(layer: Any) -> str | None:
    """Say why PEFT's branch at a convolution is not that of a change of its weight."""
    if any(n != 1 for n in layer.dilation):
        return "PEFT's branch leaves out the dilation of the convolution, so its result is another"
    if layer.padding_mode != "zeros":
        return (
            f"PEFT's branch pads with zeros, and this convolution does not "
            f"(padding_mode={layer.padding_mode!r}), so its result is another"
        )
    return None


def norms(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Return the norm of each output's weights, as LoRA's DoRA has them."""
    axis = -2 if isinstance(layer, nn.Embedding) else -1
    return wide(matrix).detach().contiguous().norm(dim=axis)
