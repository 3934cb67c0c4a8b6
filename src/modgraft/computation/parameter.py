"""Parameter composition: f'(x) = f(x; θ + Δ)."""

from __future__ import annotations

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.computation.base import ParameterComposition
from modgraft.computation.layers import weight_matrix
from modgraft.errors import ModgraftError
from modgraft.sites import Site


@final
class LoRA(ParameterComposition):
    """Δ = s·BA with s = α / r, B = 0 at the start.

    Low-rank adaptation (Hu et al. 2022, arXiv:2106.09685). A ``[r, in]`` is drawn uniformly as
    ``nn.Linear`` draws its weight, B ``[out, r]`` is zero. At an embedding, A is ``[r, width]`` and
    B ``[entries, r]``.

    Args:
        rank: r, at most the smaller side of the weight.
        alpha: α; None means α = r, so that s = 1.
        dropout: probability in [0, 1) of dropping an input of the branch while training.

    Raises:
        ModgraftError: for a rank or dropout out of range, or a site without a weight matrix.
    """

    identity: ClassVar[bool] = True

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ModgraftError(f"LoRA(rank={self.rank}): the rank is at least 1")
        if not 0 <= self.dropout < 1:
            raise ModgraftError(f"LoRA(dropout={self.dropout}): dropout is in [0, 1)")

    @property
    def scale(self) -> float:
        """s = α / r."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def build(self, site: Site) -> None:  # noqa: D102
        rows, columns = weight_matrix(site.module, site.part).shape
        if self.rank > min(rows, columns):
            raise ModgraftError(
                f"LoRA(rank={self.rank}) at {site.label}: its weight is {rows} × {columns}, "
                f"so the rank is at most {min(rows, columns)}"
            )
        self.A = nn.Parameter(torch.empty(self.rank, columns))
        self.B = nn.Parameter(torch.zeros(rows, self.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def delta(self, weight: Tensor) -> Tensor:  # noqa: D102
        return self.scale * (self.B @ self.A)

    def effect(self, x: Tensor, layer: nn.Module, weight: Tensor) -> Tensor:
        """s·B(Ax), in factors: [B, n, in] → [B, n, r] → [B, n, out]."""
        if isinstance(layer, nn.Embedding):
            return self.scale * F.linear(F.embedding(x, self.B), self.A.T)
        x = F.dropout(x, self.dropout, self.training)
        return self.scale * F.linear(F.linear(x, self.A), self.B)
