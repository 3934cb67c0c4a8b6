"""The methods of merging: how several changes Δ₁ … Δₙ of one weight become one.

One function a method, its equation first; :mod:`modgraft.store.merging.table` is the table of them.
A method is given the Δ of one tensor as :class:`Deltas`, whole or in blocks, and gives the blocks
of the result: so a checkpoint larger than memory is merged by the same function as two modules.
What it needs to know of the whole tensor, a magnitude to trim at or an angle, it asks before it
begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from modgraft.store.merging.deltas import Deltas
from modgraft.store.merging.low_rank import Change, LowRank, dense, orthogonal, svd, total

Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Elect = Literal["sum", "count", "none"]


def average(these: Deltas) -> Iterator[Change]:
    """Δ = Σ wᵢ·Δᵢ / Σ wᵢ.

    The uniform soup (Wortsman et al. 2022, arXiv:2203.05482) where all weights are equal.
    """
    whole = math.fsum(these.weights)
    return (total(deltas, [w / whole for w in these.weights]) for deltas in these)


def arithmetic(these: Deltas, *, scale: Number = 1.0) -> Iterator[Change]:
    """Δ = λ·Σ wᵢ·Δᵢ, with λ = ``scale``.

    Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089); a negative weight forgets a task.
    """
    return (total(deltas, [scale * w for w in these.weights]) for deltas in these)


def ties(
    these: Deltas,
    *,
    density: Share = 0.2,
    elect: Elect = "sum",
    normalize: bool = True,
    rescale: Literal["l1", "none"] = "none",
    scale: Number = 1.0,
) -> Iterator[Tensor]:
    """Δ = λ·Σ wᵢ·Δ̂ᵢ / Σ wᵢ over those i whose sign is the elected one, number by number.

    TIES (Yadav et al. 2023, arXiv:2306.01708). Δ̂ᵢ is Δᵢ trimmed to its largest magnitudes, those
    of a share ``density`` of its numbers (the first of equal ones). The
    elected sign is that of Σ wᵢ·Δ̂ᵢ, or with ``elect="count"`` of Σ sgn(wᵢ·Δ̂ᵢ), + where it is 0.
    Without ``normalize`` there is no division. ``rescale="l1"`` gives Δ̂ᵢ the ‖·‖₁ of Δᵢ. λ is
    ``scale``.
    """
    by = [1.0] * len(these.weights)
    if rescale == "l1":
        by = _kept_of_l1(zip(these.dense(), these.trimmed(density), strict=True), len(by))
    for kept in these.trimmed(density):
        deltas = [delta / p for delta, p in zip(kept, by, strict=True)]
        yield scale * _mixed(deltas, these.weights, elect, normalize)


def dare(
    these: Deltas,
    *,
    density: Share = 0.5,
    rescale: Literal["density", "l1", "none"] = "density",
    elect: Elect = "none",
    normalize: bool = False,
    scale: Number = 1.0,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Δ = λ·Σ wᵢ·(mᵢ ⊙ Δᵢ) / p, with mᵢ drawn at random, 1 with the chance p = ``density``.

    DARE (Yu et al. 2024, arXiv:2311.03099): drop and rescale. ``rescale="l1"`` keeps ‖Δᵢ‖₁ in place
    of dividing by p, ``"none"`` does neither. With ``elect="sum"`` or ``"count"`` only those of the
    elected sign are added, as in :func:`ties`, and with ``normalize`` divided by their Σ wᵢ.
    """
    by = [density if rescale == "density" else 1.0] * len(these.weights)
    if rescale == "l1":
        by = _kept_of_l1(zip(these.dense(), these.dropped(density, seed), strict=True), len(by))
    for kept in these.dropped(density, seed):
        deltas = [delta / p for delta, p in zip(kept, by, strict=True)]
        yield scale * _mixed(deltas, these.weights, elect, normalize)


def slerp(these: Deltas, *, t: Annotated[float, Field(ge=0, le=1)] = 0.5) -> Iterator[Change]:
    """Δ = (sin((1 − t)·ω)·Δ₁ + sin(t·ω)·Δ₂) / sin ω, with ω the angle between Δ₁ and Δ₂.

    Spherical interpolation (Shoemake 1985) of each tensor as one vector; along the line where the
    two are nearly parallel, |cos ω| > 0.9995. t = 0 is the first, t = 1 the second.
    """
    products = these.products()
    norms = products.diagonal().sqrt()
    cosine = float(products[0, 1] / torch.where(norms > 1e-8, norms, 1.0).prod())
    by = [1 - t, t]
    if abs(cosine) <= 0.9995:
        angle = math.acos(cosine)
        by = [math.sin(share * angle) / math.sin(angle) for share in by]
    return (total(deltas, by) for deltas in these)


def isotropic(these: Deltas, *, scale: Number = 1.0) -> Iterator[Change]:
    """Δ = λ·σ̄·U Vᵀ, with U Σ Vᵀ = Σᵢ wᵢ·Δᵢ and σ̄ the mean of its singular values.

    Iso-C (Marczak et al. 2025, arXiv:2502.04959): every direction of the sum is as strong as any
    other. The mean is over the r singular values of a sum of rank r, and not over the zeros
    beside them, whose directions are arbitrary.
    """
    for deltas in these:
        u, sigma, vh = svd(total(deltas, these.weights))
        mean = sigma.mean() if len(sigma) else 0.0
        yield LowRank(scale * mean * u, vh).to(deltas[0].dtype)


def tsv(these: Deltas, *, scale: Number = 1.0) -> Iterator[Change]:
    """Δ = λ·Û Σ V̂ᵀ, with U = [U₁ … Uₙ], V = [V₁ … Vₙ] made orthogonal and Σ = diag(Σ₁ … Σₙ).

    Merging of task singular vectors (Gargiulo et al. 2025, arXiv:2412.00081). Uᵢ Σᵢ Vᵢᵀ are the
    leading ⌊min(out, in) / n⌋ directions of wᵢ·Δᵢ, or as many as it has; Û is the orthogonal matrix
    nearest to U, PQᵀ of its decomposition P·S·Qᵀ, so that tasks do not interfere.
    """
    for deltas in these:
        most = max(1, min(deltas[0].shape) // len(deltas))
        found = [svd(total([d], [w])) for d, w in zip(deltas, these.weights, strict=True)]
        u = orthogonal(torch.cat([u[:, :most] for u, _, _ in found], 1))  # [out, Σ k]
        v = orthogonal(torch.cat([vh[:most].T for _, _, vh in found], 1))  # [in, Σ k]
        sigma = torch.cat([s[:most] for _, s, _ in found])
        yield LowRank(u * (scale * sigma), v.T).to(deltas[0].dtype)


def knots(
    these: Deltas,
    *,
    inner: Literal["ties", "dare", "average", "arithmetic"] = "ties",
    density: Share = 0.2,
    scale: Number = 1.0,
    seed: int = 0,
) -> Iterator[Change]:
    """Δ = λ·U·M(Σ V₁ᵀ, …, Σ Vₙᵀ), with U Σ [V₁ᵀ … Vₙᵀ] = [Δ₁ … Δₙ] side by side.

    KnOTS (Stoica et al. 2025, arXiv:2410.19735): the changes are written in one basis U, in which
    modules of any ranks can be compared number by number, and merged there by M = ``inner``:
    ``"ties"`` or ``"dare"`` with ``density`` (and ``seed``), ``"average"`` or ``"arithmetic"``.
    """
    inside: dict[str, Callable[[Deltas], Iterator[Change]]] = {
        "ties": lambda these: ties(these, density=density),
        "dare": lambda these: dare(these, density=density, seed=seed),
        "average": average,
        "arithmetic": arithmetic,
    }
    for deltas in these:
        u, aligned = _aligned(deltas)
        coordinates = Deltas(these.name, these.parents, these.weights, lambda a=aligned: [a])
        merged = dense(next(inside[inner](coordinates)))
        yield LowRank(scale * u, merged).to(deltas[0].dtype)


def _aligned(deltas: Sequence[Change]) -> tuple[Tensor, list[Tensor]]:
    """Return U ``[out, k]`` and ΣVᵢᵀ ``[k, in]`` for each Δᵢ."""
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) == len(deltas):
        # [B₁ … Bₙ]·diag(A₁ … Aₙ), of which neither factor is as large as a Δ
        left = torch.cat([each.left for each in factors], 1)
        beside: Change = LowRank(left, torch.block_diag(*[each.right for each in factors]))
    else:
        beside = torch.cat([dense(delta) for delta in deltas], 1)
    u, sigma, vh = svd(beside)
    return u, list((sigma[:, None] * vh).split(deltas[0].shape[-1], 1))


def _kept_of_l1(blocks: Iterable[tuple[list[Tensor], list[Tensor]]], count: int) -> list[float]:
    """Return ‖Δ̂ᵢ‖₁ / ‖Δᵢ‖₁ of each Δᵢ and what is kept of it; 1 where one of them is 0."""
    sizes = torch.zeros(2, count, dtype=torch.float64)  # ‖Δᵢ‖₁, ‖Δ̂ᵢ‖₁
    for both in blocks:
        sizes += sizes.new_tensor([[float(d.abs().double().sum()) for d in each] for each in both])
    return torch.where((sizes < 1e-7).any(0), 1.0, sizes[1] / sizes[0]).tolist()


def _mixed(
    deltas: Sequence[Tensor], weights: Sequence[float], elect: Elect, normalize: bool
) -> Tensor:
    """Return Σ wᵢ·Δᵢ of those that have the elected sign, divided by their Σ wᵢ or not."""
    if elect == "none":
        mixed = dense(total(deltas, weights))
        whole = math.fsum(weights)
        return mixed / whole if normalize and abs(whole) > 1e-8 else mixed
    weighted = torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)])
    signs = weighted.sign()
    majority = (weighted if elect == "sum" else signs).sum(0) >= 0
    agree = signs == torch.where(majority, 1.0, -1.0)
    mixed = (weighted * agree).sum(0)
    if not normalize:
        return mixed
    by = torch.tensordot(weighted.new_tensor(weights, dtype=torch.float64), agree.double(), 1)
    return mixed / torch.where(by.abs() < 1e-8, 1.0, by).to(mixed.dtype)  # weights may cancel
