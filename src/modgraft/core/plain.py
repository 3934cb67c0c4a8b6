"""A model without what torch has wrapped around it or its layers, and names of one in the other."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from modgraft.core.patterns import WRAPPERS


def plain(model: nn.Module) -> nn.Module:
    """Return a model as it is without wrappers; its layers and weights are the same objects.

    A wrapper is what ``torch.compile``, activation checkpointing, ``DataParallel`` and their like
    put around a module. Layers with a wrapper in them are copied, so that the model itself keeps
    it; a model without any is returned as it is.
    """
    return _plain(model, {})


def _plain(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in made:
        made[id(module)] = module  # a layer that holds itself ends here
        if wrapped := _wrapped(module):
            made[id(module)] = _plain(wrapped[1], made)
        else:
            inner = {k: None if m is None else _plain(m, made) for k, m in module._modules.items()}
            if any(inner[k] is not m for k, m in module._modules.items()):
                copied = object.__new__(type(module))
                copied.__dict__.update(module.__dict__, _modules=inner)
                made[id(module)] = copied
    return made[id(module)]


def plain_name(model: nn.Module, name: str) -> str:
    """Return what a layer, a weight or a site of a model is called in :func:`plain` of it."""
    return ".".join(part for part, is_inside in _steps(model, name) if not is_inside)


def full_name(model: nn.Module, name: str) -> str:
    """Return what a layer, a weight or a site of :func:`plain` is called in the model itself."""
    return ".".join(part for part, _ in _steps(model, name))


def _steps(model: nn.Module, name: str) -> list[tuple[str, bool]]:
    """Return the steps to what has a name, in or outside wrappers, and which lead into one."""
    steps: list[tuple[str, bool]] = []
    if not name:  # the model as a whole is called so in both
        return steps
    here: nn.Module | None = model
    for part in (*name.split("."), None):  # None: as far inside as there is a wrapper
        wrapped = None if here is None else _wrapped(here)
        while wrapped and part != wrapped[0]:
            steps.append((wrapped[0], True))
            here = wrapped[1]
            wrapped = _wrapped(here)
        if part is not None:
            steps.append((part, wrapped is not None))
            here = wrapped[1] if wrapped else here and here._modules.get(part)
    return steps


def _wrapped(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Return under which name a wrapper holds a module, and that; None for any other module."""
    names = WRAPPERS & module._modules.keys()
    if isinstance(module, DataParallel | DistributedDataParallel):
        names = {"module"}
    found = {name: inner for name in names if (inner := module._modules[name]) is not None}
    return next(iter(found.items()), None)
