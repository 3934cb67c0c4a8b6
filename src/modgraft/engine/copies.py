"""Copies of a host, and of its model alone: only the first has the modules.

Layers with modules, and hooks that follow a host's calls, copy and pickle themselves as what they
were before. A host takes with it what it has put there
(:func:`modgraft.engine.graft.implanted_in`), and puts it there again in its copy.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from modgraft.core.errors import ModgraftError
from modgraft.core.sharded import sharded_parts
from modgraft.core.tensors import walk

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

Hooked = list[tuple[nn.Module, str, int, type["OfHost"], dict[str, Any]]]
"""Hooks of a host: the part of the model, which of its dictionaries, the key, and the hook."""


def nothing(*_: Any, **__: Any) -> None:
    """Stand in a copy of a model for a hook that follows the calls of its host."""


def _no_hook() -> Callable[..., None]:
    return nothing


class OfHost:
    """A hook that follows the calls of a host; a copy of the model alone has :func:`nothing`."""

    def __reduce__(self) -> Any:
        return _no_hook, ()


def hooks_in(model: nn.Module) -> Hooked:
    """Return the hooks that follow the calls of the host of ``model``."""
    return [
        (part, which, key, type(hook), hook.__dict__)
        for part in model.modules()
        for which in _HOOKS
        for key, hook in part.__dict__[which].items()
        if isinstance(hook, OfHost)
    ]


def hook_again(hooks: Hooked) -> None:
    """Put hooks where they were, in a copy."""
    for part, which, key, kind, own in hooks:
        hook = part.__dict__[which][key] = object.__new__(kind)
        hook.__dict__.update(own)


def reduced(bare: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Return the ``__reduce_ex__`` of a layer with modules.

    Args:
        bare: the layer as it is without them, another object of the class that it had.
        protocol: pickle's.
    """
    how, *rest = bare.__reduce_ex__(max(2, protocol))
    return (_made if how is copyreg.__newobj__ else how, *rest)  # type: ignore[attr-defined]


def _made(kind: type[nn.Module], *given: Any) -> Any:
    """Make an object; pickle would refuse ``copyreg.__newobj__`` for one of another class."""
    return kind.__new__(kind, *given)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """Return a copy of a model, which shares with it what cannot be copied and is no part of it.

    That are locks, pools of threads, files and the like, which a model may hold.

    Args:
        model: the model.
        memo: what stands for what in the copy, by identity.

    Raises:
        ModgraftError: where its weights are sharded over processes.
    """
    for path, _ in sharded_parts(model):
        raise ModgraftError(
            f"this needs a copy of the model, and fully_shard has spread {path or 'it'} over "
            f"processes. Merge modules in one process that has the model whole; where a side "
            f"input, or a composition for each example, asks where the examples lie, call the host "
            f"once with such a batch before fully_shard, which tells"
        )
    memo = {} if memo is None else memo
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception:
        shared = {id(v): v for v in _held(model) if not _copies(v, memo) and not _is_part(v)}
        if not shared:
            raise
        return copy.deepcopy(model, {**memo, **shared})


def _held(model: nn.Module) -> list[Any]:
    own = nn.Module().__dict__.keys()
    return [v for m in model.modules() for name, v in m.__dict__.items() if name not in own]


def _copies(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:  # noqa: BLE001 whatever says that it is not to be copied
        return False
    return True


def _is_part(value: Any) -> bool:
    return any(isinstance(each, nn.Module | Tensor) for each in walk(value))
