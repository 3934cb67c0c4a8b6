"""The aggregation function g(α, {h_j}): what a site puts out when several modules act there.

An aggregation is written once, by hyper-parameters alone; a mixture makes a fresh copy for each of
its sites. It sees what each module makes of the site's output, and never the host.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

from torch import Tensor

from modgraft.core.config import Configured

#: j, y, total, weights [B] or [B, n] → total + weight · (h_j(y) − y), h_j the j-th module's result
Member = Callable[[int, Tensor, Tensor, Tensor | float], Tensor]


class Aggregation(Configured):
    """One way to make one result of several."""

    @property
    def routed(self) -> bool:
        """Whether it takes a router's weights; one that does not finds its own."""
        return True

    @property
    def adds(self) -> bool:
        """Whether it is Σ_j α_j (h_j − y), so that the modules may be computed as one."""
        return False

    def fresh(self, count: int, width: int) -> Self:
        """A copy built for ``count`` modules at a site that is ``width`` wide."""
        built = type(self)(**self.config())
        built.build(count, width)
        return built

    def build(self, count: int, width: int) -> None:
        """Make the parameters; most have none."""

    @abstractmethod
    def forward(self, member: Member, weights: list[Tensor], y: Tensor) -> Tensor:
        """The site's new output.

        Args:
            member: runs one module.
            weights: of each module, ``[B]``, ``[B, n]`` or a scalar; none for one that finds its
                own.
            y: ``[B, …, d]``, what the modules act on.
        """
