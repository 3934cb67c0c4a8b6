"""A change of a weight as the product of two thin factors, and what is computed of such in full.

Where Δ = BA has rank r, its singular values are those of the r × r core between the bases of B and
of A: QR of both factors gives the bases, and no matrix [out, in] is made. All of it is computed in
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
    def rank(self) -> int:
        """r; the rank of Δ is at most that."""
        return self.left.shape[-1]

    def dense(self) -> Tensor:
        """Return Δ ``[…, out, in]``."""
        return self.left @ self.right


Change = Tensor | LowRank
"""A change of a weight: Δ itself, or its factors."""


def dense(change: Change) -> Tensor:
    """Return Δ."""
    return change.dense() if isinstance(change, LowRank) else change


def total(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """Return Σ w·Δ, as factors where all have factors: [w₁B₁, w₂B₂, …] and A₁, A₂, … below it."""
    factors = [each for each in changes if isinstance(each, LowRank)]
    if len(factors) == len(changes):
        scaled = [w * each.left for w, each in zip(weights, factors, strict=True)]
        return LowRank(torch.cat(scaled, -1), torch.cat([each.right for each in factors], -2))
    # a sum, and no stack: that would hold all of them once more
    return sum((w * dense(each) for w, each in zip(weights, changes, strict=True)), torch.zeros(()))


def svd(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """Return U ``[out, k]``, σ ``[k]`` and Vᵀ ``[k, in]`` of a matrix, in float64.

    k is its rank: singular values that are rounding errors of the given precision are left out.
    """
    if isinstance(change, LowRank):
        precision = change.left.dtype
        outer, upper = torch.linalg.qr(change.left.double())  # [out, k], [k, r]
        inner, lower = torch.linalg.qr(change.right.double().mT)  # [in, k], [k, r]
        u, sigma, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        u, vh = outer @ u, vh @ inner.mT
    else:
        precision = change.dtype
        u, sigma, vh = torch.linalg.svd(change.double(), full_matrices=False)
    if sigma.numel():
        sigma = sigma[sigma > sigma[0] * max(change.shape) * torch.finfo(precision).eps]
    return u[:, : len(sigma)], sigma, vh[: len(sigma)]


def truncated(change: Change, rank: int) -> tuple[LowRank, Tensor]:
    """Return the nearest change of a rank, in the Frobenius norm, and ‖Δ‖² with what is left out.

    A dense Δ is projected on the leading eigenvectors of its Gram matrix of the smaller side, which
    is exact where a randomised decomposition is not, and several times faster than that of Δ.

    Args:
        change: Δ ``[…, out, in]``.
        rank: r.

    Returns:
        The factors, ``[…, out, r]`` and ``[…, r, in]`` with r at most the smaller side, in the
        precision of ``change``; and ``[‖Δ‖², ‖Δ − BA‖²]`` in float64.
    """
    if isinstance(change, LowRank):
        dtype = change.left.dtype
        outer, upper = torch.linalg.qr(change.left.double())
        inner, lower = torch.linalg.qr(change.right.double().mT)
        u, sigma, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        root = sigma[..., :rank].sqrt()
        left = outer @ (u[..., :rank] * root[..., None, :])
        right = root[..., :, None] * (vh[..., :rank, :] @ inner.mT)
        squares = sigma**2
        sizes = torch.stack([squares.sum(), squares[..., rank:].sum()])
        return LowRank(left.to(dtype), right.to(dtype)), sizes
    wide = change.shape[-1] > change.shape[-2]
    tall = (change.mT if wide else change).double()  # the smaller side last
    rank = min(rank, tall.shape[-1])
    values, vectors = torch.linalg.eigh(tall.mT @ tall)  # in ascending order
    basis = vectors[..., -rank:].flip(-1)  # [side, r]
    # B·A with both of norm √σ, as a module would be trained
    root = values[..., -rank:].flip(-1).clamp_min(0) ** 0.25
    scale = torch.where(root > 0, 1 / root.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    left = (tall @ basis) * scale[..., None, :]
    right = root[..., :, None] * basis.mT
    if wide:
        left, right = right.mT, left.mT
    sizes = torch.stack([values.clamp_min(0).sum(), values[..., :-rank].clamp_min(0).sum()])
    return LowRank(left.to(change.dtype), right.to(change.dtype)), sizes
