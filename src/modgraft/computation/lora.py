"""LoRA: a change of a weight that has low rank, f'(x) = f(x; θ + s·BA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, TypeVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.computation._checks import check_at_least_one
from modgraft.computation.base import Computation, ParameterComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import bias_vector, is_stack, low_rank_map, over_output, weight_matrix
from modgraft.core.sites import Site, matches

N = TypeVar("N")
D = TypeVar("D")


@final
class LoRA(ParameterComposition):
    """Δ = s·BA with s = α / r, B = 0 at the start.

    Low-rank adaptation (Hu et al. 2022, arXiv:2106.09685). A ``[r, in]`` is drawn uniformly as
    ``nn.Linear`` draws its weight, B ``[out, r]`` is zero. At an embedding, A is ``[r, width]`` and
    B ``[entries, r]``. At a convolution they change its weight as a matrix
    [out, in/groups · k · k]: a convolution by A, followed by a 1×1 convolution by B. All groups
    share A (in PEFT each group has r / groups separate rows).

    The weights of experts are one stack [E, out, in]: there A is ``[E, r, in]`` and B
    ``[E, out, r]``, a change of each expert, and so at any other parameter of three axes.

    ``rslora`` (Kalajdzievski 2023, arXiv:2312.03732) sets s = α / √r. ``dora`` (Liu et al. 2024,
    arXiv:2402.09353) sets θ' = m ⊙ V / ‖V‖ with V = θ + s·BA; the norm is taken over each output's
    weights and has no gradient, as in the paper's section 4.3. m = ‖θ‖ + ``magnitude`` ``[out]``
    with magnitude = 0 at the start, so that m / ‖V‖ is then exactly 1. ``bias`` also trains a
    change b ``[out]`` of the layer's bias, 0 at the start.

    Args:
        rank: r, at most the smaller side of the weight.
        alpha: α; None means α = r, so that s = 1 (with ``rslora``: √r).
        dropout: probability in [0, 1) of dropping an input of the branch while training; 0 at a
            single weight of attention or an RNN, where there is no branch.
        rslora: whether s is α / √r.
        dora: whether magnitude and direction are trained separately.
        bias: whether the bias is changed too.
        rank_pattern: another r for some sites, by a pattern of their paths, of which the first
            that matches counts: ``{"layer.0.*": 16}``.
        alpha_pattern: likewise another α.

    Raises:
        ModgraftError: for a rank or dropout out of range, a site without a weight matrix, or
            ``bias`` where the layer has none.
    """

    identity: ClassVar[bool] = True
    experts: ClassVar[bool] = True

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    bias: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    def __post_init__(self) -> None:
        check_at_least_one("LoRA", rank=self.rank)
        for pattern, rank in (self.rank_pattern or {}).items():
            if rank < 1:
                raise ModgraftError(
                    f"LoRA(rank_pattern={{{pattern!r}: {rank}}}): the rank is at least 1"
                )
        self._rank, self._alpha = self.rank, self.alpha
        if not 0 <= self.dropout < 1:
            raise ModgraftError(f"LoRA(dropout={self.dropout}): dropout is in [0, 1)")

    @property
    def scale(self) -> float:
        """Return s = α / r, or α / √r; in a built copy, that at its site."""
        alpha = self._rank if self._alpha is None else self._alpha
        return alpha / (math.sqrt(self._rank) if self.rslora else self._rank)

    def build_all(self, sites: Sequence[Site]) -> list[Computation]:
        for pattern in {**(self.rank_pattern or {}), **(self.alpha_pattern or {})}:
            if not any(matches(pattern, site) for site in sites):
                raise ModgraftError(
                    f"LoRA: the pattern {pattern!r} of rank_pattern or alpha_pattern matches no "
                    f"site; the module's sites are {', '.join(s.label for s in sites[:6])}"
                )
        return super().build_all(sites)

    def build(self, site: Site) -> None:
        *stack, rows, columns = weight_matrix(site.module, site.part, site.parameter).shape
        rank = _of_first(self.rank_pattern, site, self.rank)
        self._rank, self._alpha = rank, _of_first(self.alpha_pattern, site, self.alpha)
        if rank > min(rows, columns):
            raise ModgraftError(
                f"LoRA(rank={rank}) at {site.label}: its weight is {rows} × {columns}, "
                f"so the rank is at most {min(rows, columns)}; use LoRA(rank={min(rows, columns)})"
            )
        if self.dora and stack and not is_stack(site.module, site.parameter or ""):
            raise ModgraftError(
                f"LoRA(dora=True) at {site.label}: its weight is {[*stack, rows, columns]}, and "
                f"nothing says which axis is the output, over whose weights the norm is taken; use "
                f"LoRA(rank={rank}) there"
            )
        if self.dropout and site.parameter is not None:
            raise ModgraftError(
                f"LoRA(dropout={self.dropout}) at {site.label}: a {type(site.module).__name__} is "
                f"run with its weights changed, so there is no input of the branch to drop; use "
                f"LoRA(rank={rank}) there"
            )
        self.A = nn.Parameter(torch.empty(*stack, rank, columns))
        self.B = nn.Parameter(torch.zeros(*stack, rows, rank))
        nn.init.kaiming_uniform_(self.A.flatten(0, -2), a=math.sqrt(5))
        # the axis of the weight that one output sums over
        self._summed = -2 if isinstance(site.module, nn.Embedding) else -1
        if self.dora:
            outs = columns if self._summed == -2 else rows
            self.magnitude = nn.Parameter(torch.zeros(*stack, outs))
        if self.bias:
            vector = bias_vector(site.module, site.part, site.parameter)
            if vector is None:
                raise ModgraftError(
                    f"LoRA(bias=True) at {site.label}: this {type(site.module).__name__} has no "
                    f"bias that could change; use LoRA(rank={rank}) there"
                )
            self.b = nn.Parameter(torch.zeros(vector.shape))

    def delta(self, weight: Tensor) -> Tensor:
        low_rank = self.scale * (self.B @ self.A)
        if not self.dora:
            return low_rank
        changed = weight + low_rank  # V [out, in]
        norm, host_norm = self._norm(changed), self._norm(weight)  # [out, 1] each
        magnitude = host_norm + self.magnitude.view_as(host_norm)  # m
        # an output whose weights are all 0 has no direction: it stays 0
        return magnitude / norm.where(norm > 0, 1.0) * changed - weight

    def _norm(self, weight: Tensor) -> Tensor:
        # contiguous, so that equal weights have equal norms to the last bit in any layout
        return weight.detach().contiguous().norm(dim=self._summed, keepdim=True)

    def bias_delta(self, bias: Tensor | None) -> Tensor | None:
        return self.b if self.bias else None

    @property
    def is_weight_change(self) -> bool:
        return not (self.dropout and self.training)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        return None if self.dora else (self.B, self.A, self.scale)

    @property
    def can_batch(self) -> bool:
        return not self.dora and not (self.dropout and self.training)

    def effect(
        self, x: Tensor, layer: nn.Module, weight: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """Return s·B(Ax) (+ b), by factors: [B, n, in] → [B, n, r] → [B, n, out]; DoRA: by Δ."""
        if not isinstance(layer, nn.Embedding):  # whose x is ids
            x = F.dropout(x, self.dropout, self.training)
        if self.dora:
            return super().effect(x, layer, weight)
        y = self.scale * low_rank_map(layer, x, self.A, self.B)
        return y + over_output(layer, self.b) if self.bias else y


def _of_first(patterns: dict[str, N] | None, site: Site, default: D) -> N | D:
    """Return what the first pattern that matches a site's path says, or the default."""
    found = (value for pattern, value in (patterns or {}).items() if matches(pattern, site))
    return next(found, default)
