"""LoRA as PEFT has it, and back: ``lora_A`` ``[r, in]`` and ``lora_B`` ``[out, r]`` at each layer.

At an embedding they are turned round, at a convolution they are kernels, and for the weights of
experts they are those of all experts in one. DoRA's magnitude is all of it there and a difference
from the host's here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.lora import LoRA
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import (
    CONVOLUTIONS,
    LINEAR,
    WEIGHTED,
    keeps_inputs_first,
    stored,
    weight_matrix,
)
from modgraft.core.parts import Part
from modgraft.core.precision import wide
from modgraft.core.sites import Site
from modgraft.store.formats._peft_folder import (
    PREFIX,
    Folder,
    Group,
    LoraOptions,
    Piece,
    Written,
    by_pattern,
)

_A, _B, _A_EMBEDDING = ".lora_A.weight", ".lora_B.weight", ".lora_embedding_A"


# -- reading ---------------------------------------------------------------------------------------


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
    ranks = {s: r for s, r in reader.ranks.items() if r != said.r}
    alphas = {s: a for s, a in reader.alphas.items() if a != said.lora_alpha}
    method = LoRA(
        rank=said.r, alpha=said.lora_alpha, dropout=said.lora_dropout, rslora=said.use_rslora,
        dora=said.use_dora, bias=said.lora_bias, rank_pattern=ranks or None,
        alpha_pattern=alphas or None,
    )  # fmt: skip
    return Group(method, list(reader.ranks), reader.pieces)


class _Reader:
    def __init__(self, folder: Folder, said: LoraOptions, host: Mapping[str, str]) -> None:
        self.folder, self.said, self.host = folder, said, host
        self.ranks: dict[str, int] = {}
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

    def _site(self, label: str, rank: int, path: str) -> None:
        """Take down a site, which PEFT's patterns know by a path."""
        said = self.said
        asked = by_pattern(said.rank_pattern or {}, path) or said.r
        if rank != asked:
            self.folder.refuse(f"{path} has tensors of rank {rank}, and its options say {asked}")
        alpha = by_pattern(said.alpha_pattern or {}, path)
        self.ranks[label], self.alphas[label] = rank, said.lora_alpha if alpha is None else alpha

    def _piece(self, label: str, name: str, shape: Sequence[int], make: Any) -> None:
        self.pieces.append(Piece(f"{label}:{name}", tuple(shape), make))

    def layer(self, path: str) -> None:
        """Read what is at a layer of one weight."""
        layer, folder = self.folder.modules[path], self.folder
        if not isinstance(layer, WEIGHTED):
            folder.refuse(
                f"{path} is a {type(layer).__name__}, which PEFT changes in a way of its own; LoRA "
                f"is read at linear layers, embeddings, convolutions and target_parameters"
            )
        label, start = folder.label(path), PREFIX + path
        if isinstance(layer, nn.Embedding):
            entries, width = layer.weight.shape
            rank = folder.take(start + _A_EMBEDDING, None, entries).shape[0]
            folder.take(f"{start}.lora_embedding_B", width, rank)
            a, b = f"{start}.lora_embedding_B", start + _A_EMBEDDING
            self._piece(label, "A", (rank, width), lambda: folder.tensor(a).T)
            self._piece(label, "B", (entries, rank), lambda: folder.tensor(b).T)
            self._site(label, rank, path)
        elif isinstance(layer, CONVOLUTIONS):
            self._convolution(path, label, layer)
        else:
            rows, columns = weight_matrix(layer).shape
            rank = folder.take(start + _A, None, columns).shape[0]
            folder.take(start + _B, rows, rank)
            self._piece(label, "A", (rank, columns), lambda: folder.tensor(start + _A))
            self._piece(label, "B", (rows, rank), lambda: folder.tensor(start + _B))
            self._site(label, rank, path)
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

        self._piece(label, "A", (rank, columns), a)
        self._piece(label, "B", (rows, rank), b)
        self._site(label, rank, path)

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
            stack, rows, columns, turned = _lies(layer, name)
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
            self._piece(label, "A", (*front, rank, into), a)
            self._piece(label, "B", (*front, out, rank), b)
            self._site(label, rank, f"{path}.{name}")


def _lies(layer: nn.Module, name: str) -> tuple[int, int, int, bool]:
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


# -- writing ---------------------------------------------------------------------------------------


@torch.no_grad()
def write(name: str, method: LoRA, sites: Sequence[tuple[Site, LoRA]]) -> Written:
    """Return a LoRA as PEFT has it.

    The parts of a fused layer become the whole of it: A is all of theirs, and the rows of B that
    belong to no part are zero.

    Raises:
        ModgraftError: for what PEFT has no place for.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    layers, parameters = [], []
    for (path, parameter), some in _by_layer(sites).items():
        layer = some[0][0].module
        if parameter is None:
            whole = _Whole(layer, [(site.part, place) for site, place in some], method)
            key = path
            tensors |= {f"{path}.{k}": t for k, t in whole.tensors(path).items()}
            layers.append(path)
        else:
            whole = _Whole(layer, [(None, some[0][1])], method)
            key = f"{path}.{parameter}"
            parameters.append(key)
            _check_parameter(name, method, some[0][0])
        ranks[key], alphas[key] = whole.rank, whole.alpha
    for path in dict.fromkeys(key.rpartition(".")[0] for key in parameters):
        tensors |= _experts(path, [(s, p) for s, p in sites if s.path == path and s.parameter])
    rank = _usual(ranks, method.rank)
    alpha = _usual(alphas, method.rank if method.alpha is None else method.alpha)
    bias = method.bias
    if bias and method.dora:
        raise ModgraftError(f"{name!r}: PEFT has no DoRA that changes the bias (LoRA(bias=True))")
    said = {
        "r": rank, "lora_alpha": _whole_number(alpha), "lora_dropout": method.dropout,
        "use_rslora": method.rslora, "use_dora": method.dora, "lora_bias": bias,
        "rank_pattern": {exact(k): r for k, r in ranks.items() if r != rank},
        "alpha_pattern": {exact(k): _whole_number(a) for k, a in alphas.items() if a != alpha},
        "target_parameters": parameters or None, "init_lora_weights": True, "bias": "none",
    }  # fmt: skip
    return Written(tensors, said, layers)


def _usual(values: Mapping[str, Any], said: float) -> Any:
    """Return what the method says, if some site has it, and else what most sites have."""
    have = list(values.values())
    return said if said in have else Counter(have).most_common(1)[0][0]


def exact(path: str) -> str:
    """Return a pattern of PEFT that matches a path and nothing else."""
    return "^" + re.escape(path).replace("\\_", "_")


def _whole_number(value: float) -> float:
    return int(value) if value == int(value) else value


def _by_layer(
    sites: Sequence[tuple[Site, LoRA]],
) -> dict[tuple[str, str | None], list[tuple[Site, LoRA]]]:
    found: dict[tuple[str, str | None], list[tuple[Site, LoRA]]] = {}
    for site, place in sites:
        found.setdefault((site.path, site.parameter), []).append((site, place))
    return found


def _check_parameter(name: str, method: LoRA, site: Site) -> None:
    if isinstance(site.module, nn.MultiheadAttention | nn.RNNBase) or site.part is not None:
        raise ModgraftError(
            f"{name!r} changes {site.label}: PEFT has no place for one weight of a "
            f"{type(site.module).__name__}, or a part of a parameter"
        )
    if method.dora or method.bias:
        raise ModgraftError(
            f"{name!r} changes {site.label}: PEFT has no DoRA and no bias at a parameter"
        )


class _Whole:
    """The parts of one layer as one LoRA."""

    def __init__(
        self, layer: nn.Module, parts: Sequence[tuple[Part | None, LoRA]], method: LoRA
    ) -> None:
        self.layer, self.method, self.parts = layer, method, parts
        first = parts[0][1]
        self.rank = sum(place.A.shape[-2] for _, place in parts)
        self.groups = getattr(layer, "groups", 1)
        self.scale = first.scale
        if len(parts) == 1:
            own, alpha = first._here
            self.alpha: float = own if alpha is None else alpha
        else:
            self.alpha = self.scale * self._root(self.rank)
        self.split = self.groups > 1 and self._is_split()
        if self.groups > 1 and not self.split:
            self.alpha *= self._root(self.groups)
            self.rank *= self.groups

    def _root(self, n: int) -> float:
        return math.sqrt(n) if self.method.rslora else n

    def _is_split(self) -> bool:
        """Return whether each group of a convolution has rows of A to itself."""
        B, groups = self.parts[0][1].B, self.groups
        if self.rank % groups:
            return False
        blocks = B.unflatten(0, (groups, -1)).unflatten(-1, (groups, -1))  # [g, out/g, g, r/g]
        own = torch.stack([blocks[g, :, g] for g in range(groups)])
        return int(blocks.count_nonzero()) == int(own.count_nonzero()) > 0

    def tensors(self, path: str) -> dict[str, Tensor]:
        """Return what PEFT has at the layer."""
        A = torch.cat([place.A for _, place in self.parts])
        B = torch.cat([self._padded(p, part, self._own(p) * p.B) for part, p in self.parts], -1)
        layer, method = self.layer, self.method
        if isinstance(layer, nn.Embedding):
            found = {"lora_embedding_A": B.T, "lora_embedding_B": A.T}
        elif isinstance(layer, CONVOLUTIONS):
            found = self._kernels(path, A, B)
        elif isinstance(layer, LINEAR):
            found = {"lora_A.weight": A, "lora_B.weight": B}
        else:
            raise ModgraftError(f"PEFT's LoRA has no place for a {type(layer).__name__} ({path})")
        if method.dora:
            change = sum(
                part.padded(p.magnitude, -1) if part else p.magnitude for part, p in self.parts
            )
            m = norms(layer, weight_matrix(layer)) + change
            if isinstance(layer, CONVOLUTIONS):
                m = m.view(1, -1, *[1] * (layer.weight.dim() - 2))
            found["lora_magnitude_vector"] = m
        if method.bias:
            b = sum(part.padded(p.b, -1) if part else p.b for part, p in self.parts)
            if not self.scale:
                raise ModgraftError(f"at {path} α is 0, and PEFT scales the bias by it")
            found["lora_B.bias"] = b / self.scale  # type: ignore[operator]
        return found

    def _own(self, place: LoRA) -> float:
        return 1.0 if place.scale == self.scale else place.scale / self.scale

    def _padded(self, place: LoRA, part: Part | None, B: Tensor) -> Tensor:
        return B if part is None else part.padded(B, -2)

    def _kernels(self, path: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        layer: Any = self.layer
        if why := not_as_peft(layer):
            raise ModgraftError(f"LoRA at {path}: {why}")
        groups = self.groups
        _, each, *kernel = layer.weight.shape
        A = A.view(-1, each, *kernel)
        if groups > 1:
            if self.method.dora:
                raise ModgraftError(f"DoRA at {path}: PEFT has none at a convolution of groups")
            rows = A.chunk(groups) if self.split else [A] * groups
            whole = A.new_zeros(groups, len(rows[0]), groups, each, *kernel)
            for g, own in enumerate(rows):
                whole[g, :, g] = own
            A = whole.flatten(2, 3).flatten(0, 1)
            if self.split:
                blocks = B.unflatten(0, (groups, -1)).unflatten(-1, (groups, -1))
                B = torch.cat([blocks[g, :, g] for g in range(groups)])
        return {"lora_A.weight": A, "lora_B.weight": B.view(*B.shape, *[1] * len(kernel))}


def _experts(path: str, sites: Sequence[tuple[Site, LoRA]]) -> dict[str, Tensor]:
    """Return what PEFT has at the parameters of one layer: the last is the outermost."""
    layer = sites[0][0].module
    order = [n for n in layer._parameters if n in {site.parameter for site, _ in sites}]
    found: dict[str, Tensor] = {}
    for site, place in sites:
        name = site.parameter or ""
        _, _, _, turned = _lies(layer, name)
        A, B = (t if t.dim() == 3 else t[None] for t in (place.A, place.B))
        left, right = (A.mT, B.mT) if keeps_inputs_first(layer, name) else (B, A)
        A, B = (left.mT, right.mT) if turned else (right, left)
        depth = len(order) - 1 - order.index(name)
        start = f"{path}{'.base_layer' * depth}"
        found[start + _A] = A.flatten(0, 1)
        found[start + _B] = B.permute(1, 2, 0).flatten(1)  # [E, out, r] → [out, r · E]
    return found
