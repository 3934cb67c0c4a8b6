"""Join and match dotted paths: ``*`` is anything, or a layer number, and ``{a,b}`` is either.

A path is read once from left to right, with the set of all places that a match of what came before
may end at. No pattern takes longer than its length times the path's.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import takewhile

from torch import nn

from modgraft.core.errors import SiteError

Item = str | None | list  # a text, None for a star, or alternatives, each a list of items


class Pattern:
    """A pattern of paths.

    Args:
        text: the pattern.
        numbers: whether ``*`` is one or more digits instead of anything.

    Raises:
        SiteError: for a brace that is opened and not closed.
    """

    def __init__(self, text: str, numbers: bool = False) -> None:
        open_groups: list[list[list[Item]]] = [[[]]]  # the alternatives of each, the last unread
        for char in text:
            here = open_groups[-1][-1]
            if char == "{":
                open_groups.append([[]])
            elif char == "," and len(open_groups) > 1:
                open_groups[-1].append([])
            elif char == "}" and len(open_groups) > 1:
                group = open_groups.pop()
                open_groups[-1][-1].append(group)
            elif char == "*":
                if not here or here[-1] is not None:  # two stars in a row are one
                    here.append(None)
            elif here and isinstance(here[-1], str):
                here[-1] += char
            else:
                here.append(char)
        if len(open_groups) > 1:
            raise SiteError(f"the pattern {text!r} opens a brace it does not close")
        self._items = open_groups[0][0]
        self._numbers = numbers
        ends = (self._items[0], self._items[-1]) if self._items else ("", "")
        self._first, self._last = (end if isinstance(end, str) else "" for end in ends)

    def matches(self, path: str) -> bool:
        """Return whether the whole of ``path`` matches."""
        if not (path.startswith(self._first) and path.endswith(self._last)):  # most, at once
            return False
        return len(path) in self._ends(self._items, path, {0})

    def _ends(self, items: list[Item], path: str, starts: set[int]) -> set[int]:
        """Return where a match of ``items`` that begins at one of ``starts`` can end."""
        for item in items:
            if not starts:
                break
            if isinstance(item, str):
                starts = {at + len(item) for at in starts if path.startswith(item, at)}
            elif item is not None:
                starts = {end for way in item for end in self._ends(way, path, starts)}
            elif self._numbers:
                starts = {end for at in starts for end in _digits(path, at)}
            else:
                starts = set(range(min(starts), len(path) + 1))
        return starts


@lru_cache(maxsize=256)
def pattern(text: str, numbers: bool = False) -> Pattern:
    """Return a :class:`Pattern`, read once."""
    return Pattern(text, numbers)


def _digits(path: str, start: int) -> range:
    """Return where a number that begins at ``start`` can end."""
    count = sum(1 for _ in takewhile(str.isdigit, path[start:]))
    return range(start + 1, start + count + 1)


def starred(path: str) -> str:
    """Replace the numbers in a path by ``*``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""The names under which layers stand in what torch wraps around them."""


def wraps(module: nn.Module) -> bool:
    """Return whether ``module`` is a wrapper of torch around one layer."""
    return not WRAPPERS.isdisjoint(module._modules.keys())


@lru_cache(2**16)
def bare(path: str) -> str:
    """Return a path without the wrappers in it."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def joined(path: str, name: str) -> str:
    """Join two parts of a dotted path, of which either may be empty."""
    return f"{path}.{name}" if path and name else path or name
