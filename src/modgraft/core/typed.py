"""Whether values are of the types that a signature says, told before they fail somewhere inside."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from inspect import formatannotation
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def mismatch(values: Mapping[str, Any], types: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first value that is not of its type: ``rank='8'``, and ``rank is int, not str``.

    Args:
        values: by name.
        types: by name, as ``typing.get_type_hints`` gives them; what has none is not looked at.
    """
    for name, value in values.items():
        if name in types and not fits(value, types[name]):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:59]}…"
            wanted = re.sub(r"[a-z_]+\.", "", formatannotation(types[name]))
            nan = isinstance(value, float) and value != value
            found = "NaN" if nan else type(value).__name__
            return f"{name}={shown}", f"{name} is {wanted}, not {found}"
    return None


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of a field's type. A list may stand for a tuple, as read from JSON; which
    words a class knows is left to it."""
    kind, of = get_origin(wanted) or wanted, get_args(wanted)
    if kind is Any:
        return True
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in of)
    if kind is Literal:
        return any(isinstance(value, type(one)) for one in of)
    if kind in (int, float):
        number = isinstance(value, int if kind is int else (int, float))
        return number and not isinstance(value, bool) and value == value  # NaN is no number
    if kind is dict and of:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(fits(k, of[0]) and fits(v, of[1]) for k, v in pairs)
    if kind in (tuple, Sequence) and of:
        several = isinstance(value, (tuple, list))
        return several and all(fits(one, of[0]) for one in value)
    return not isinstance(kind, type) or isinstance(value, kind)
