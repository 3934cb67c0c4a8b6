"""Aggregation of representations: parallel, one after another, or by attention."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from modgraft.aggregation.base import Aggregation, ApplyModule


@final
class Average(Aggregation):
    """y + Σ_j α_j (h_j − y), which is Σ_j α_j h_j where the weights add up to 1.

    The weighted mean of representations (the survey's section 5.2). For parameter modules
    α_j (h_j − y) is exactly the effect of α_j Δ_j, so this is also the layer at θ + Σ_j α_j Δ_j.
    """

    @property
    def is_weighted_sum(self) -> bool:
        return True

    def forward(self, apply: ApplyModule, weights: list[Tensor], y: Tensor) -> Tensor:
        total = y
        for j, weight in enumerate(weights):
            total = apply(j, y, total, weight)
        return total


@final
class Sequential(Aggregation):
    """h ← h + α_j (f_j(h) − h) for j = 1, 2, …: each module acts on the result of the one before.

    Sequential aggregation (the survey's section 5.4) over the modules that a router chose, in the
    order of the mixture.
    """

    def forward(self, apply: ApplyModule, weights: list[Tensor], y: Tensor) -> Tensor:
        for j, weight in enumerate(weights):
            y = apply(j, y, y, weight)
        return y


@final
class Fuse(Aggregation):
    """Σ_j a_j V h_j, a = softmax_j((Q y)ᵀ K h_j): attention over the modules' results.

    AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247), token by token, over modules of any
    kind: h_j = y + the effect of module j. V starts as the identity, Q and K as ``nn.Linear`` draws
    them, so that it starts as a mean of the modules. All modules are computed, so there is no
    router.

    Args:
        value: whether there is a V; without it the result is a convex combination of the h_j.
        effects: whether K and V read the modules' effects alone: y + Σ_j a_j V (h_j − y), as in
            AdapterHub's ``adapters``. Without a V both are the same function.
    """

    value: bool = True
    effects: bool = False

    @property
    def takes_weights(self) -> bool:
        return False

    def build(self, count: int, width: int) -> None:
        self.Q, self.K = nn.Linear(width, width), nn.Linear(width, width)
        if self.value:
            self.V = nn.Linear(width, width, bias=False)
            nn.init.eye_(self.V.weight)
        self.count = count

    def attention(self, y: Tensor, results: Tensor) -> Tensor:
        """Return a ``[B, …, N]`` for y ``[B, …, d]`` and results ``[B, …, N, d]``."""
        scores = torch.einsum("...d,...nd->...n", self.Q(y), self.K(results))
        return scores.softmax(-1)

    def forward(self, apply: ApplyModule, weights: list[Tensor], y: Tensor) -> Tensor:
        results = torch.stack([apply(j, y, y, 1.0) for j in range(self.count)], dim=-2)
        read = results - y.unsqueeze(-2) if self.effects else results
        a = self.attention(y, read)
        combined = torch.einsum("...n,...nd->...d", a, self.V(read) if self.value else read)
        return y + combined if self.effects else combined
