"""A limit to what one tensor may take, while a stranger's module is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Bounded(TorchDispatchMode):
    """Refuse, in a ``with`` block, to make a tensor of more than ``most`` numbers.

    A module's card says how large it is before its tensors are looked at, and a card may say
    anything.

    Args:
        most: how many.

    Raises:
        MemoryError: where a larger one would be made, before it is.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        size = args[0] if args and not isinstance(args[0], torch.Tensor) else 0
        if isinstance(size, list | tuple):  # a shape, or the tensors that are put together
            size = 0 if any(isinstance(n, torch.Tensor) for n in size) else math.prod(size)
        if isinstance(size, int | float) and size > self._most:
            raise MemoryError(f"a tensor of {size:,} numbers; the file has room for fewer")
        return func(*args, **(kwargs or {}))
