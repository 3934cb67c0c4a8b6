"""Gradient checkpointing: recomputes a block in backward under the call of its forward.

By then that call has returned, and another composition or other side inputs may be in force.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from modgraft.core.context import Call, Context

_FUNCTION = "_gradient_checkpointing_func"
"""The attribute through which transformers' layers checkpoint themselves."""


class CallCheckpoint:
    """Wraps a checkpoint function, so that it recomputes under the call of its forward."""

    def __init__(self, function: Any, context: Context) -> None:
        self.function = function
        self.context = context

    def __call__(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``run``, which is called now and once more in backward."""
        return self.function(partial(self._under, self.context.current(), run), *args, **kwargs)

    def _under(self, call: Call, run: Any, *args: Any) -> Any:
        with self.context.call(call):
            return run(*args)


def wrap_checkpoints(layers: Iterable[nn.Module], context: Context) -> None:
    """Wrap the checkpoint functions of those ``layers`` that have one."""
    for layer in layers:
        function = layer.__dict__.get(_FUNCTION)
        if function is not None and not isinstance(function, CallCheckpoint):
            layer.__dict__[_FUNCTION] = CallCheckpoint(function, context)


def unwrap_checkpoints(model: nn.Module) -> None:
    """Undo :func:`wrap_checkpoints` everywhere in ``model``."""
    for layer in model.modules():
        function = layer.__dict__.get(_FUNCTION)
        if isinstance(function, CallCheckpoint):
            layer.__dict__[_FUNCTION] = function.function
