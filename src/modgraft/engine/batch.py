"""Takes some of the examples of a batch, in each of the ways in which a batch can hold them.

They are entries of a list, or lie along an axis of tensors: the first, the second, or one of each
tensor's own. Which of the ways is a host's, :mod:`modgraft.engine.examples` finds by asking it.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from modgraft.core.tensors import rebuilt, tensors_in, walk, with_contents

WAYS = 32
"""In how many ways tensors are tried of which several axes may be that of the examples."""


@dataclass
class Batch:
    """What a host is called with, of which some examples can be taken.

    Attributes:
        args: by position.
        kwargs: by name.
        count: how many examples this is.
        axis: on which they lie.
        several: whether a tensor with a multiple of as many rows has several for each example, as
            the patches of images have, one example after the other; whether they lie so, what the
            host puts out has to show.
        listed: whether an example is an entry of each list that has as many, and of other tensors
            what is along the axis.
        axes: by the identity of a tensor, the axis of its own, None where it has none: of
            ``[n, B, d]`` and a mask ``[B, n]``, say; empty where all have one axis.
    """

    args: tuple
    kwargs: Mapping[str, Any]
    count: int
    axis: int
    several: bool
    listed: bool = False
    axes: Mapping[int, int | None] = field(default_factory=dict)

    def of(self, rows: list[int]) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments for some of the examples."""
        return tuple(self._some(v, rows) for v in self.args), {
            name: self._some(value, rows) for name, value in self.kwargs.items()
        }

    def _some(self, value: Any, rows: list[int]) -> Any:
        def part(value: Any) -> Any:
            some = isinstance(value, list | tuple | deque)
            if self.listed and some and len(value) == self.count:
                return with_contents(value, {k: value[i] for k, i in enumerate(rows)})
            if isinstance(value, Tensor):
                return self._rows(value, rows)
            return copy.copy(value) if isinstance(value, PackedSequence | set) else NotImplemented

        return rebuilt(value, part)

    def _rows(self, value: Tensor, rows: list[int]) -> Tensor:
        axis = self.axes.get(id(value), None if self.axes else self.axis)
        times, left = 0, 0
        if axis is not None and value.dim() > axis:
            times, left = divmod(value.shape[axis], self.count)
        if axis is None or left or not times or (times > 1 and not self.several):
            return value.detach().clone()  # a state that the host may write to
        index = torch.tensor([i * times + k for i in rows for k in range(times)])
        return value.detach().index_select(axis, index.to(value.device))

    @property
    def differ(self) -> bool:
        """Whether the first example is another than the one that is put in its place."""
        _, (few, _, other) = self.thrice()
        one, another = (tensors_in(self.of(some)) for some in (few, other))
        return any(
            a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(one, another, strict=False)
        )

    def _size(self, i: int) -> list[int]:
        """Return how large the example at ``i`` is in each list of examples."""
        lists = [each for each in lists_in(self.args, self.kwargs) if len(each) == self.count]
        return [sum(t.numel() for t in tensors_in(each[i])) for each in lists]

    def thrice(self, whole: bool = False) -> tuple[int, tuple[list[int], list[int], list[int]]]:
        """Return a number of examples, and which: those, with one behind them, with another.

        Of a list they are the shortest and the longest, so that none fills the others up less.

        Args:
            whole: whether to take all of them, not only a few.
        """
        few = list(range(self.count)) if self.count > 1 else [0, 0]
        if self.listed:
            few.sort(key=self._size)
        if not whole:
            few = [*few[:2], *few[2:][-2:]] if self.listed else few[:4]
        return len(few), (few, [*few, few[0]], [few[-1], *few[1:]])


def lists_in(args: tuple, kwargs: Mapping[str, Any]) -> list[list | tuple | deque]:
    """Return the lists and tuples in the arguments."""
    values = (*args, *kwargs.values())
    kinds = list | tuple | deque
    return [each for value in values for each in walk(value) if isinstance(each, kinds)]


def batches(args: tuple, kwargs: Mapping[str, Any], count: int | None) -> Iterator[Batch]:
    """Yield the ways in which the arguments can be those of examples: as entries of a list, then
    along the axes of tensors, the likeliest first."""
    if count is not None and count in map(len, lists_in(args, kwargs)):
        yield Batch(args, kwargs, count, 0, several=False, listed=True)
    tensors = tensors_in((args, kwargs))
    for several in (False, True):
        for axis in range(2):
            sizes = [value.shape[axis] for value in tensors if value.dim() > axis]
            size = sizes[0] if sizes and count is None else count
            if size is not None and size in sizes:
                yield Batch(args, kwargs, size, axis, several)
        if count is not None and not several:
            for axes in _mixed(tensors, count):
                yield Batch(args, kwargs, count, 0, several=False, axes=axes)


def _mixed(tensors: Sequence[Tensor], count: int) -> Iterator[dict[int, int | None]]:
    """Yield the ways in which tensors have ``count`` examples on axes that are not all the same."""
    own = {id(t): [a for a, n in enumerate(t.shape[:2]) if n == count] for t in tensors}
    every = product(*((*axes, None) for axes in own.values()))
    ways = [way for way in islice(every, 3**6) if set(way) != {None}]
    # first is likelier than second, and a tensor of examples than one that all of them share
    ways.sort(key=lambda way: (way.count(1), way.count(None)))
    for way in ways[:WAYS]:
        yield dict(zip(own, way, strict=True))
