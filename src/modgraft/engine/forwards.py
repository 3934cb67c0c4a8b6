"""Tells the context when a forward of the host begins and ends, by hooks that do nothing else.

A host is called through :class:`~modgraft.host.host.Host`, but also as ``host.model(…)``, and in
``generate`` its encoder by itself. What others read of a grafted layer's weight depends on whether
the host runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modgraft.core.context import Context


class _Enter:
    """A forward pre-hook: a forward begins."""

    def __init__(self, context: Context, is_root: bool) -> None:
        self.context, self.is_root = context, is_root

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Leave the call as it is."""
        if not torch.compiler.is_dynamo_compiling():
            self.context.enter()


class _Leave(_Enter):
    """A forward hook that always runs: a forward has ended."""

    def __call__(self, module: nn.Module, args: Any, out: Any = None) -> None:
        """Leave the output as it is."""
        if torch.compiler.is_dynamo_compiling():
            return
        call = self.context.leave()
        for check in call.reads if self.is_root else ():
            check()


def watch_forwards(model: nn.Module, context: Context) -> None:
    """Watch the forwards of ``model``, and of the whole models in it, unless they are watched."""
    if any(isinstance(hook, _Enter) for hook in model._forward_pre_hooks.values()):
        return
    for part in _models(model):
        part.register_forward_pre_hook(_Enter(context, part is model))
        part.register_forward_hook(_Leave(context, part is model), always_call=True)


def unwatch_forwards(model: nn.Module) -> None:
    """Undo :func:`watch_forwards` everywhere in ``model``."""
    for part in _models(model):
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Enter)]:
                del hooks[key]
                part._forward_hooks_always_called.pop(key, None)


def _models(model: nn.Module) -> Iterator[nn.Module]:
    for part in model.modules():
        if part is model or isinstance(part, PreTrainedModel):
            yield part
