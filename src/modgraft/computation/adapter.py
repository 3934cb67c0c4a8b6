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


def _maps(method: Adapter | ParallelAdapter, site: Site) -> tuple[nn.Linear, nn.Linear]:
    """W_d and W_u with their biases: W_d as ``nn.Linear`` draws it, the others zero."""
    d, m = bottleneck(type(method).__name__, site, method.reduction, method.width)
    down, up = nn.Linear(d, m), nn.Linear(m, d)
    for zero in (down.bias, up.weight, up.bias):
        nn.init.zeros_(zero)
    return down, up


@final
class Adapter(FunctionComposition):
    """f'(x) = y + s·(W_u σ(W_d y + b_d) + b_u) with y = f(x), W_u = 0 at the start.

    The bottleneck adapter of Houlsby et al. 2019 (arXiv:1902.00751): y ``[B, …, d]``, W_d
    ``[m, d]``, W_u ``[d, m]``. Where it stands is a selection: ``at=["output", "down"]`` puts one
    after each attention and each feed-forward, before the residual sum, as Houlsby et al. do;
    ``at="down"`` after the feed-forward alone; ``at="block"`` one on the residual stream after each
    block, as Pfeiffer et al. 2021 (arXiv:2005.00247) found to be enough. In BERT, which norms after
    the sum, theirs is ``at="feedforward[residual]"``: it reads what was normed, and the norm is
    taken again with what it adds.

    Args:
        reduction: d / m, rounded so that m is whole; 16 if neither it nor ``width`` is given.
        width: m itself.
        nonlinearity: σ: ``relu``, ``gelu``, ``gelu_tanh``, ``silu`` or ``tanh``.
        scale: s.

    Raises:
        ModgraftError: for options that make no bottleneck, or an output that is not ``[B, …, d]``.
    """

    identity: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    reduction: int | None = None
    width: int | None = None
    nonlinearity: Nonlinearity = "relu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_options("Adapter", self.reduction, self.width, self.nonlinearity, self.scale)

    def build(self, site: Site) -> None:
        self.down, self.up = _maps(self, site)

    def forward(self, y: Tensor, x: Tensor | None, side: Side | None) -> Tensor:
        check_output("Adapter", y, self.down.in_features)
        hidden = NONLINEARITIES[self.nonlinearity](self.down(y))  # [B, …, d] → [B, …, m]
        return y + self.scale * self.up(hidden)


@final
class ParallelAdapter(FunctionComposition):
    """f'(x) = y + s·(W_u σ(W_d x + b_d) + b_u) with y = f(x), W_u = 0 at the start.

    The parallel adapter of He et al. 2022 (arXiv:2110.04366), who put it beside the feed-forward
    with s = 4: x and y ``[B, …, d]``, W_d ``[m, d]``, W_u ``[d, m]``. The site takes x as its first
    tensor and keeps its shape: ``at="feedforward"`` in T5, GPT-2, Llama-style decoders and ViT, or
    ``at="attention"``. BERT's ends with the residual sum and the norm, where
    ``at="feedforward[residual]"`` is beside the feed-forward and inside the norm.

    Args:
        reduction: d / m, rounded so that m is whole; 16 if neither it nor ``width`` is given.
        width: m itself.
        nonlinearity: σ: ``relu``, ``gelu``, ``gelu_tanh``, ``silu`` or ``tanh``.
        scale: s.

    Raises:
        ModgraftError: for options that make no bottleneck, or a site whose first tensor input has
            not the shape of its output.
    """

    identity: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    reduction: int | None = None
    width: int | None = None
    nonlinearity: Nonlinearity = "relu"
    scale: float = 4.0

    def __post_init__(self) -> None:
        check_options("ParallelAdapter", self.reduction, self.width, self.nonlinearity, self.scale)

    def build(self, site: Site) -> None:
        check_parallel("ParallelAdapter", site)
        self.down, self.up = _maps(self, site)

    def forward(self, y: Tensor, x: Tensor | None, side: Side | None) -> Tensor:
        check_output("ParallelAdapter", y, self.down.in_features)
        x = check_input("ParallelAdapter", y, x)
        hidden = NONLINEARITIES[self.nonlinearity](self.down(x))  # [B, …, d] → [B, …, m]
        return y + self.scale * self.up(hidden)
