"""Modules whose constructor's signature is their configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache, wraps
from inspect import formatannotation
from types import UnionType
from typing import (
    Any,
    Literal,
    Self,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from torch import nn

from modgraft.errors import ModgraftError, UnknownNameError

REGISTRY: dict[str, type[Configured]] = {}


@dataclass_transform(eq_default=False, field_specifiers=(field,))
class Configured(nn.Module):
    """An ``nn.Module`` that declares its hyper-parameters as annotated fields.

    What is saved is derived from them: ``type(self)(**self.config())`` is a fresh equal.
    """

    def __init_subclass__(cls, *, registered: bool = True, **kwargs: Any) -> None:
        """Make a dataclass of the subclass, and remember it by name."""
        super().__init_subclass__(**kwargs)
        if registered:  # else it stands in for a class that is
            dataclass(eq=False, repr=False)(cls)
            _look_at_types(cls)
            REGISTRY[cls.__name__] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An ``nn.Module`` before any field is assigned, which a dataclass does not see to."""
        self = super().__new__(cls)
        nn.Module.__init__(self)
        return self

    def config(self) -> dict[str, Any]:
        """The constructor's arguments; ``type(self)(**self.config())`` is a fresh equal."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def extra_repr(self) -> str:  # noqa: D102
        return ", ".join(f"{k}={v!r}" for k, v in self.config().items())


def _look_at_types(cls: type) -> None:
    """Let the constructor refuse ``LoRA(rank="8")``, after what the class itself has to say of it:
    it would fail later, where nobody sees the rank any more."""
    made = cls.__init__

    @wraps(made)
    def init(self: Configured, *args: Any, **kwargs: Any) -> None:
        try:
            made(self, *args, **kwargs)
        except ModgraftError:
            raise
        except Exception as error:  # such as of "8" < 1
            if wrong := _wrong(self):
                raise ModgraftError(wrong) from error
            raise
        if wrong := _wrong(self):
            raise ModgraftError(wrong)

    cls.__init__ = init  # type: ignore[misc]


def _wrong(method: Configured) -> str | None:
    """What is wrong with the type of a field's value, None where nothing is."""
    for name, wanted in _types(type(method)).items():
        value = getattr(method, name, wanted)
        if value is not wanted and not _fits(value, wanted):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:59]}…"
            told = re.sub(r"[a-z_]+\.", "", formatannotation(wanted))
            nan = isinstance(value, float) and value != value
            found = "NaN" if nan else type(value).__name__
            return f"{type(method).__name__}({name}={shown}): {name} is {told}, not {found}"
    return None


@cache
def _types(cls: type) -> dict[str, Any]:
    """Each field's type; of none where an annotation names what cannot be seen from here."""
    try:
        hints = get_type_hints(cls)
    except NameError:
        return {}
    return {f.name: hints[f.name] for f in fields(cls)}


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of a field's type. A list may stand for a tuple, as read from JSON; which
    words a class knows is left to it."""
    kind, of = get_origin(wanted) or wanted, get_args(wanted)
    if kind is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in of)
    if kind is Literal:
        return any(isinstance(value, type(one)) for one in of)
    if kind in (int, float):
        number = isinstance(value, int if kind is int else (int, float))
        return number and not isinstance(value, bool) and value == value  # NaN is no number
    if kind is dict and of:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_fits(k, of[0]) and _fits(v, of[1]) for k, v in pairs)
    if kind in (tuple, Sequence) and of:
        several = isinstance(value, (tuple, list))
        return several and all(_fits(one, of[0]) for one in value)
    return not isinstance(kind, type) or isinstance(value, kind)


C = TypeVar("C", bound=Configured)


def resolve(name: str, kind: type[C]) -> type[C]:
    """The class called ``name``, of a kind: a computation, a router; built in or the user's own.

    Raises:
        UnknownNameError: if no such class has been defined.
    """
    found = REGISTRY.get(name)
    if found is not None and issubclass(found, kind):
        return found
    known = sorted(n for n, each in REGISTRY.items() if issubclass(each, kind) and final(each))
    what = "computation, router or aggregation" if kind is Configured else kind.__name__.lower()
    raise UnknownNameError(
        f"no {what} {name!r}; known: {', '.join(known)}. "
        f"If it is your own class, import the file that defines it first"
    )


def final(kind: type[Configured]) -> bool:
    """Whether it can be made, and is no base of others."""
    return not getattr(kind, "__abstractmethods__", None) and not kind.__subclasses__()
