"""PyTorch's fused inference of encoder layers, which a host does not take.

Without gradients ``nn.TransformerEncoderLayer`` hands its weights to one kernel and calls none of
its sub-modules, so that whatever acts in them would be passed by without a word. It does not while
a hook is attached to it or to any of them, which is what is done here, for the whole life of a
host: implanting then changes no bit of what it computes.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class _Slow:
    """A forward pre-hook that does nothing but be there, and knows what else was changed for it."""

    def __init__(self, nested: bool | None = None) -> None:
        self.nested = nested

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Leave the call as it is."""


def leave_fast_path(model: nn.Module) -> None:
    """Let every encoder layer of ``model`` call its sub-modules."""
    for module in model.modules():
        if _hooks(module):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_Slow())
        elif isinstance(module, nn.TransformerEncoder):  # only the kernel reads nested tensors
            module.register_forward_pre_hook(_Slow(module.use_nested_tensor))
            module.use_nested_tensor = False


def take_fast_path(model: nn.Module) -> None:
    """Undo :func:`leave_fast_path` in all of ``model``."""
    for module in model.modules():
        for key, hook in _hooks(module):
            del module._forward_pre_hooks[key]
            if isinstance(module, nn.TransformerEncoder) and hook.nested is not None:
                module.use_nested_tensor = hook.nested


def _hooks(module: nn.Module) -> list[tuple[int, _Slow]]:
    return [(k, h) for k, h in module._forward_pre_hooks.items() if isinstance(h, _Slow)]
