"""Find the tensors among arguments, in containers and in a layer's output, and replace them."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from modgraft.core.errors import ModgraftError
from modgraft.core.sharded import is_sharded


def first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    """Return the first of a layer's arguments that is a tensor."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None


def contents(value: Any) -> dict[Any, Any] | None:
    """Return what a mapping, list, tuple or dataclass holds, by key, and the attributes of an
    object of one's own class, as a batch may be; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple | deque):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return _attributes(value) if _is_own(value) else None


def _is_own(value: Any) -> bool:
    """Return whether ``value`` is no object of a library, whose state is its own matter."""
    if isinstance(value, Tensor | str | int | float | Enum | Iterator | None) or callable(value):
        return False
    if isinstance(value, SimpleNamespace | Namespace):
        return True
    return type(value).__module__.partition(".")[0] not in _PYTHON and not is_of_a_library(value)


_PYTHON = sys.stdlib_module_names | {"builtins"}


def is_of_a_library(value: Any) -> bool:
    """Return whether a class of ``value`` is torch's, transformers' or NumPy's."""
    of = {kind.__module__.partition(".")[0] for kind in type(value).__mro__}
    return not of.isdisjoint({"torch", "transformers", "numpy"})


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object itself, not of its class, by name."""
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = [n for some in slots for n in ([some] if isinstance(some, str) else some)]
    kept = {n: getattr(value, n) for n in names if not n.startswith("__") and hasattr(value, n)}
    return {**kept, **getattr(value, "__dict__", {})}


def with_contents(value: Any, new: Mapping[Any, Any]) -> Any:
    """Return a container as ``value`` that holds ``new`` instead of its :func:`contents`."""
    if isinstance(value, tuple):
        named = hasattr(value, "_fields")
        return type(value)(*new.values()) if named else type(value)(new.values())
    return _filled(_copied(value), value, new)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return {}
    try:
        made = copy.copy(value)
    except Exception:  # noqa: BLE001 what it says is of the object, and a holder is all we need
        made = value
    if made is value:
        made = object.__new__(type(value))
        getattr(made, "__dict__", {}).update(getattr(value, "__dict__", {}))
    return made


def _filled(made: Any, value: Any, new: Mapping[Any, Any]) -> Any:
    """Put ``new`` into ``made``, a copy of ``value``."""
    if isinstance(value, list):
        made[:] = new.values()
    elif isinstance(value, deque):
        made.clear()
        made.extend(new.values())
    elif isinstance(value, Mapping):
        for key, each in new.items():
            made[key] = each
    else:
        for name, each in new.items():
            object.__setattr__(made, name, each)  # also of a frozen one
    return made


def rebuilt(
    value: Any, part: Callable[[Any], Any], memo: dict[int, tuple[Any, Any]] | None = None
) -> Any:
    """Return ``value`` with parts of it replaced, in copies of all that holds them.

    Args:
        value: anything.
        part: returns what stands for a part, ``NotImplemented`` where what it holds is to be
            asked for; what holds nothing stands for itself then.
        memo: by its identity, each part and what stands for it.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)][1]
    made = part(value)
    if made is NotImplemented:
        held = contents(value)
        if held is None:
            made = value
        elif isinstance(value, tuple):
            made = with_contents(value, {k: rebuilt(v, part, memo) for k, v in held.items()})
        else:
            made = _copied(value)
            memo[id(value)] = value, made  # before what may hold it in turn
            _filled(made, value, {k: rebuilt(v, part, memo) for k, v in held.items()})
    memo[id(value)] = value, made  # with itself: what is gone leaves its identity to another
    return made


def walk(value: Any, within: frozenset[int] = frozenset()) -> Iterator[Any]:
    """Yield ``value``, what it holds, and what that holds, in their order; no circle twice."""
    yield value
    if id(value) not in within:
        within |= {id(value)}
        for each in (contents(value) or {}).values():
            yield from walk(each, within)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in containers of any depth, in their order."""
    return [each for each in walk(value) if isinstance(each, Tensor)]


def tensor_input(x: Tensor | None, path: str) -> Tensor:
    """Return ``x``, the input of the site at ``path``.

    Raises:
        ModgraftError: if it is None.
    """
    if x is None:
        raise ModgraftError(f"{path or 'the host'} was called without a tensor")
    return x


def tensor_of(out: Any) -> Tensor:
    """Return the tensor of an output: itself, or the first of a tuple or of a ``ModelOutput``.

    Raises:
        ModgraftError: if that is no tensor, a ``PackedSequence`` for instance.
    """
    value = out if isinstance(out, Tensor) else out[0]
    if isinstance(value, PackedSequence):
        raise ModgraftError(
            "this RNN returns a PackedSequence, whose rows are steps of several examples, and a "
            "function of activations acts on [B, n, d]: call the RNN with a padded tensor, or "
            "implant a parameter module at one of its weights, at='rnn.weight_ih_l0'"
        )
    if not isinstance(value, Tensor):
        raise ModgraftError(
            f"a module acts on a tensor, and this site returns a {type(out).__name__}; "
            f"choose a site inside it"
        )
    return value


def with_tensor(out: Any, value: Tensor) -> Any:
    """Replace :func:`tensor_of` of ``out`` by ``value``."""
    if isinstance(out, Tensor):
        return value
    if isinstance(out, list):
        return [value, *out[1:]]
    if isinstance(out, tuple):
        rest = (value, *out[1:])
        return rest if type(out) is tuple else type(out)(*rest)  # a named tuple
    first = next(iter(out.keys()))  # a ModelOutput: its first key that is not None
    return replace(out, **{first: value})


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has numbers of its own, all of them here and one after another."""
    return tensor.layout is torch.strided and not tensor.is_meta and not is_sharded(tensor)


def device_of(model: nn.Module) -> torch.device:
    """Return the device that ``model`` runs on: that of its parameters, the CPU if it has none.

    Parameters that accelerate has offloaded lie on no device between calls; its hooks say where the
    layers run.
    """
    devices = [parameter.device for parameter in model.parameters()]
    if all(device.type == "meta" for device in devices):
        for module in model.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    here = [device for device in devices if device.type != "meta"] or devices
    return here[0] if here else torch.device("cpu")
