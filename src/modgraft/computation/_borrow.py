"""Tensors that a built computation reads elsewhere when it runs, and does not own.

Its class is swapped for a subclass made on the fly in which these tensors are properties. Nothing
is set before a call and put back after it, so that threads do not meet, and training, ``.to()``,
``deepcopy``, saving and ``torch.compile`` see each tensor at its one owner.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import new_class
from typing import Any, Protocol

from torch import Tensor, nn

from modgraft.core.config import Configured

_LENT = "_lent"


class Lender(Protocol):
    """Where tensors are read."""

    def read(self, key: str) -> Tensor:
        """The tensor called ``key``, as in a ``state_dict``."""
        ...


class Owner:
    """Lends the tensors that ``module`` itself has."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def read(self, key: str) -> Tensor:
        """The tensor called ``key``, as in a ``state_dict``."""
        value: Any = self.module
        for part in key.split("."):
            value = getattr(value, part)
        return value


def borrow(place: nn.Module, keys: Iterable[str], lender: Lender) -> None:
    """Let ``place`` read its parameters and buffers called ``keys`` from ``lender``."""
    names: dict[str, list[str]] = {}
    for key in keys:
        path, _, name = key.rpartition(".")
        names.setdefault(path, []).append(name)
    for path, own in names.items():
        module = place.get_submodule(path)
        lent = module.__dict__.setdefault(_LENT, {})
        for name in own:
            delattr(module, name)
            lent[name] = (lender, f"{path}.{name}" if path else name)
        module.__class__ = _borrowing(type(module), tuple(sorted(own)))


@cache
def _borrowing(original: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def get_buffer(self: nn.Module, target: str) -> Tensor:
        return getattr(self, target) if target in names else original.get_buffer(self, target)

    body: dict[str, Any] = {name: _reading(name) for name in names}
    body |= {
        "get_buffer": get_buffer,  # which takes registered buffers alone
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    options = {"registered": False} if issubclass(original, Configured) else {}
    return new_class(original.__name__, (original,), options, lambda space: space.update(body))


def _reading(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        lender, key = self.__dict__[_LENT][name]
        return lender.read(key)

    return property(read)


def borrows(module: nn.Module) -> bool:
    """Whether tensors of ``module``, or of a part of it, are another's."""
    return any(_LENT in part.__dict__ for part in module.modules())
