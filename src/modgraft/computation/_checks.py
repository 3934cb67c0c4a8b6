"""Checks of arguments, sites and inputs that several methods need."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from modgraft.core.errors import ModgraftError
from modgraft.core.sites import Site


def check_at_least_one(method: str, **values: int | None) -> None:
    """Check that each of a method's options, by name, is at least 1, or None.

    Raises:
        ModgraftError: for the first that is not.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            what = name if len(name) == 1 or "_" in name else f"the {name}"
            raise ModgraftError(f"{method}({name}={value}): {what} is at least 1")


def distinct_names(names: Sequence[str], call: str, example: str) -> tuple[str, ...]:
    """Return ``names`` as a tuple.

    Raises:
        ModgraftError: for no name, a name given twice, or anything but a sequence of names.
    """
    found = () if isinstance(names, str) else tuple(names)
    named = all(isinstance(name, str) and name for name in found)
    if not found or not named or len(set(found)) != len(found):
        raise ModgraftError(f"{call}: one or more different names{example}")
    return found


def check_output(name: str, y: Tensor, d: int) -> None:
    """Check that an output is as wide as the module was built for.

    Raises:
        ModgraftError: if ``y`` is not ``[B, …, d]``.
    """
    if y.dim() < 2 or y.shape[-1] != d:
        remedy = "choose a layer that knows its width, such as nn.Linear"
        if y.shape == (d,):
            remedy = "call the host with a batch"
        raise ModgraftError(
            f"{name} was built for an output [B, …, {d}] and this site puts out {list(y.shape)}; "
            f"{remedy}"
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
