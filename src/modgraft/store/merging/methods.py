"""The methods of merging: how several changes Δ₁ … Δₙ of one weight become one.

One function a method, its equation first; :data:`METHODS` is the table of them. A method is given
the Δ of one tensor as :class:`Deltas`, whole or in blocks, and gives the blocks of the result: so a
checkpoint larger than memory is merged by the same function as two modules. What it needs to know
of the whole tensor, a magnitude to trim at or an angle, it asks before it begins.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor

from modgraft.core.errors import ModgraftError
from modgraft.store.merging.low_rank import Change, LowRank, dense, svd, total

Blocks = Callable[[], Iterable[Sequence[Change]]]
"""Gives the blocks of a tensor, each the same part of Δ₁ … Δₙ, as often as it is asked."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Elect = Literal["sum", "count", "none"]


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

    def dropped(self, density: float, seed: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Give each block, dense, and m ⊙ Δ: m is drawn, 1 with the chance ``density``, else 0."""
        generators = []
        for parent in self.parents:
            digest = hashlib.sha256(f"{seed}\0{self.name}\0{parent}".encode()).digest()
            number = int.from_bytes(digest[:8], "little") >> 1
            generators.append(torch.Generator().manual_seed(number))
        for deltas in self.dense():
            masks = [
                torch.rand(delta.shape, generator=generator) < density
                for delta, generator in zip(deltas, generators, strict=True)
            ]
            yield deltas, [d * mask.to(d.device) for d, mask in zip(deltas, masks, strict=True)]

    def trimmed(self, density: float) -> Iterator[list[Tensor]]:
        """Give the blocks with 0 wherever a Δ is smaller than its k-th largest magnitude.

        k = ⌊density · size⌋, and 1 at least; magnitudes are compared in float32.
        """
        cutoffs = self._cutoffs(density) if density < 1 else [0.0] * len(self.parents)
        for deltas in self.dense():
            yield [d * (d.abs().float() >= c) for d, c in zip(deltas, cutoffs, strict=True)]

    def _cutoffs(self, density: float) -> list[float]:
        """Return the k-th largest magnitude of each Δ.

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
        return torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist()

    def products(self) -> Tensor:
        """Return ⟨Δᵢ, Δⱼ⟩ ``[n, n]`` in float64."""
        found = torch.zeros(len(self.parents), len(self.parents), dtype=torch.float64)
        for deltas in self.dense():
            flat = torch.stack([delta.double().flatten() for delta in deltas])
            found += (flat @ flat.T).cpu()
        return found


# -- the methods ---------------------------------------------------------------------------------


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
    scale: Number = 1.0,
) -> Iterator[Tensor]:
    """Δ = λ·Σ wᵢ·Δ̂ᵢ / Σ wᵢ over those i whose sign is the elected one, number by number.

    TIES (Yadav et al. 2023, arXiv:2306.01708). Δ̂ᵢ is Δᵢ trimmed to its largest magnitudes, those
    of a share ``density`` of its numbers (and any others as large as the smallest of them). The
    elected sign is that of Σ wᵢ·Δ̂ᵢ, or with ``elect="count"`` of Σ sgn(wᵢ·Δ̂ᵢ), + where it is 0.
    Without ``normalize`` there is no division. λ is ``scale``.
    """
    for deltas in these.trimmed(density):
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
        sizes = torch.zeros(2, len(by), dtype=torch.float64)  # ‖Δᵢ‖₁, ‖mᵢ ⊙ Δᵢ‖₁
        for both in these.dropped(density, seed):
            sums = [[float(d.abs().double().sum()) for d in each] for each in both]
            sizes += sizes.new_tensor(sums)
        by = torch.where((sizes < 1e-7).any(0), 1.0, sizes[1] / sizes[0]).tolist()
    for _, kept in these.dropped(density, seed):
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
    other. The mean is that over the directions that the sum has, its rank.
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
        u = _orthogonal(torch.cat([u[:, :most] for u, _, _ in found], 1))  # [out, Σ k]
        v = _orthogonal(torch.cat([vh[:most].T for _, _, vh in found], 1))  # [in, Σ k]
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
    method = METHODS[inner]
    given = {"density": density, "seed": seed}
    options = {key: value for key, value in given.items() if key in method.options.model_fields}
    for deltas in these:
        u, aligned = _aligned(deltas)
        inside = Deltas(these.name, these.parents, these.weights, lambda a=aligned: [a])
        merged = dense(next(method.function(inside, **options)))
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


def _orthogonal(columns: Tensor) -> Tensor:
    """Return the matrix of orthonormal columns that is nearest to ``columns``."""
    p, _, qh = torch.linalg.svd(columns, full_matrices=False)
    return p @ qh


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


# -- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        function: merges a tensor.
        of_matrices: whether it is of matrices as wholes, which have singular values; what is no
            matrix, a bias or a norm's weight, is averaged then. The others work number by number.
        needs_base: whether whole checkpoints need the one that they were all trained from.
        weighted: whether it takes weights.
        count: how many it merges; None: any number.
    """

    function: Callable[..., Iterator[Change]]
    of_matrices: bool = False
    needs_base: bool = True
    weighted: bool = True
    count: int | None = None

    @cached_property
    def options(self) -> type[BaseModel]:
        """Its options, as its function declares them: their types, bounds and defaults."""
        given = inspect.signature(self.function, eval_str=True).parameters.values()
        own: Any = {p.name: (p.annotation, p.default) for p in given if p.kind is p.KEYWORD_ONLY}
        return create_model(
            self.function.__name__, __config__=ConfigDict(strict=True, extra="forbid"), **own
        )


METHODS: dict[str, Method] = {
    "average": Method(average, needs_base=False),
    "arithmetic": Method(arithmetic),
    "ties": Method(ties),
    "dare": Method(dare),
    "slerp": Method(slerp, needs_base=False, weighted=False, count=2),
    "isotropic": Method(isotropic, of_matrices=True),
    "tsv": Method(tsv, of_matrices=True),
    "knots": Method(knots, of_matrices=True),
}
"""The methods by name."""

SOUP = "greedy_soup"
"""The average of those that a validation chooses: :func:`modgraft.store.merging.soup.greedy`."""


@dataclass(frozen=True)
class Asked:
    """A method with its options and weights, checked.

    Attributes:
        name: the method's.
        options: all its options.
        weights: one for each that is merged.
    """

    name: str
    options: Mapping[str, Any]
    weights: Sequence[float]

    def in_blocks(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of that shape is merged number by number."""
        return not METHODS[self.name].of_matrices or len(shape) != 2

    def merge(
        self, name: str, parents: Sequence[str], shape: Sequence[int], blocks: Blocks
    ) -> Iterator[Change]:
        """Merge one tensor; give the blocks of the result.

        Args:
            name: the tensor's.
            parents: the names of what is merged.
            shape: the tensor's.
            blocks: gives the blocks of Δ₁ … Δₙ.
        """
        method, these = METHODS[self.name], Deltas(name, parents, self.weights, blocks)
        if method.of_matrices and self.in_blocks(shape):
            return average(these)
        return method.function(these, **self.options)


def asked(
    name: str, count: int, weights: Sequence[float] | None, options: Mapping[str, Any]
) -> Asked:
    """Return a method as it was asked for.

    Args:
        name: the method's.
        count: how many are merged.
        weights: one for each; None: 1.
        options: those that are not to have their default.

    Raises:
        ModgraftError: for an unknown method or option, a value that an option cannot have, or
            another number of weights.
    """
    if name not in METHODS:
        raise ModgraftError(f"method={name!r:.80}: there are {', '.join([*METHODS, SOUP])}")
    method = METHODS[name]
    try:
        known = method.options(**options).model_dump()
    except ValidationError as error:
        wrong = error.errors()[0]
        has = ", ".join(
            f"{key}={each.default!r}" for key, each in method.options.model_fields.items()
        )
        raise ModgraftError(
            f"{name}: {wrong['loc'][0]}={wrong['input']!r:.80}: {wrong['msg']}; its options, with "
            f"their defaults: {has or 'none'}"
        ) from error
    if count < 1 or (method.count is not None and count != method.count):
        wanted = f"{method.count} things" if method.count else "one thing at least"
        raise ModgraftError(f"{name} merges {wanted}, and {count} were given")
    if weights is not None and not method.weighted:
        raise ModgraftError(f"{name} takes no weights; say t=0.3, for instance")
    if not isinstance(weights, list | tuple | None):
        raise ModgraftError(f"weights={weights!r:.80}: a list, of one number for each of {count}")
    found = [1.0] * count if weights is None else [*weights]
    numbers = all(isinstance(w, int | float) and math.isfinite(w) for w in found)
    if len(found) != count or not numbers:
        raise ModgraftError(f"weights={found!r:.80}: one finite number for each of {count}")
    if (name == "average" or method.of_matrices) and abs(math.fsum(found)) < 1e-8:
        raise ModgraftError(
            f"weights={found!r:.80}: their sum is 0, by which an average divides; "
            f"method='arithmetic' adds without dividing"
        )
    return Asked(name, known, [float(w) for w in found])
