"""One module at one site, as the engine keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from modgraft.computation.base import Computation, InputComposition, ParameterComposition
from modgraft.engine.kernels.batched import Batched
from modgraft.routing.mixture import RoutedMixture


@dataclass
class Entry:
    """One module at one site.

    Attributes:
        name: what compositions call it.
        module: the computation built for the site, several batched as one, or a routed mixture.
        part: ``(i, n)``, the i-th of n equal parts of a fused projection; None: the whole output.
        residual: whether it acts on the layer's residual input.
        parameter: which of the layer's weights it changes, where the layer has several.
        axis: the axis of the output's features.
    """

    name: str
    module: Computation | Batched | RoutedMixture
    part: tuple[int, int] | None
    residual: bool = False
    parameter: str | None = None
    axis: int = -1

    @property
    def changes_weight(self) -> bool:
        """Whether it computes f at θ + Δ."""
        return isinstance(self.module, ParameterComposition) or (
            isinstance(self.module, Batched) and self.module.is_weight_change
        )

    @property
    def changes_output(self) -> bool:
        """Whether it acts on the layer's output, not inside the layer or before its input."""
        return self.parameter is None and not isinstance(self.module, InputComposition)
