"""Finds the layers of a host at which the numbers of a batch decide whose rows are which.

Most hosts put the rows of an example where its place in the batch says. Others go by what they are
given: a mask that leaves padding out, a table of how many patches an image has, images that belong
to the text with a token for them, tokens that a router sends to an expert. What was found for one
batch says nothing of the next there, be its shapes the same.

A run of the host is watched, operation by operation. Rows are *taken* where numbers of the batch
are the index of what is read, and *placed* where they are the index of what is written; layers
between the two, and those whose rows are placed in the end, are such layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from modgraft.core.tensors import rebuilt, tensors_in
from modgraft.engine.twin import REFUSALS, run_twin

_TAKES = {"index": 1, "index_select": 2, "gather": 2, "masked_select": 1}
"""Operation → where its index is: it reads rows of its first argument."""
_PLACES = {
    "index_put": 1, "masked_scatter": 1, "scatter": 2, "scatter_add": 2, "scatter_reduce": 2,
    "index_add": 2, "index_copy": 2,
}  # fmt: skip
"""Operation → where its index is: it writes its last argument into rows of its first."""
_CUTS = {"cat": 1, "stack": 1, "split": 2, "split_with_sizes": 2, "slice": 1, "narrow": 1}
"""Operation → where its axis is: it takes and places rows by numbers that python has read."""
_READS = {Tensor.item, Tensor.tolist, Tensor.__int__, Tensor.__index__, Tensor.numpy}


@dataclass(frozen=True)
class _Known:
    """What is known of a tensor that comes from the batch.

    Attributes:
        taken: whether its rows were taken.
        through: the layers that they have come through since.
        order: of rows that were taken, which rows they were before, if that is known.
    """

    taken: bool = False
    through: frozenset[str] = frozenset()
    order: Tensor | None = None

    def __or__(self, other: _Known) -> _Known:
        order = other.order if self.order is None else self.order
        return _Known(self.taken or other.taken, self.through | other.through, order)


class _Watch(TorchDispatchMode):
    """Follows the tensors of a batch through the operations of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.was_read = False  # whether python has whole numbers of the batch
        self._known: dict[int, tuple[StorageWeakRef, _Known]] = {}

    def of(self, value: Any) -> _Known | None:
        """Return what is known of a tensor; None: it does not come from the batch."""
        key = _storage(value)
        return None if key is None or key.cdata not in self._known else self._known[key.cdata][1]

    def know(self, value: Tensor, what: _Known) -> None:
        """Know this of a tensor, and of all that share its numbers."""
        key = _storage(value)
        if key is not None:  # a reference that is kept keeps the number from being given again
            self._known[key.cdata] = key, what

    def passed(self, path: str, out: Any) -> None:
        """Follow what a layer has put out."""
        for value in tensors_in(out):
            what = self.of(value)
            if what is not None:
                if what.taken:
                    self.found.add(path)
                self.know(value, what | _Known(through=frozenset([path])))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [known for value in tensors_in((args, kwargs)) if (known := self.of(value))]
        if given:
            what = self._after(func._schema.name.partition("::")[2].rstrip("_"), args, given)
            for value in tensors_in(out):
                self.know(value, what)
        return out

    def _after(self, name: str, args: tuple, given: Sequence[_Known]) -> _Known:
        """Return what is known of an operation's output."""
        own = self.of(args[0]) if args else None
        if name in _TAKES and own is not None and self._by_batch(args, _TAKES[name]):
            return _taken(own, args[_TAKES[name]])
        if name in _PLACES and self._by_batch(args, _PLACES[name]):
            source = next((known for value in args[:0:-1] if (known := self.of(value))), _Known())
            self.found |= source.through
            return own or _Known()
        what = given[0]
        for other in given[1:]:
            what |= other
        if self.was_read and name in _CUTS and not _axis(args, _CUTS[name]):
            self.found |= what.through
            return what | _Known(taken=True)
        return what

    def _by_batch(self, args: tuple, at: int) -> bool:
        """Return whether the batch decides which rows: of the first axes, which examples lie in."""
        index = args[at] if len(args) > at else None
        if isinstance(index, list | tuple):
            index = next((one for one in index if one is not None), None)
        elif at == 2 and (args[1] % max(1, args[0].dim())) > 1:
            return False
        return isinstance(index, Tensor) and self.of(index) is not None


class _Reads(TorchFunctionMode):
    """Sees where python reads whole numbers of a batch, of which it may make sizes."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func in _READS and args[0].dtype in _WHOLE and self.watch.of(args[0]) is not None:
            self.watch.was_read = True
        return func(*args, **(kwargs or {}))


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def placed_by_values(
    twin: nn.Module, args: tuple, kwargs: Mapping[str, Any], paths: Sequence[str]
) -> set[str]:
    """Return at which of some layers the numbers of the batch decide whose rows are which.

    Args:
        twin: a copy of the host, see :mod:`modgraft.engine.twin`.
        args: what it is called with.
        kwargs: what it is called with by name.
        paths: of the layers.
    """
    watch = _Watch()
    args, kwargs = rebuilt((args, dict(kwargs)), _own)  # the host may write to what it is given
    for value in tensors_in((args, kwargs)):
        watch.know(value, _Known())

    def passed(path: str) -> Callable[..., None]:
        return lambda module, args, out: watch.passed(path, out)

    @contextmanager
    def watched() -> Iterator[None]:
        with _Reads(watch), watch:
            yield

    handles = [twin.get_submodule(p).register_forward_hook(passed(p)) for p in paths]
    try:
        run_twin(twin, args, kwargs, handles, watched())
    except REFUSALS:  # the call itself says what is wrong with it
        return set()
    return watch.found.intersection(paths)


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, PackedSequence | set) else NotImplemented


def _taken(own: _Known, index: Any) -> _Known:
    """Return what is known of the rows that an index takes.

    Rows that are taken again may be back where they were, as those of tokens that went to experts.
    """
    index = index[0] if isinstance(index, list | tuple) and len(index) == 1 else index
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype not in _WHOLE:
        return _Known(taken=True)
    if not own.taken:
        return _Known(taken=True, order=index)
    if own.order is None or not len(index) or int(index.max()) >= len(own.order):
        return _Known(taken=True)
    order = own.order[index.long()]
    times, left = divmod(len(order), int(order.max()) + 1)  # a token may go to several experts
    back = not left and torch.equal(order, torch.arange(len(order), device=order.device) // times)
    return _Known(taken=not back, order=None if back else order)


def _storage(value: Any) -> StorageWeakRef | None:
    """Return what tensors that share their numbers have in common; None for those without."""
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
    return StorageWeakRef(value.untyped_storage()) if plain else None


def _axis(args: tuple, at: int) -> int:
    """Return an operation's axis, which is the first where it says none."""
    axis = args[at] if len(args) > at else 0
    return axis if isinstance(axis, int) else 0
