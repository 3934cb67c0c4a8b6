"""Function composition by bottlenecks: f'(x) = f(x) + s·W_u σ(W_d ·)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.computation._checks import (
    check_at_least_one,
    check_input,
    check_output,
    check_parallel,
    real_width,
)
from modgraft.computation.base import FunctionComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.side import Side
from modgraft.core.sites import Site

Nonlinearity = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh"]

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


def check_options(
    name: str, reduction: int | None, width: int | None, nonlinearity: str, scale: float
) -> None:
    """Check the options of a bottleneck.

    Raises:
        ModgraftError: if both reduction and width are given or one is below 1, for an unknown
            non-linearity, or for a scale of 0 or infinity.
    """
    if reduction is not None and width is not None:
        raise ModgraftError(
            f"{name}(reduction={reduction}, width={width}): give one of them; the width is the "
            f"site's divided by the reduction"
        )
    check_at_least_one(name, reduction=reduction, width=width)
    if nonlinearity not in NONLINEARITIES:
        raise ModgraftError(
            f"{name}(nonlinearity={nonlinearity!r}): one of {', '.join(NONLINEARITIES)}"
        )
    if not math.isfinite(scale) or scale == 0:
        raise ModgraftError(f"{name}(scale={scale}): the scale is finite and not 0")


def bottleneck(name: str, site: Site, reduction: int | None, width: int | None) -> tuple[int, int]:
    """Return the widths d of the site and m of the bottleneck (by default the reduction is 16).

    Raises:
        ModgraftError: if the site's output is not ``[B, …, d]``, or m would be 0.
    """
    if site.channels_first:
        raise ModgraftError(
            f"{name} at {site.label}: it acts on [B, …, d], and a {type(site.module).__name__} "
            f"puts out a map [B, C, …]; use ConvAdapter(over='map') there"
        )
    d = real_width(name, site)
    if width is not None:
        return d, width
    reduction = 16 if reduction is None else reduction
    if reduction > d:
        raise ModgraftError(
            f"{name}(reduction={reduction}) at {site.label}: its output is {d} wide, so nothing "
            f"would be left; use a reduction of at most {d}, or {name}(width={max(1, d // 2)})"
        )
    return d, d // reduction


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
        reduction, width, nonlinearity, scale: as in :class:`Adapter`.

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
