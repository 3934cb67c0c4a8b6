"""Gradient checkpointing: what is computed again in backward runs under the call it repeats.

By then the call has returned, and another composition may be in force, or other side inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from modgraft.core.context import Call, Context

_FUNCTION = (
    "_gradient_checkpointing_func"  # what transformers' layers call to checkpoint themselves
)


class Remembering:
    """A checkpoint function whose recomputation runs under the call of its forward."""

    def __init__(self, function: Any, context: Context) -> None:
        self.function = function
        self.context = context

    def __call__(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``run``, which is called now and again in backward."""
        return self.function(partial(self._under, self.context.current(), run), *args, **kwargs)

    def _under(self, call: Call, run: Any, *args: Any) -> Any:
        with self.context.call(call):
            return run(*args)


def remember(layers: Iterable[nn.Module], context: Context) -> None:
    """Let the checkpointed ones among ``layers`` remember the calls of ``context``."""
    for layer in layers:
        function = layer.__dict__.get(_FUNCTION)
        if function is not None and not isinstance(function, Remembering):
            layer.__dict__[_FUNCTION] = Remembering(function, context)


def forget(model: nn.Module) -> None:
    """Undo :func:`remember` in all of ``model``."""
    for layer in model.modules():
        function = layer.__dict__.get(_FUNCTION)
        if isinstance(function, Remembering):
            layer.__dict__[_FUNCTION] = function.function
