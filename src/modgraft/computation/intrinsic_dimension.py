"""Intrinsic dimension: a change of all weights within a random low-dimensional subspace."""

from __future__ import annotations

import hashlib
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from modgraft.computation._checks import check_at_least_one
from modgraft.computation.base import ParameterComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import weight_matrix
from modgraft.core.sites import Site


@final
class IntrinsicDimension(ParameterComposition):
    """f'(x) = f(x; θ + φM), φ = 0 at the start, M a fixed random map from d to out · in numbers.

    Li et al. 2018 (arXiv:1804.08838), Aghajanyan et al. 2021 (arXiv:2012.13255). M is a Fastfood
    transform (Le et al. 2013, arXiv:1408.3060): φ ``[d]`` is padded to L, the next power of two,
    and each block of L numbers of the weight is H G Π H B φ / √(L · out · in), with H the Hadamard
    matrix, B random signs, Π a permutation, G Gaussian, so that |φM| = |φ| on average. It costs
    n log L for a weight of n numbers, and M is never materialised or saved: B, Π and G, three
    numbers a weight in memory, follow from the seed and the site's label. Each site has a separate
    φ; with ``Shared(IntrinsicDimension(…))`` all sites share one, as in the papers. An embedding's
    weight is ``[entries, width]``.

    Args:
        dim: d, at each site; at most the size of its weight.
        seed: the seed of M.

    Raises:
        ModgraftError: for a dim out of range, or a site without a weight matrix.
    """

    identity: ClassVar[bool] = True

    dim: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least_one("IntrinsicDimension", dim=self.dim)
        if self.seed < 0:
            raise ModgraftError(f"IntrinsicDimension(seed={self.seed}): the seed is at least 0")

    def build(self, site: Site) -> None:
        shape = weight_matrix(site.module, site.part, site.parameter).shape
        if self.dim > shape.numel():
            raise ModgraftError(
                f"IntrinsicDimension(dim={self.dim}) at {site.label}: its weight has "
                f"{shape[0]} × {shape[1]} = {shape.numel()} numbers, so dim is at most that; "
                f"use IntrinsicDimension(dim={shape.numel()})"
            )
        self._shape = shape
        self._width = 1 << (self.dim - 1).bit_length()  # L
        self._scale = (self._width * shape.numel()) ** -0.5
        self.phi = nn.Parameter(torch.zeros(self.dim))
        blocks = -(-shape.numel() // self._width)
        signs, order, gauss = _draw(f"{self.seed} {site.label}", blocks, self._width)
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("gauss", gauss, persistent=False)

    def delta(self, weight: Tensor) -> Tensor:
        padded = nn.functional.pad(self.phi, (0, self._width - self.dim))  # [L]
        mixed = hadamard(self.get_buffer("signs") * padded)  # [blocks, L]
        mixed = mixed.flatten()[self.get_buffer("order")]  # [blocks, L]: Π within each block
        out = hadamard(self.get_buffer("gauss") * mixed).flatten()
        return self._scale * out[: self._shape.numel()].view(self._shape)


def hadamard(x: Tensor) -> Tensor:
    """Return x H for ``x`` ``[…, L]``, L a power of two, in log₂ L steps, without the matrix H."""
    size = 1
    while size < x.shape[-1]:
        a, b = x.unflatten(-1, (-1, 2, size)).unbind(-2)  # […, L / (2·size), size] each
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)  # […, L]
        size *= 2
    return x


def _draw(key: str, blocks: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw B (±1, int8), Π (as flat positions) and G, each ``[blocks, width]``.

    They come from the raw bits of a PCG64, a stream that numpy promises not to change, so that a
    saved φ means the same on every machine. G is rounded to bfloat16, the coarsest floating type,
    so that it is the same number in every type.
    """
    bits = np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
    raw = [bits.random_raw(blocks * width).reshape(blocks, width) for _ in range(3)]
    signs = torch.from_numpy((raw[0] >> np.uint64(63)).astype(np.int8) * 2 - 1)
    order = np.argsort(raw[1], axis=1, kind="stable") + np.arange(blocks)[:, None] * width
    uniform = ((raw[2] >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # in (0, 1)
    gauss = torch.special.ndtri(torch.from_numpy(uniform))
    return signs, torch.from_numpy(order), gauss.to(torch.bfloat16).to(torch.float32)
