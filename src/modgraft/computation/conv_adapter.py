"""The convolutional adapter, on feature maps or on tokens."""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from modgraft.computation._checks import check_input, check_parallel, real_width
from modgraft.computation.base import FunctionComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.side import Side
from modgraft.core.sites import Site


@final
class ConvAdapter(FunctionComposition):
    """f'(x) = y + F ∗ y with y = f(x), or y + F ∗ x in parallel; F = 0 at the start.

    The residual adapter of Rebuffi et al. 2017 (arXiv:1705.08045), in series, and 2018
    (arXiv:1803.10082), in parallel. Over a map, y is ``[B, C, H, W]`` and F ``[C, C, k, k]``; over
    tokens, y is ``[B, n, d]``, convolved along n, and F ``[d, d, k]``. With ``depthwise`` each
    channel has one filter, and F's second axis is 1. Edges are padded with zeros. Over tokens with
    k > 1 the host's padding tokens count as neighbours too, since a site does not see the mask.

    Args:
        over: ``"tokens"`` or ``"map"``.
        kernel: k, odd; the papers use 1.
        depthwise: whether each channel is filtered by itself.
        form: ``"series"`` or ``"parallel"``.

    Raises:
        ModgraftError: for an even kernel, an output of another layout, k > 1 over the tokens of a
            decoder (which come one at a time), or in parallel, a site whose input does not have the
            shape of its output.
    """

    identity: ClassVar[bool] = True

    over: Literal["tokens", "map"] = "tokens"
    kernel: int = 1
    depthwise: bool = False
    form: Literal["series", "parallel"] = "series"

    def __post_init__(self) -> None:
        if self.over not in ("tokens", "map"):
            raise ModgraftError(f"ConvAdapter(over={self.over!r}): 'tokens' or 'map'")
        if self.form not in ("series", "parallel"):
            raise ModgraftError(f"ConvAdapter(form={self.form!r}): 'series' or 'parallel'")
        if self.kernel < 1 or self.kernel % 2 == 0:
            below, above = max(1, self.kernel - 1), max(3, self.kernel + 1)
            raise ModgraftError(
                f"ConvAdapter(kernel={self.kernel}): the kernel is odd and at least 1, so that the "
                f"shape stays; use kernel={below} or kernel={above}"
            )

    def build(self, site: Site) -> None:
        image = self.over == "map"
        kind = type(site.module).__name__
        if isinstance(site.module, nn.Conv1d | nn.Conv3d):
            shape = "[B, C, n]" if isinstance(site.module, nn.Conv1d) else "[B, C, D, H, W]"
            raise ModgraftError(
                f"ConvAdapter at {site.label}: a {kind} puts out {shape}, and ConvAdapter acts "
                f"on tokens [B, n, d] and on maps [B, C, H, W]"
            )
        if image and not site.channels_first:
            raise ModgraftError(
                f"ConvAdapter(over='map') at {site.label}: a {kind} is not known to put out a map "
                f"[B, C, H, W]; choose an nn.Conv2d, an nn.BatchNorm2d or a Sequential that ends "
                f"in one, or where tokens [B, n, d] are put out, ConvAdapter(over='tokens')"
            )
        if site.channels_first and not image:
            raise ModgraftError(
                f"ConvAdapter(over='tokens') at {site.label}: a {kind} puts out a map "
                f"[B, C, H, W]; use ConvAdapter(over='map')"
            )
        if not image and self.kernel > 1 and site.stepwise:
            raise ModgraftError(
                f"ConvAdapter(kernel={self.kernel}) at {site.label}: a decoder's tokens come one "
                f"at a time and may not see later ones; use ConvAdapter(kernel=1) there, or a site "
                f"of an encoder"
            )
        if self.form == "parallel":
            check_parallel("ConvAdapter(form='parallel')", site)
        d, axes = real_width("ConvAdapter", site), 2 if image else 1
        self.F = nn.Parameter(torch.zeros(d, 1 if self.depthwise else d, *[self.kernel] * axes))

    @property
    def by_token(self) -> bool:
        return False

    def forward(self, y: Tensor, x: Tensor | None, side: Side | None) -> Tensor:
        image, d = self.over == "map", self.F.shape[0]
        if y.dim() != (4 if image else 3) or y.shape[1 if image else 2] != d:
            wanted = f"[B, {d}, H, W]" if image else f"[B, n, {d}]"
            raise ModgraftError(
                f"ConvAdapter(over={self.over!r}) was built for {wanted} and this site puts out "
                f"{list(y.shape)}"
            )
        source = y if self.form == "series" else check_input("ConvAdapter(form='parallel')", y, x)
        groups, padding = d if self.depthwise else 1, self.kernel // 2
        if image:
            return y + functional.conv2d(source, self.F, padding=padding, groups=groups)
        source = source.transpose(1, 2)  # [B, n, d] → [B, d, n]
        return y + functional.conv1d(source, self.F, padding=padding, groups=groups).mT
