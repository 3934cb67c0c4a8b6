"""Takes back what a host writes to its own weights while it is only asked something.

The teacher of BYOL or data2vec is a moving average of the weights, which the forward itself
writes. To ask such a host where its examples lie, or to probe it, takes several forwards, and none
of them may move it. Its weights are not copied for that: the first write to one is seen, and only
that one is copied before.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FILLED = (dict, OrderedDict, defaultdict, list, set)
"""Attributes that a layer's forward may fill; its hooks and buffers are in some."""


@dataclass
class Written:
    """Which tensors a ``with`` block has written to, by their storages.

    Attributes:
        to: all of them.
        changed: those that held other numbers after that.
    """

    to: set[int] = field(default_factory=set)
    changed: set[int] = field(default_factory=set)


@contextmanager
def taken_back(model: nn.Module) -> Iterator[Written]:
    """Run a ``with`` block, and leave parameters and buffers of ``model`` as they were before it;
    else as :func:`kept`."""
    with kept([*model.parameters(), *model.buffers()]) as written:
        yield written


@contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[Written]:
    """Run a ``with`` block, and leave ``tensors`` as they were before it.

    Yields what tells, after the block, which of them it has written to.

    What a function writes by PyTorch's own account is seen, under whatever view or ``.data`` it is
    written, and so is another tensor that was put into ``.data``.
    """
    own = [t for t in tensors if t.layout is torch.strided]
    data = [t.data for t in own]
    watch = _Watch(data)
    written = Written()
    try:
        with watch:
            yield written
    finally:
        written.changed |= watch.take_back()
        written.to |= watch.written
        for tensor, before in zip(own, data, strict=True):
            if storage_of(tensor) != storage_of(before):
                if not same(tensor.data, before.to(tensor.dtype)):  # more than a cast
                    written.to.add(storage_of(before))
                    written.changed.add(storage_of(before))
                tensor.data = before


class _Watch(TorchDispatchMode):
    """Copies the storage of a tensor before the first write to it.

    Args:
        tensors: those whose storages are watched.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._own = {storage_of(t): t.untyped_storage() for t in tensors if not t.is_meta}
        self._before: dict[int, UntypedStorage] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled parts of the model run, whose writes are not seen; flex attention is one."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute ``func``, after copies of what it writes."""
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                written = args[i] if i < len(args) else kwargs.get(argument.name)
                for value in tree_leaves(written):
                    if isinstance(value, Tensor) and value.layout is torch.strided:
                        self._keep(storage_of(value))
        return func(*args, **kwargs)

    def _keep(self, key: int) -> None:
        if key in self._own and key not in self._before:
            self._before[key] = self._own[key].clone()

    @property
    def written(self) -> set[int]:
        """The storages that were written to."""
        return set(self._before)

    def take_back(self) -> set[int]:
        """Write back what the storages held, and return which of them held something else."""
        changed = set()
        for key, before in self._before.items():
            own = self._own[key]
            if own.nbytes() == before.nbytes() and torch.equal(_bytes(own), _bytes(before)):
                continue  # as where a forward moves a layer to the type that it has
            changed.add(key)
            if own.nbytes() != before.nbytes():
                own.resize_(before.nbytes())
            own.copy_(before)
        return changed


def can_watch() -> bool:
    """Return whether the writes of a call can be seen now: in no transform of functions, trace or
    mode of the caller's, which look at the same operations."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
    )


def attributes_of(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Return what puts back the attributes of modules, and what they hold."""
    attributes = [(m, dict(m.__dict__)) for m in modules]
    held = [(v, copy(v)) for _, kept in attributes for v in kept.values() if type(v) in _FILLED]

    def put_back() -> None:
        for module, kept in attributes:
            module.__dict__.clear()
            module.__dict__.update(kept)
        for value, before in held:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(before)

    return put_back


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are of one type and hold the same numbers, NaN too."""
    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    return torch.equal(
        *(t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (one, other))
    )


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[arg-type]


def storage_of(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor, also that of a view of it."""
    return tensor.untyped_storage()._cdata
