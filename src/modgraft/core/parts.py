"""One part of a fused projection's rows, such as the queries of a layer that makes q, k and v.

``[0/3]`` is the first of three equal parts. With grouped queries the parts differ: ``[0:4/6]`` is
the first four of six units (heads), ``[4/6]`` the fifth. Where each head has its own query, key and
value side by side, ``[0/3x8]`` is the first third of each of eight groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modgraft.core.errors import SiteError

_WRITTEN = re.compile(r"(.*)\[(\d+)(?::(\d+))?/(\d+)(?:x(\d+))?\]")


@dataclass(frozen=True, order=True)
class Part:
    """A part of a fused projection, such as the query's rows where one layer makes q, k and v.

    In each of ``groups`` equal groups of rows, the units ``first`` to ``end`` of ``count`` equal
    ones.

    Attributes:
        first: the first unit, from 0.
        end: the one after the last.
        count: how many units a group has.
        groups: how many groups there are.
    """

    first: int
    end: int
    count: int
    groups: int = 1

    @property
    def pieces(self) -> int:
        """How many units there are in all groups."""
        return self.count * self.groups

    def __str__(self) -> str:
        units = f"{self.first}" if self.end == self.first + 1 else f"{self.first}:{self.end}"
        return f"[{units}/{self.count}{f'x{self.groups}' if self.groups > 1 else ''}]"

    def size(self, whole: int) -> int:
        """Return how many of ``whole`` rows belong to it."""
        return whole // self.count * (self.end - self.first)

    def take(self, value: Tensor, axis: int) -> Tensor:
        """Return its share of ``value`` along ``axis``, counted from the end."""
        grouped = value.unflatten(axis, (self.groups, -1)) if self.groups > 1 else value
        unit = grouped.shape[axis] // self.count
        own = grouped.narrow(axis, self.first * unit, (self.end - self.first) * unit)
        return own.flatten(axis - 1, axis) if self.groups > 1 else own

    def padded(self, own: Tensor, axis: int) -> Tensor:
        """Return ``own``, its share along ``axis`` (from the end), among zeros for all others."""
        grouped = own.unflatten(axis, (self.groups, -1))
        unit = grouped.shape[axis] // (self.end - self.first)
        around = self.first * unit, (self.count - self.end) * unit
        return F.pad(grouped, (*[0, 0] * (-1 - axis), *around)).flatten(axis - 1, axis)

    def replaced(self, y: Tensor, axis: int, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``y`` with its share along ``axis``, counted from the end, changed."""
        own = change(self.take(y, axis))
        grouped = y.unflatten(axis, (self.groups, -1)) if self.groups > 1 else y
        unit, length = grouped.shape[axis] // self.count, grouped.shape[axis]
        if self.groups > 1:
            own = own.unflatten(axis, (self.groups, -1))
        before = grouped.narrow(axis, 0, self.first * unit)
        after = grouped.narrow(axis, self.end * unit, length - self.end * unit)
        whole = torch.cat([before, own, after], axis)
        return whole.flatten(axis - 1, axis) if self.groups > 1 else whole


def share(value: Tensor, part: Part | None, axis: int) -> Tensor:
    """Return the share of ``part`` along ``axis``, counted from the end; all where it is None."""
    return value if part is None else part.take(value, axis)


def split_part(selection: str) -> tuple[str, Part | None]:
    """Split ``"c_attn[0/3]"`` into the layer and its part; None where no part is written.

    Raises:
        SiteError: for a part that is not there.
    """
    written = _WRITTEN.fullmatch(selection)
    if written is None:
        return selection, None
    layer, first, end, count, groups = written.groups()
    units = int(first), int(end or int(first) + 1), int(count)
    if not units[0] < units[1] <= units[2] or groups == "0":
        last = f"; the last is {layer}[{units[2] - 1}/{count}]" if units[2] else ""
        raise SiteError(f"{selection!r}: the {count} parts count from 0{last}")
    return layer, Part(*units, int(groups or 1))
