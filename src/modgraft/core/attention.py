"""Which layers attend by transformers' registry of attention functions."""

from __future__ import annotations

from inspect import isfunction, unwrap

from torch import nn


def asks_registry(module: nn.Module) -> bool:
    """Return whether ``module`` asks transformers' registry for its attention function."""
    functions = [f for cls in type(module).__mro__ for f in vars(cls).values() if isfunction(f)]
    return any("get_interface" in unwrap(f).__code__.co_names for f in functions)
