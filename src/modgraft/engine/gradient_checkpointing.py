"""Gradient checkpointing: recomputes a block in backward under the calls of its forward.

By then those calls have returned, and another composition or other side inputs may be in force. The
hook is where ``torch.utils.checkpoint`` takes the function that it will run again, in either form:
whoever checkpoints by it (transformers, timm, ``apply_activation_checkpointing``, a model's own
forward), and by whatever name it was imported, comes past there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves

from modgraft.core.context import calls_under_way, reentrant, under
from modgraft.engine.served_weight import FACTS, ServedWeight


def _again(function: Callable[..., Any], reenters: bool = False) -> Callable[..., Any]:
    """Return ``function`` as it runs under the calls that are under way now.

    Args:
        function: what is checkpointed.
        reenters: whether in the reentrant form.
    """
    calls = calls_under_way()
    if not calls:  # there is no host
        return function

    entered = [(owner, call, call.entering()) for owner, call in calls if call.entering]

    def run(*args: Any, **kwargs: Any) -> Any:
        token = reentrant.set(reenters)
        again = [enter for owner, call, enter in entered if not owner.under_way(call)]
        try:
            with under(calls), ExitStack() as stack:
                for enter in again:
                    stack.enter_context(enter())
                return function(*args, **kwargs)
        finally:
            reentrant.reset(token)

    return run


class _Learning(TorchFunctionMode):
    """Watches whether anything is computed with a tensor that requires a gradient.

    Attributes:
        seen: whether anything was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Compute ``func`` as it is."""
        if not (self.seen or func in FACTS or func is Tensor.detach):
            self.seen = any(map(_requires_gradient, tree_leaves((args, kwargs))))
        return func(*args, **(kwargs or {}))


def _requires_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and (isinstance(value, ServedWeight) or value.requires_grad)


def _from_no_gradient(
    apply: Callable[..., Any], run: Callable[..., Any], preserve: bool, args: tuple
) -> Any:
    """Checkpoint a block whose inputs have no gradient, as in a frozen host, in the reentrant form.

    PyTorch takes such a block for one that learns nothing. Here it gets one more input, 0 with a
    gradient, and its output has one where the block computes with anything that requires it.
    """
    learning = _Learning()

    def block(zero: Tensor, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            with learning:
                return run(*args)
        out = run(*args)  # in backward, which something has to come through
        return out if any(map(_requires_gradient, tree_leaves(out))) else _each(out, zero.add)

    out = apply(block, preserve, torch.zeros((), requires_grad=True), *args)
    return out if learning.seen else _each(out, Tensor.detach)


def _each(out: Any, do: Callable[[Tensor], Tensor]) -> Any:
    """Return a block's output, or all outputs of a tuple, with ``do`` done to each tensor."""
    if isinstance(out, tuple):
        return tuple(_each(each, do) for each in out)
    return do(out) if isinstance(out, Tensor) and out.is_floating_point() else out


def hook_checkpoints() -> None:
    """Hook ``torch.utils.checkpoint``, once a process."""
    frame, function = checkpoint._CheckpointFrame, checkpoint.CheckpointFunction
    init, apply = frame.__init__, function.apply

    @wraps(init)
    def new_init(self: Any, recompute: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        init(self, _again(recompute), *args, **kwargs)

    @wraps(apply)
    def new_apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        run = _again(function, reenters=True)
        if run is function or not torch.is_grad_enabled() or any(map(_requires_gradient, args)):
            return apply(run, preserve, *args)
        return _from_no_gradient(apply, run, preserve, args)

    frame.__init__ = new_init  # type: ignore[method-assign]
    function.apply = staticmethod(new_apply)  # type: ignore[assignment]
