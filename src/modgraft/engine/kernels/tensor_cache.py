"""Keeps what is made of modules' tensors until one of the tensors changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from modgraft.core.context import once_in_a_call

T = TypeVar("T")
_version = attrgetter("_version")


def _written(optimizer: Optimizer, *_: Any) -> None:
    """Bump the version of the parameters that an optimiser has updated; fused kernels do not."""
    groups = optimizer.param_groups
    written = [p for group in groups for p in group["params"] if p.grad is not None]
    torch.autograd.graph.increment_version(written)


# For every optimiser of the process: what was made of weights before a fused step would stay.
register_optimizer_step_post_hook(_written)


class TensorCache:
    """Remembers, by a key, what was made of the tensors of some modules.

    It is made anew where a gradient has to reach one of the tensors, where one was made in
    inference mode (such tensors count no writes), and once one of them is another tensor, was
    written to, or lies elsewhere (``.to()`` puts new data into the old object). Without gradients
    this is checked once a call of the host, and so once a ``generate``.

    Args:
        modules: the modules that own every tensor it depends on.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = dict.fromkeys(part for m in modules for part in m.modules())
        self._owners = [own for part in parts for own in (part._parameters, part._buffers)]
        # Replaced as a whole, so that threads see one state or another; the tensors are held so
        # that no other takes their identity.
        self._now: tuple[Any, list[Tensor], dict[Hashable, Any]] = (None, [], {})

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` makes, or made before for this key."""
        if not once_in_a_call(self, self._holds):
            return make()
        made = self._now[2]
        key = key, torch.is_inference_mode_enabled()  # its tensors cannot be used outside of it
        if key not in made:
            made[key] = make()
        return made[key]

    def _holds(self) -> bool:
        """Return whether anything may be kept.

        Lets go of what was made of other tensors than now.
        """
        # C over whole lists: several times as fast as a loop in Python
        own = [t for t in chain.from_iterable(map(dict.values, self._owners)) if t is not None]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in own):
            return False
        if any(map(Tensor.is_inference, own)):  # of inference mode: they count no writes
            return False
        state = list(map(_version, own)), list(map(Tensor.data_ptr, own))
        before, tensors, _ = self._now
        if state != before or len(own) != len(tensors) or not all(map(is_, own, tensors)):
            self._now = state, own, {}
        return True
