"""LoRA: a change of a weight that has low rank, f'(x) = f(x; θ + s·BA)."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.computation._checks import check_at_least_one
from modgraft.computation.base import ParameterComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import bias_vector, is_stack, low_rank_map, over_output, weight_matrix
from modgraft.core.sites import Site


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

    def __post_init__(self) -> None:
        check_at_least_one("LoRA", rank=self.rank)
        if not 0 <= self.dropout < 1:
            raise ModgraftError(f"LoRA(dropout={self.dropout}): dropout is in [0, 1)")

    @property
    def scale(self) -> float:
        """Return s = α / r, or α / √r."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def build(self, site: Site) -> None:
        *stack, rows, columns = weight_matrix(site.module, site.part, site.parameter).shape
        if self.rank > min(rows, columns):
            raise ModgraftError(
                f"LoRA(rank={self.rank}) at {site.label}: its weight is {rows} × {columns}, "
                f"so the rank is at most {min(rows, columns)}; use LoRA(rank={min(rows, columns)})"
            )
        if self.dora and stack and not is_stack(site.module, site.parameter or ""):
            raise ModgraftError(
                f"LoRA(dora=True) at {site.label}: its weight is {[*stack, rows, columns]}, and "
                f"nothing says which axis is the output, over whose weights the norm is taken; use "
                f"LoRA(rank={self.rank}) there"
            )
        if self.dropout and site.parameter is not None:
            raise ModgraftError(
                f"LoRA(dropout={self.dropout}) at {site.label}: a {type(site.module).__name__} is "
                f"run with its weights changed, so there is no input of the branch to drop; use "
                f"LoRA(rank={self.rank}) there"
            )
        self.A = nn.Parameter(torch.empty(*stack, self.rank, columns))
        self.B = nn.Parameter(torch.zeros(*stack, rows, self.rank))
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
                    f"bias that could change; use LoRA(rank={self.rank}) there"
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
