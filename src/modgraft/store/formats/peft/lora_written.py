"""A LoRA of ours as PEFT has it; :mod:`modgraft.store.formats.peft.lora` reads one."""

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
from modgraft.core.layers import CONVOLUTIONS, LINEAR, keeps_inputs_first, weight_matrix
from modgraft.core.parts import Part
from modgraft.core.sites import Site
from modgraft.store.formats.peft.folder import Written
from modgraft.store.formats.peft.lora import lies, norms, not_as_peft


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
            self.alpha: float = first._rank if first._alpha is None else first._alpha
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
        _, _, _, turned = lies(layer, name)
        A, B = (t if t.dim() == 3 else t[None] for t in (place.A, place.B))
        left, right = (A.mT, B.mT) if keeps_inputs_first(layer, name) else (B, A)
        A, B = (left.mT, right.mT) if turned else (right, left)
        depth = len(order) - 1 - order.index(name)
        start = f"{path}{'.base_layer' * depth}"
        found[start + ".lora_A.weight"] = A.flatten(0, 1)
        found[start + ".lora_B.weight"] = B.permute(1, 2, 0).flatten(
            1
        )  # [E, out, r] → [out, r · E]
    return found
