"""Shared by the bottleneck methods: non-linearities by name, and checks of arguments and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.core.errors import ModgraftError
from modgraft.core.sites import Site

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
    for key, value in (("reduction", reduction), ("width", width)):
        if value is not None and value < 1:
            raise ModgraftError(f"{name}({key}={value}): the {key} is at least 1")
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
    d = site.width
    if width is not None:
        return d, width
    reduction = 16 if reduction is None else reduction
    if reduction > d:
        raise ModgraftError(
            f"{name}(reduction={reduction}) at {site.label}: its output is {d} wide, so nothing "
            f"would be left; use a reduction of at most {d}, or {name}(width={max(1, d // 2)})"
        )
    return d, d // reduction


def check_output(name: str, y: Tensor, d: int) -> None:
    """Check that an output is as wide as the module was built for.

    Raises:
        ModgraftError: if ``y`` is not ``[B, …, d]``.
    """
    if y.dim() < 2 or y.shape[-1] != d:
        raise ModgraftError(
            f"{name} was built for an output [B, …, {d}] and this site puts out {list(y.shape)}; "
            f"choose a layer that knows its width, such as nn.Linear"
        )


def check_parallel(name: str, site: Site) -> None:
    """Check, as far as the layer tells, that a site's input has the shape of its output.

    Raises:
        ModgraftError: if the input is token ids, or has another width than the output.
    """
    module, in_width = site.module, None
    if isinstance(module, nn.Embedding):
        raise ModgraftError(
            f"{name} at {site.label}: its input is token ids, and {name} reads [B, n, d]; use "
            f"Adapter there, which reads the output"
        )
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        in_width = module.in_channels
    elif hasattr(module, "in_features") or hasattr(module, "nx"):
        in_width = site.in_width
    if in_width is not None and in_width != site.width:
        raise ModgraftError(
            f"{name} at {site.label}: its input is {in_width} wide and its output {site.width}; "
            f"choose a site that keeps its width, at='feedforward' or at='attention' for instance"
        )


def check_input(name: str, y: Tensor, x: Tensor | None) -> Tensor:
    """Return ``x`` if it is a floating-point tensor of the shape of ``y``.

    Raises:
        ModgraftError: if it is not.
    """
    if x is None or not x.is_floating_point() or x.shape != y.shape:
        found = "no tensor" if x is None else f"{x.dtype} {list(x.shape)}"
        raise ModgraftError(
            f"{name} reads a site's input of the shape of its output, {list(y.shape)}, and the "
            f"first tensor that this site is called with is {found}; choose a site that takes one, "
            f"or use the method that reads the output"
        )
    return x
