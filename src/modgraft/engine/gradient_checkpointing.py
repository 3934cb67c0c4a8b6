"""Gradient checkpointing: recomputes a block in backward under the calls of its forward.

By then those calls have returned, and another composition or other side inputs may be in force. The
hook is where ``torch.utils.checkpoint`` takes the function that it will run again, in either form:
whoever checkpoints by it (transformers, timm, ``apply_activation_checkpointing``, a model's own
forward), and by whatever name it was imported, comes past there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.utils import checkpoint

from modgraft.core.context import calls_under_way, under


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` as it runs under the calls that are under way now."""
    calls = calls_under_way()
    if not calls:  # there is no host
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        with under(calls):
            return function(*args, **kwargs)

    return run


def hook_checkpoints() -> None:
    """Hook ``torch.utils.checkpoint``, once a process."""
    frame, reentrant = checkpoint._CheckpointFrame, checkpoint.CheckpointFunction
    init, forward = frame.__init__, reentrant.forward

    @wraps(init)
    def new_init(self: Any, recompute: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        init(self, _again(recompute), *args, **kwargs)

    @wraps(forward)
    def new_forward(ctx: Any, run: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, _again(run), *args)

    frame.__init__ = new_init  # type: ignore[method-assign]
    reentrant.forward = staticmethod(new_forward)  # type: ignore[assignment]
