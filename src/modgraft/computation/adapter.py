"""Function composition by bottlenecks: f'(x) = f(x) + s·W_u σ(W_d ·)."""

from __future__ import annotations

from typing import ClassVar, Literal, final

from torch import Tensor, nn

from modgraft.computation._bottleneck import (
    NONLINEARITIES,
    bottleneck,
    check_input,
    check_options,
    check_output,
    check_parallel,
)
from modgraft.computation.base import FunctionComposition
from modgraft.core.context import Side
from modgraft.core.sites import Site

Nonlinearity = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh"]


class BottleneckAdapter(FunctionComposition):
    """f'(x) = y + s·(W_u σ(W_d · + b_d) + b_u) with y = f(x), W_u = 0 at the start.

    W_d ``[m, d]`` starts as ``nn.Linear`` draws it; W_u ``[d, m]`` and both biases start at zero.
    """

    identity: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    reduction: int | None = None
    width: int | None = None
    nonlinearity: Nonlinearity = "relu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_options(name, self.reduction, self.width, self.nonlinearity, self.scale)

    def build(self, site: Site) -> None:
        d, m = bottleneck(type(self).__name__, site, self.reduction, self.width)
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def branch(self, v: Tensor) -> Tensor:
        """Return s·(W_u σ(W_d v + b_d) + b_u): ``[B, …, d]`` → ``[B, …, m]`` → ``[B, …, d]``."""
        return self.scale * self.up(NONLINEARITIES[self.nonlinearity](self.down(v)))


@final
class Adapter(BottleneckAdapter):
    """f'(x) = y + s·(W_u σ(W_d y + b_d) + b_u) with y = f(x), W_u = 0 at the start.

    The bottleneck adapter of Houlsby et al. 2019 (arXiv:1902.00751): y ``[B, …, d]``, W_d
    ``[m, d]``, W_u ``[d, m]``. The selection of sites says where adapters stand:
    ``at=["output", "down"]`` puts one after each attention and each feed-forward, before the
    residual sum, as Houlsby et al. do; ``at="down"`` one after the feed-forward only;
    ``at="block"`` one on the residual stream after each block, which Pfeiffer et al. 2021
    (arXiv:2005.00247) found to be enough. BERT normalises after the sum; the adapter of Pfeiffer et
    al. is ``at="feedforward[residual]"`` there: it reads the normalised output, and its result is
    added before the norm is taken again.

    Args:
        reduction: d / m, rounded so that m is whole; 16 if neither it nor ``width`` is given.
        width: m itself.
        nonlinearity: σ: ``relu``, ``gelu``, ``gelu_tanh``, ``silu`` or ``tanh``.
        scale: s.

    Raises:
        ModgraftError: for options that make no bottleneck, or an output that is not ``[B, …, d]``.
    """

    def forward(self, y: Tensor, x: Tensor | None, side: Side | None) -> Tensor:
        check_output("Adapter", y, self.down.in_features)
        return y + self.branch(y)


@final
class ParallelAdapter(BottleneckAdapter):
    """f'(x) = y + s·(W_u σ(W_d x + b_d) + b_u) with y = f(x), W_u = 0 at the start.

    The parallel adapter of He et al. 2022 (arXiv:2110.04366), who put it beside the feed-forward
    with s = 4: x and y ``[B, …, d]``, W_d ``[m, d]``, W_u ``[d, m]``. The site's first tensor input
    is x, and has the shape of its output: ``at="feedforward"`` in T5, GPT-2, Llama-style decoders
    and ViT, or ``at="attention"``. BERT's feed-forward ends with the residual sum and the norm;
    ``at="feedforward[residual]"`` acts beside it and before the norm there.

    Args:
        reduction: d / m, rounded so that m is whole; 16 if neither it nor ``width`` is given.
        width: m itself.
        nonlinearity: σ: ``relu``, ``gelu``, ``gelu_tanh``, ``silu`` or ``tanh``.
        scale: s.

    Raises:
        ModgraftError: for options that make no bottleneck, or a site whose first tensor input does
            not have the shape of its output.
    """

    scale: float = 4.0

    def build(self, site: Site) -> None:
        check_parallel("ParallelAdapter", site)
        super().build(site)

    def forward(self, y: Tensor, x: Tensor | None, side: Side | None) -> Tensor:
        check_output("ParallelAdapter", y, self.down.in_features)
        return y + self.branch(check_input("ParallelAdapter", y, x))
