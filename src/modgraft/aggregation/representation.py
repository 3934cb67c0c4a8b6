"""Aggregation of what modules make of one representation, or of one after the other's."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from modgraft.aggregation.base import Aggregation, Member


@final
class Average(Aggregation):
    """y + Σ_j α_j (h_j − y), which is Σ_j α_j h_j where the weights add up to 1.

    The mean of representations, weighted (the survey's section 5.2). For parameter modules h_j − y
    is exactly the effect of α_j Δ_j, so that it is also the sum of weights θ + Σ_j α_j Δ_j.
    """

    @property
    def adds(self) -> bool:
        return True

    def forward(self, member: Member, weights: list[Tensor], y: Tensor) -> Tensor:
        total = y
        for j, weight in enumerate(weights):
            total = member(j, y, total, weight)
        return total


@final
class Sequential(Aggregation):
    """h ← h + α_j (f_j(h) − h), j after j: each module acts on what the one before it left.

    Sequential aggregation (the survey's section 5.4) over the modules that a router chose, in the
    order of the mixture.
    """

    def forward(self, member: Member, weights: list[Tensor], y: Tensor) -> Tensor:
        for j, weight in enumerate(weights):
            y = member(j, y, y, weight)
        return y


@final
class Fuse(Aggregation):
    """Σ_j a_j V h_j, a = softmax_j((Q y)ᵀ K h_j): attention over what the modules make of y.

    AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247), token by token, over modules of any
    kind: h_j = y + the effect of module j. V starts as the identity, Q and K as drawn by
    ``nn.Linear``, so that it begins as a mean of the modules. It looks at all of them, so a router
    has nothing to choose.

    Args:
        value: whether there is a V; without it the result is a convex combination of the h_j.
    """

    value: bool = True

    @property
    def routed(self) -> bool:
        return False

    def build(self, count: int, width: int) -> None:
        self.Q, self.K = nn.Linear(width, width), nn.Linear(width, width)
        if self.value:
            self.V = nn.Linear(width, width, bias=False)
            nn.init.eye_(self.V.weight)
        self.count = count

    def attention(self, y: Tensor, results: Tensor) -> Tensor:
        """a ``[B, …, N]`` for y ``[B, …, d]`` and results ``[B, …, N, d]``."""
        scores = torch.einsum("...d,...nd->...n", self.Q(y), self.K(results))
        return scores.softmax(-1)

    def forward(self, member: Member, weights: list[Tensor], y: Tensor) -> Tensor:
        results = torch.stack([member(j, y, y, 1.0) for j in range(self.count)], dim=-2)
        a = self.attention(y, results)
        values = self.V(results) if self.value else results
        return torch.einsum("...n,...nd->...d", a, values)
