"""Parameters and buffers that a module reads from elsewhere whenever it runs.

The module's class is replaced by a subclass in which these tensors are properties, as
``torch.nn.utils.parametrize`` does. Nothing is set before a call and put back after it, so threads
do not interfere, and training, ``.to()``, ``deepcopy``, saving and ``torch.compile`` see each
tensor in one module only.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import new_class
from typing import Any, Protocol

from torch import Tensor, nn

from modgraft.core.config import Configured
from modgraft.core.pickling import reduced_by

_REDIRECTED = "_redirected"  # in a module: by tensor name, the source and the key to read there


class TensorSource(Protocol):
    """Something that tensors are read from."""

    def read(self, key: str) -> Tensor:
        """Return the tensor called ``key``, as in a ``state_dict``."""
        ...


class ModuleTensors:
    """Reads the tensors of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def read(self, key: str) -> Tensor:
        """Return the tensor called ``key``, as in a ``state_dict``."""
        value: Any = self.module
        for part in key.split("."):
            value = getattr(value, part)
        return value


def redirect(module: nn.Module, keys: Iterable[str], source: TensorSource) -> None:
    """Let ``module`` read its parameters and buffers called ``keys`` from ``source``."""
    names: dict[str, list[str]] = {}
    for key in keys:
        path, _, name = key.rpartition(".")
        names.setdefault(path, []).append(name)
    for path, redirected in names.items():
        child = module.get_submodule(path)
        sources = child.__dict__.setdefault(_REDIRECTED, {})
        for name in redirected:
            delattr(child, name)
            sources[name] = (source, f"{path}.{name}" if path else name)
        child.__class__ = _redirecting(type(child), tuple(sorted(redirected)))


def is_redirected(module: nn.Module) -> bool:
    """Return whether ``module`` or a child of it reads any tensor from elsewhere."""
    return any(_REDIRECTED in child.__dict__ for child in module.modules())


@cache
def _redirecting(original: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of ``original`` in which the tensors called ``names`` are properties."""

    def get_buffer(self: nn.Module, target: str) -> Tensor:
        return getattr(self, target) if target in names else original.get_buffer(self, target)

    body: dict[str, Any] = {name: _property(name) for name in names}
    body |= {
        "get_buffer": get_buffer,  # torch's finds registered buffers only
        "__reduce_ex__": reduced_by(_redirecting, original, names),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    options = {"registered": False} if issubclass(original, Configured) else {}
    return new_class(original.__name__, (original,), options, lambda space: space.update(body))


def _property(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        source, key = self.__dict__[_REDIRECTED][name]
        return source.read(key)

    return property(read)
