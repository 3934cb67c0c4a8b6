"""The aggregation function g(α, {h_j}): a site's output when several modules act there.

An aggregation is given by its hyper-parameters alone; a mixture makes a copy for each of its sites.
It sees what each module computes from the site's output, and never the host.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

from torch import Tensor

from modgraft.core.config import Configured

#: (j, y, total, weight) → total + weight · (h_j(y) − y), with h_j the j-th module; the weight is a
#: number, [B] or [B, n]
ApplyModule = Callable[[int, Tensor, Tensor, Tensor | float], Tensor]


class Aggregation(Configured):
    """One way to combine the results of several modules."""

    renamed: ClassVar[Mapping[str, str]] = {"routed": "takes_weights", "adds": "is_weighted_sum"}

    @property
    def takes_weights(self) -> bool:
        """Return whether it uses a router's weights; otherwise it computes weights itself."""
        return True

    @property
    def is_weighted_sum(self) -> bool:
        """Return whether it is y + Σ_j α_j (h_j − y), so that modules may be computed as one."""
        return False

    def fresh(self, count: int, width: int) -> Self:
        """Return a copy built for ``count`` modules at a site that is ``width`` wide."""
        built = type(self)(**self.config())
        built.build(count, width)
        return built

    def build(self, count: int, width: int) -> None:
        """Create the parameters; most have none."""

    @abstractmethod
    def forward(self, apply: ApplyModule, weights: list[Tensor], y: Tensor) -> Tensor:
        """Return the site's new output.

        Args:
            apply: adds one module's weighted result to a total.
            weights: each module's weight, ``[B]``, ``[B, n]`` or a scalar; empty if it computes
                weights itself.
            y: ``[B, …, d]``, the output that the modules act on.
        """
