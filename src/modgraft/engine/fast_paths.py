"""Ways of PyTorch's that a host does not take, kept off by hooks that do nothing else.

Fused inference of encoder layers: without gradients ``nn.TransformerEncoderLayer`` hands its
weights to one kernel and calls none of its sub-modules, so that whatever acts in them would be
passed by without a word. It does not while a hook is attached to it or to any of them.

A product of each example with the whole vocabulary: where the weights are frozen, ``linear`` of a
slice (the last token of each example, ``hidden[:, -1:]``) runs as one product an example, each of
which reads all the weights, and takes many times as long as one product of the slice copied.

Both for the whole life of a host: implanting then changes no bit of what it computes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _Slow:
    """A forward pre-hook that does nothing but be there, and knows what else was changed for it."""

    def __init__(self, nested: bool | None = None) -> None:
        self.nested = nested

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Leave the call as it is."""


class _Whole:
    """A forward pre-hook by which a layer reads its input as one matrix."""

    def __call__(self, module: nn.Module, args: Any) -> Any:
        """The same numbers, one behind the other in memory."""
        return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)


def leave_fast_path(model: nn.Module) -> None:
    """Let every encoder layer of ``model`` call its sub-modules, and logits be one product."""
    for module in model.modules():
        if _hooks(module):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_Slow())
        elif isinstance(module, nn.TransformerEncoder):  # only the kernel reads nested tensors
            module.register_forward_pre_hook(_Slow(module.use_nested_tensor))
            module.use_nested_tensor = False
    logits = _logits(model)
    if logits is not None and not _hooks(logits):
        logits.register_forward_pre_hook(_Whole())


def take_fast_path(model: nn.Module) -> None:
    """Undo :func:`leave_fast_path` in all of ``model``."""
    for module in model.modules():
        for key, hook in _hooks(module):
            del module._forward_pre_hooks[key]
            if isinstance(module, nn.TransformerEncoder) and getattr(hook, "nested", None):
                module.use_nested_tensor = True


def _logits(model: nn.Module) -> nn.Linear | None:
    """The layer that gives a language model's logits."""
    own = getattr(model, "get_output_embeddings", lambda: None)()
    return own if isinstance(own, nn.Linear) else None


def _hooks(module: nn.Module) -> list[tuple[int, _Slow | _Whole]]:
    hooks = module._forward_pre_hooks.items()
    return [(key, hook) for key, hook in hooks if isinstance(hook, _Slow | _Whole)]
