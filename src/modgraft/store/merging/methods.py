"""The methods of merging: how several changes Δ₁ … Δₙ of one weight become one.

One function a method, its equation first; :data:`METHODS` is the table of them. A method sees a
tensor whole or, where it works number by number, in blocks, so that a checkpoint larger than memory
is merged by the same function as two modules. What it needs to know of a whole tensor, a magnitude
to trim at or an angle, it asks :class:`Whole`.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from modgraft.core.errors import ModgraftError
from modgraft.store.merging.low_rank import Change, LowRank, dense, svd, total

Blocks = Callable[[], Iterable[Sequence[Change]]]
"""Gives the blocks of a tensor, each the same part of Δ₁ … Δₙ, as often as it is asked."""


class Whole:
    """All of the tensor of which a method is given a block.

    Args:
        name: the tensor's; what is drawn at random depends on it.
        parents: what is merged, by name: its draws do not depend on the order.
        weights: w₁ … wₙ.
        blocks: gives the blocks.
    """

    def __init__(
        self, name: str, parents: Sequence[str], weights: Sequence[float], blocks: Blocks
    ) -> None:
        self.name, self.parents, self.weights = name, parents, weights
        self._blocks = blocks

    def blocks(self) -> Iterator[Block]:
        """Give the tensor's blocks."""
        for number, deltas in enumerate(self._blocks()):
            yield Block(self, number, deltas)

    def cutoffs(self, density: float) -> list[float]:
        """Return for each Δ the k-th largest magnitude, k = max(1, ⌊density · size⌋), as float32.

        A magnitude's bits as a whole number are in the order of magnitudes: one count of their
        upper halves finds that of the k-th, a second of the lower halves the rest.
        """
        counts = torch.zeros(len(self.parents), 2**15, dtype=torch.int64)
        for block in self.blocks():
            for count, delta in zip(counts, block.dense(), strict=True):
                count += torch.bincount((_bits(delta) >> 16).cpu(), minlength=2**15)
        upper, left = [], []
        for count in counts:
            k = max(1, int(density * int(count.sum())))
            found = _largest(count, k)
            upper.append(found)
            left.append(k - int(count[found + 1 :].sum()))
        lower = torch.zeros(len(self.parents), 2**16, dtype=torch.int64)
        for block in self.blocks():
            for high, count, delta in zip(upper, lower, block.dense(), strict=True):
                bits = _bits(delta)
                here = bits[bits >> 16 == high] & 0xFFFF
                count += torch.bincount(here.cpu(), minlength=2**16)
        found = [
            high << 16 | _largest(count, k)
            for high, count, k in zip(upper, lower, left, strict=True)
        ]
        return torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist()

    def shares(self, density: float, seed: int) -> list[float]:
        """Return for each Δ the share of ‖Δ‖₁ that :func:`dare` leaves."""
        before = torch.zeros(len(self.parents), dtype=torch.float64)
        after = before.clone()
        for block in self.blocks():
            for i, delta in enumerate(block.dense()):
                size = delta.abs().double()
                before[i] += size.sum().cpu()
                after[i] += (size * block.drawn(i, density, seed).to(size.device)).sum().cpu()
        some = torch.where((before < 1e-7) | (after < 1e-7), 1.0, after / before)
        return some.tolist()

    @cached_property
    def products(self) -> Tensor:
        """⟨Δᵢ, Δⱼ⟩ ``[n, n]`` in float64."""
        found = torch.zeros(len(self.parents), len(self.parents), dtype=torch.float64)
        for block in self.blocks():
            flat = torch.stack([delta.double().flatten() for delta in block.dense()])
            found += (flat @ flat.T).cpu()
        return found


@dataclass(frozen=True)
class Block:
    """The same part of Δ₁ … Δₙ.

    Attributes:
        whole: the tensor.
        number: which of its blocks this is.
        deltas: Δ₁ … Δₙ there, as dense tensors or as factors.
    """

    whole: Whole
    number: int
    deltas: Sequence[Change]

    @property
    def weights(self) -> Sequence[float]:
        """w₁ … wₙ."""
        return self.whole.weights

    @property
    def is_matrix(self) -> bool:
        """Whether the Δ are matrices, which have singular values."""
        return len(self.deltas[0].shape) == 2

    def dense(self) -> list[Tensor]:
        """Return Δ₁ … Δₙ as dense tensors."""
        return [dense(delta) for delta in self.deltas]

    def drawn(self, model: int, density: float, seed: int) -> Tensor:
        """Draw which numbers of a Δ stay, each with the chance ``density``: bool.

        The draw depends on the seed, the tensor, the block and the parent, and on nothing else.
        """
        what = f"{seed}\0{self.whole.name}\0{self.number}\0{self.whole.parents[model]}"
        number = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(number)
        return torch.rand(self.deltas[model].shape, generator=generator) < density


def _bits(delta: Tensor) -> Tensor:
    return delta.abs().float().flatten().view(torch.int32)


def _largest(count: Tensor, k: int) -> int:
    """Return the bin in which the k-th largest is."""
    above = count.flip(0).cumsum(0)
    return len(count) - 1 - int(torch.searchsorted(above, k))


# -- the methods ---------------------------------------------------------------------------------


def average(here: Block) -> Change:
    """Δ = Σ wᵢ·Δᵢ / Σ wᵢ.

    The uniform soup (Wortsman et al. 2022, arXiv:2203.05482) where all weights are equal.
    """
    whole = math.fsum(here.weights)
    return total(here.deltas, [w / whole for w in here.weights])


def arithmetic(here: Block, *, scale: float = 1.0) -> Change:
    """Δ = λ·Σ wᵢ·Δᵢ, with λ = ``scale``.

    Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089); a negative weight forgets a task.
    """
    return total(here.deltas, [scale * w for w in here.weights])


def ties(
    here: Block,
    *,
    density: float = 0.2,
    elect: str = "sum",
    normalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Δ = λ·Σ wᵢ·Δ̂ᵢ / Σ wᵢ over those i whose sign is the elected one, number by number.

    TIES (Yadav et al. 2023, arXiv:2306.01708). Δ̂ᵢ is Δᵢ trimmed to its largest magnitudes, those
    of a share ``density`` of its numbers (and any others as large as the smallest of them). The
    elected sign is that of Σ wᵢ·Δ̂ᵢ, or with ``elect="count"`` of Σ sgn(wᵢ·Δ̂ᵢ), + where it is 0.
    Without ``normalize`` there is no division. λ is ``scale``.
    """
    _in_unit("density", density)
    deltas = here.dense()
    if density < 1:
        cutoffs = _once(here, ("cutoffs", density), lambda: here.whole.cutoffs(density))
        deltas = [d * (d.abs().float() >= c) for d, c in zip(deltas, cutoffs, strict=True)]
    return scale * _mixed(deltas, here.weights, elect, normalize)


def dare(
    here: Block,
    *,
    density: float = 0.5,
    rescale: str = "density",
    elect: str = "none",
    normalize: bool = False,
    scale: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Δ = λ·Σ wᵢ·(mᵢ ⊙ Δᵢ) / p, with mᵢ drawn at random, 1 with the chance p = ``density``.

    DARE (Yu et al. 2024, arXiv:2311.03099): drop and rescale. ``rescale="l1"`` keeps ‖Δᵢ‖₁ in place
    of dividing by p, ``"none"`` does neither. With ``elect="sum"`` or ``"count"`` only those of the
    elected sign are added, as in :func:`ties`, and with ``normalize`` divided by their Σ wᵢ.
    """
    _in_unit("density", density)
    _one_of("rescale", rescale, "density", "l1", "none")
    by = [density if rescale == "density" else 1.0] * len(here.deltas)
    if rescale == "l1":
        by = _once(here, ("l1", density, seed), lambda: here.whole.shares(density, seed))
    deltas = [
        delta * here.drawn(i, density, seed).to(delta.device) / by[i]
        for i, delta in enumerate(here.dense())
    ]
    return scale * _mixed(deltas, here.weights, elect, normalize)


def slerp(here: Block, *, t: float = 0.5) -> Tensor:
    """Δ = (sin((1 − t)·ω)·Δ₁ + sin(t·ω)·Δ₂) / sin ω, with ω the angle between Δ₁ and Δ₂.

    Spherical interpolation (Shoemake 1985) of each tensor as one vector; along the line where the
    two are nearly parallel, |cos ω| > 0.9995. t = 0 is the first, t = 1 the second.
    """
    if not 0 <= t <= 1:
        raise ModgraftError(f"slerp: t={t}; it is in [0, 1], 0 the first and 1 the second")
    one, two = here.dense()
    norms = here.whole.products.diagonal().sqrt()
    lengths = torch.where(norms > 1e-8, norms, 1.0)
    cosine = float(here.whole.products[0, 1] / lengths.prod())
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * two
    angle = math.acos(cosine)
    first, second = math.sin((1 - t) * angle), math.sin(t * angle)
    return (first * one + second * two) / math.sin(angle)


def isotropic(here: Block, *, scale: float = 1.0) -> Change:
    """Δ = λ·σ̄·U Vᵀ, with U Σ Vᵀ = Σᵢ wᵢ·Δᵢ and σ̄ the mean of its singular values.

    Iso-C (Marczak et al. 2025, arXiv:2502.04959): every direction of the sum is as strong as any
    other. The mean is that over the directions that the sum has, its rank. What is no matrix, a
    bias or a norm's weight, is averaged.
    """
    if not here.is_matrix:
        return average(here)
    u, sigma, vh = svd(total(here.deltas, here.weights))
    return _like(here, LowRank(u * (scale * sigma.mean() if len(sigma) else 0.0), vh))


def tsv(here: Block, *, scale: float = 1.0) -> Change:
    """Δ = λ·Û Σ V̂ᵀ, with U = [U₁ … Uₙ], V = [V₁ … Vₙ] made orthogonal and Σ = diag(Σ₁ … Σₙ).

    Merging of task singular vectors (Gargiulo et al. 2025, arXiv:2412.00081). Uᵢ Σᵢ Vᵢᵀ are the
    leading ⌊min(out, in) / n⌋ directions of wᵢ·Δᵢ, or as many as it has; Û is the orthogonal matrix
    nearest to U, PQᵀ of its decomposition P·S·Qᵀ, so that tasks do not interfere. What is no matrix
    is averaged.
    """
    if not here.is_matrix:
        return average(here)
    most = max(1, min(here.deltas[0].shape) // len(here.deltas))
    found = [svd(total([d], [w])) for d, w in zip(here.deltas, here.weights, strict=True)]
    u = _orthogonal(torch.cat([u[:, :most] for u, _, _ in found], 1))  # [out, Σ k]
    v = _orthogonal(torch.cat([vh[:most].T for _, _, vh in found], 1))  # [in, Σ k]
    sigma = torch.cat([s[:most] for _, s, _ in found])
    return _like(here, LowRank(u * (scale * sigma), v.T))


def knots(
    here: Block,
    *,
    inner: str = "ties",
    density: float = 0.2,
    scale: float = 1.0,
    seed: int = 0,
) -> Change:
    """Δ = U·M(Σ V₁ᵀ, …, Σ Vₙᵀ), with U Σ [V₁ᵀ … Vₙᵀ] = [Δ₁ … Δₙ] side by side.

    KnOTS (Stoica et al. 2025, arXiv:2410.19735): the changes are written in one basis U, in which
    modules of any ranks can be compared number by number, and merged there by M = ``inner``:
    ``"ties"`` or ``"dare"`` with ``density`` (and ``seed``), ``"average"`` or ``"arithmetic"``.
    What is no matrix is merged by M as it is.
    """
    _one_of("inner", inner, "ties", "dare", "average", "arithmetic")
    asked = {"density": density, "scale": scale, "seed": seed}
    merge = METHODS[inner]
    options = {key: value for key, value in asked.items() if key in merge.options}
    factor = scale if "scale" not in options else 1.0
    if not here.is_matrix:
        return total([merge.function(here, **options)], [factor])
    u, aligned = _aligned(here.deltas)
    inside = Whole(here.whole.name, here.whole.parents, here.weights, lambda: [aligned])
    found = dense(merge.function(Block(inside, here.number, aligned), **options))
    return _like(here, LowRank(factor * u, found))


def _aligned(deltas: Sequence[Change]) -> tuple[Tensor, list[Tensor]]:
    """Return U ``[out, k]`` and ΣVᵢᵀ ``[k, in]`` for each Δᵢ."""
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) < len(deltas):
        u, sigma, vh = svd(torch.cat([dense(delta) for delta in deltas], 1))
        return u, list((sigma[:, None] * vh).split(deltas[0].shape[-1], 1))
    # [B₁ … Bₙ]·diag(A₁ … Aₙ), of which neither factor is as large as a Δ
    left = torch.cat([each.left for each in factors], 1)
    u, sigma, vh = svd(LowRank(left, torch.block_diag(*[each.right for each in factors])))
    return u, list((sigma[:, None] * vh).split(deltas[0].shape[-1], 1))


def _orthogonal(columns: Tensor) -> Tensor:
    """Return the matrix of orthonormal columns that is nearest to ``columns``."""
    p, _, qh = torch.linalg.svd(columns, full_matrices=False)
    return p @ qh


def _like(here: Block, found: LowRank) -> LowRank:
    """Return factors in the precision of the Δ."""
    first = here.deltas[0]
    dtype = first.left.dtype if isinstance(first, LowRank) else first.dtype
    return LowRank(found.left.to(dtype), found.right.to(dtype))


def _mixed(
    deltas: Sequence[Tensor], weights: Sequence[float], elect: str, normalize: bool
) -> Tensor:
    """Return Σ wᵢ·Δᵢ of those that have the elected sign, divided by their Σ wᵢ or not."""
    _one_of("elect", elect, "sum", "count", "none")
    if elect == "none":
        mixed = dense(total(deltas, weights))
        whole = math.fsum(weights)
        return mixed / (whole if abs(whole) > 1e-8 else 1.0) if normalize else mixed
    weighted = torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)])
    signs = weighted.sign()
    majority = (weighted if elect == "sum" else signs).sum(0) >= 0
    agree = signs == torch.where(majority, 1.0, -1.0)
    mixed = (weighted * agree).sum(0)
    if not normalize:
        return mixed
    by = torch.tensordot(weighted.new_tensor(weights), agree.to(weighted.dtype), 1)
    return mixed / torch.where(by == 0, 1.0, by)


def _once(here: Block, key: tuple[Any, ...], make: Callable[[], list[float]]) -> list[float]:
    """Return what is known of the whole tensor, made with its first block."""
    known = here.whole.__dict__.setdefault("_known", {})
    if key not in known:
        known[key] = make()
    return known[key]


def _in_unit(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ModgraftError(f"{name}={value}: a share in (0, 1], such as {name}=0.2")


def _one_of(name: str, value: str, *known: str) -> None:
    if value not in known:
        raise ModgraftError(f"{name}={value!r}: one of {', '.join(map(repr, known))}")


# -- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        function: merges a block.
        by_number: whether each number of the result depends on the same number of each Δ, given
            what :class:`Whole` says, so that a tensor can be merged in blocks.
        needs_base: whether whole checkpoints need the one that they were all trained from.
        weighted: whether it takes weights.
        count: how many it merges; None: any number.
    """

    function: Callable[..., Change]
    by_number: bool = True
    needs_base: bool = True
    weighted: bool = True
    count: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Its options by name, with their defaults."""
        given = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY}


METHODS: dict[str, Method] = {
    "average": Method(average, needs_base=False),
    "arithmetic": Method(arithmetic),
    "ties": Method(ties),
    "dare": Method(dare),
    "slerp": Method(slerp, needs_base=False, weighted=False, count=2),
    "isotropic": Method(isotropic, by_number=False),
    "tsv": Method(tsv, by_number=False),
    "knots": Method(knots, by_number=False),
}
"""The methods by name."""

SOUP = "greedy_soup"
"""The average of those that a validation chooses: :func:`modgraft.store.merging.soup.greedy`."""


@dataclass(frozen=True)
class Asked:
    """A method with its options and weights, checked.

    Attributes:
        name: the method's.
        method: its row.
        options: all its options.
        weights: one for each that is merged.
    """

    name: str
    method: Method
    options: Mapping[str, Any]
    weights: Sequence[float]

    def merge(self, name: str, parents: Sequence[str], blocks: Blocks) -> Iterator[Change]:
        """Merge one tensor; give the blocks of the result.

        Args:
            name: the tensor's.
            parents: the names of what is merged.
            blocks: gives the blocks of Δ₁ … Δₙ.
        """
        for block in Whole(name, parents, self.weights, blocks).blocks():
            yield self.method.function(block, **self.options)


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
        ModgraftError: for an unknown method or option, a value of another type, or another number
            of weights.
    """
    if name not in METHODS:
        raise ModgraftError(f"method={name!r}: there are {', '.join([*METHODS, SOUP])}")
    method = METHODS[name]
    known = method.options
    if unknown := options.keys() - known:
        has = ", ".join(f"{key}={value!r}" for key, value in known.items()) or "no options"
        raise ModgraftError(f"{name} takes no {', '.join(sorted(unknown))}; it has {has}")
    for key, value in options.items():
        _check_type(key, value, known[key])
    if count < 1 or (method.count is not None and count != method.count):
        wanted = f"{method.count} things" if method.count else "one thing at least"
        raise ModgraftError(f"{name} merges {wanted}, and {count} were given")
    if weights is not None and not method.weighted:
        raise ModgraftError(f"{name} takes no weights; say t=0.3, for instance")
    found = [1.0] * count if weights is None else [*weights]
    numbers = all(isinstance(w, int | float) and math.isfinite(w) for w in found)
    if len(found) != count or not numbers:
        raise ModgraftError(f"weights={found!r:.80}: one finite number for each of {count}")
    if name == "average" and abs(math.fsum(found)) < 1e-8:
        raise ModgraftError(
            f"weights={found!r:.80}: their sum is 0, by which an average divides; "
            f"method='arithmetic' adds without dividing"
        )
    return Asked(name, method, {**known, **options}, [float(w) for w in found])


def _check_type(key: str, value: Any, default: Any) -> None:
    kind = type(default)
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (kind is not bool and isinstance(value, bool)):
        raise ModgraftError(f"{key}={value!r:.80}: a {kind.__name__}, such as {key}={default!r}")
