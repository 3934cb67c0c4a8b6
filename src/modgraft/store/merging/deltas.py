"""The changes Δ₁ … Δₙ of one tensor, whole or in blocks, and what of them is kept: the largest
numbers, or such as are drawn at random."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modgraft.store.merging.low_rank import Change, dense

Blocks = Callable[[], Iterable[Sequence[Change]]]
"""Gives the blocks of a tensor, each the same part of Δ₁ … Δₙ, as often as it is asked."""


PORTION = 2**12
"""How many numbers are drawn at a time."""


@dataclass(frozen=True)
class Deltas:
    """Δ₁ … Δₙ of one tensor; a loop over it gives its blocks.

    Attributes:
        name: the tensor's; what is drawn at random depends on it.
        parents: what is merged, by name: what is drawn does not depend on the order.
        weights: w₁ … wₙ.
        blocks: gives the blocks.
    """

    name: str
    parents: Sequence[str]
    weights: Sequence[float]
    blocks: Blocks

    def __iter__(self) -> Iterator[Sequence[Change]]:
        return iter(self.blocks())

    def dense(self) -> Iterator[list[Tensor]]:
        """Give the blocks as dense tensors."""
        for deltas in self:
            yield [dense(delta) for delta in deltas]

    def dropped(self, density: float, seed: int) -> Iterator[list[Tensor]]:
        """Give the blocks as m ⊙ Δ: m is drawn, 1 with the chance ``density``, else 0."""
        drawn = [_Drawn(f"{seed}\0{self.name}\0{parent}") for parent in self.parents]
        for deltas in self.dense():
            masks = [each.take(d.numel()) < density for each, d in zip(drawn, deltas, strict=True)]
            yield [d * m.to(d.device).view_as(d) for d, m in zip(deltas, masks, strict=True)]

    def trimmed(self, density: float) -> Iterator[list[Tensor]]:
        """Give the blocks with 0 but for the k numbers of each Δ that are largest in magnitude.

        k = ⌊density · size⌋, and 1 at least; magnitudes are compared in float32, and of equal ones
        the first stay, as many as there is room for.
        """
        if density >= 1:
            yield from self.dense()
            return
        cutoffs, left = self._cutoffs(density)
        for deltas in self.dense():
            kept = []
            for i, delta in enumerate(deltas):
                size = delta.abs().float()
                equal = size == cutoffs[i]
                if (count := int(equal.sum())) > left[i]:
                    equal &= equal.flatten().cumsum(0).view_as(equal) <= left[i]
                left[i] = max(0, left[i] - count)
                kept.append(delta * (equal | (size > cutoffs[i])))
            yield kept

    def _cutoffs(self, density: float) -> tuple[list[float], list[int]]:
        """Return the k-th largest magnitude of each Δ, and how many of the k are that.

        The bits of a magnitude, as a whole number, are in the order of magnitudes: a count of their
        upper halves finds that of the k-th, and then one of the lower halves below it the rest.
        """
        found, left = [0] * len(self.parents), [0] * len(self.parents)
        for shift in (16, 0):
            counts = torch.zeros(len(self.parents), 2**16, dtype=torch.int64)
            for deltas in self.dense():
                for i, delta in enumerate(deltas):
                    bits = delta.abs().float().flatten().view(torch.int32)
                    bits = bits if shift else bits[bits >> 16 == found[i]]
                    counts[i] += torch.bincount((bits >> shift & 0xFFFF).cpu(), minlength=2**16)
            for i, count in enumerate(counts):
                above = count.flip(0).cumsum(0)  # how many are in a half or in a larger one
                k = max(1, int(density * int(above[-1]))) if shift else left[i]
                at = int(torch.searchsorted(above, k))
                left[i] = k - int(above[at - 1]) if at else k
                found[i] = found[i] << 16 | 2**16 - 1 - at
        return torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist(), left

    def products(self) -> Tensor:
        """Return ⟨Δᵢ, Δⱼ⟩ ``[n, n]`` in float64."""
        found = torch.zeros(len(self.parents), len(self.parents), dtype=torch.float64)
        for deltas in self.dense():
            flat = torch.stack([delta.double().flatten() for delta in deltas])
            found += (flat @ flat.T).cpu()
        return found


class _Drawn:
    """Numbers drawn from [0, 1): the same ones, in whatever portions they are taken.

    Args:
        seed: what they depend on, and nothing else.
    """

    def __init__(self, seed: str) -> None:
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1
        self._generator = torch.Generator().manual_seed(number)
        self._left = torch.empty(0)

    def take(self, count: int) -> Tensor:
        """Return the next ``count`` of them."""
        portions = -(-(count - len(self._left)) // PORTION)  # torch draws a few in another way
        more = [torch.rand(PORTION, generator=self._generator) for _ in range(portions)]
        found = torch.cat([self._left, *more])
        self._left = found[count:].clone()
        return found[:count]
