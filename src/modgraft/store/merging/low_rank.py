"""A change of a weight as the product of two thin factors, and its singular values.

Where Δ = BA has rank r, its singular values are those of the r × r core between the bases of B and
of A: QR of both factors gives the bases, and no matrix [out, in] is made. It is computed in
float64, so that rounding is that of what was stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """Δ = BA.

    Attributes:
        left: B ``[…, out, r]``.
        right: A ``[…, r, in]``.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of Δ."""
        return torch.Size([*self.left.shape[:-1], self.right.shape[-1]])

    @property
    def dtype(self) -> torch.dtype:
        """The type of both factors."""
        return self.left.dtype

    @property
    def rank(self) -> int:
        """r; the rank of Δ is at most that."""
        return self.left.shape[-1]

    def to(self, dtype: torch.dtype) -> LowRank:
        """Return it in another type."""
        return LowRank(self.left.to(dtype), self.right.to(dtype))

    def __getitem__(self, i: int) -> LowRank:
        """Return one matrix of a stack."""
        return LowRank(self.left[i], self.right[i])


Change = Tensor | LowRank
"""A change of a weight: Δ itself, or its factors."""


def dense(change: Change) -> Tensor:
    """Return Δ."""
    return change.left @ change.right if isinstance(change, LowRank) else change


def total(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """Return Σ w·Δ, as factors where all have factors: [w₁B₁, w₂B₂, …] and A₁, A₂, … below it."""
    factors = [each for each in changes if isinstance(each, LowRank)]
    if len(factors) == len(changes):
        scaled = [w * each.left for w, each in zip(weights, factors, strict=True)]
        return LowRank(torch.cat(scaled, -1), torch.cat([each.right for each in factors], -2))
    # a sum, and no stack: that would hold all of them once more
    return sum((w * dense(each) for w, each in zip(weights, changes, strict=True)), torch.zeros(()))


def svd(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """Return U ``[out, k]``, σ ``[k]`` and Vᵀ ``[k, in]`` of a matrix of rank k, in float64.

    Singular values that are rounding errors of the given precision are left out. Of a matrix that
    holds NaN or infinity all is NaN.
    """
    u, sigma, vh = _svd(change)
    least = sigma[:1] * max(change.shape) * torch.finfo(change.dtype).eps
    k = int((~(sigma <= least)).sum())  # what is NaN stays
    return u[:, :k], sigma[:k], vh[:k]


def orthogonal(columns: Tensor) -> Tensor:
    """Return the matrix of orthonormal columns that is nearest to ``columns``, in float64."""
    p, _, qh = _svd(columns)
    return p @ qh


def truncated(change: Change, rank: int) -> tuple[LowRank, Tensor]:
    """Return the nearest change of a rank, in the Frobenius norm, and ‖Δ‖² with what is left out.

    Args:
        change: Δ ``[…, out, in]``.
        rank: r.

    Returns:
        The factors, ``[…, out, r]`` and ``[…, r, in]`` with r at most the smaller side, in the
        precision of ``change``; and ``[‖Δ‖², ‖Δ − BA‖²]`` in float64.
    """
    u, sigma, vh = _svd(change)
    root = sigma[..., :rank].sqrt()  # both factors are as large, as training makes them
    near = LowRank(u[..., :rank] * root[..., None, :], root[..., :, None] * vh[..., :rank, :])
    squares = sigma.square()
    return near.to(change.dtype), torch.stack([squares.sum(), squares[..., rank:].sum()])


def _svd(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    parts = [change.left, change.right] if isinstance(change, LowRank) else [change]
    if not all(part.isfinite().all() for part in parts):  # torch raises, or gives some numbers
        *stack, out, ins = change.shape
        sizes = [*stack, out, min(out, ins)], [*stack, min(out, ins)], [*stack, min(out, ins), ins]
        u, sigma, vh = (parts[0].new_full(size, torch.nan, dtype=torch.float64) for size in sizes)
        return u, sigma, vh
    if not isinstance(change, LowRank):
        return torch.linalg.svd(change.double(), full_matrices=False)
    outer, upper = torch.linalg.qr(change.left.double())  # [out, k], [k, r]
    inner, lower = torch.linalg.qr(change.right.double().mT)  # [in, k], [k, r]
    u, sigma, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return outer @ u, sigma, vh @ inner.mT
