"""Modules whose constructor's signature is their configuration, with their values checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, wraps
from inspect import formatannotation, signature
from types import FunctionType, UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import nn

import modgraft  # for its list of public names: what is asked for of it is imported then
from modgraft.core.errors import ArgumentError, ModgraftError, UnknownNameError

_LARGEST = torch.finfo(torch.float32).max

REGISTRY: dict[str, type[Configured]] = {}


@dataclass_transform(eq_default=False, field_specifiers=(field,))
class Configured(nn.Module):
    """An ``nn.Module`` that declares its hyper-parameters as annotated fields.

    What is saved is derived from them: ``type(self)(**self.config())`` is a fresh equal.
    """

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former names of hooks; a subclass that defines one is refused: nothing would call it."""

    def __init_subclass__(cls, *, registered: bool = True, **kwargs: Any) -> None:
        """Make a dataclass of the subclass, and remember it by name."""
        super().__init_subclass__(**kwargs)
        if registered:  # not a stand-in for a class that is
            _check_names(cls)
            dataclass(eq=False, repr=False)(cls)
            _check_types(cls)
            REGISTRY[cls.__name__] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Initialise the ``nn.Module`` first: a dataclass's ``__init__`` only assigns fields."""
        self = super().__new__(cls)
        nn.Module.__init__(self)
        return self

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments; ``type(self)(**self.config())`` is a fresh equal."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def brief(self) -> str:
        """Return the shortest call that makes an equal: only the arguments that are not the
        defaults."""
        parts = []
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if each.default is MISSING or value != each.default:
                shown = value.brief() if isinstance(value, Configured) else repr(value)
                parts.append(f"{each.name}={shown}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def extra_repr(self) -> str:  # noqa: D102
        return ", ".join(f"{k}={v!r}" for k, v in self.config().items())


def _check_names(cls: type[Configured]) -> None:
    """Refuse a class that defines a hook by its former name, or a field that would hide a hook.

    Raises:
        ModgraftError: with the hook's name.
    """
    annotated = vars(cls).get("__annotations__", {})
    own_fields = [name for name, kind in annotated.items() if "ClassVar" not in str(kind)]
    for name in vars(cls).keys() - annotated.keys():
        if name in cls.renamed:
            raise ModgraftError(
                f"{cls.__name__}.{name}: nothing calls a hook of this name; it is "
                f"{cls.renamed[name]} now"
            )
    for base in cls.__mro__[1:]:
        for name in own_fields:
            hook = vars(base).get(name)
            if issubclass(base, Configured) and isinstance(hook, property | FunctionType):
                raise ModgraftError(
                    f"{cls.__name__}.{name}: a field of this name hides the hook "
                    f"{base.__name__}.{name}; call it otherwise, such as {name}_"
                )


def _check_types(cls: type) -> None:
    """Make the constructor refuse ``LoRA(rank="8")``, which would fail later and far away.

    An error that the class itself raises for the value goes first.
    """
    construct = cls.__init__

    @wraps(construct)
    def init(self: Configured, *args: Any, **kwargs: Any) -> None:
        try:
            construct(self, *args, **kwargs)
        except ModgraftError:
            raise
        except Exception as error:  # such as of "8" < 1
            if wrong := _wrong(self):
                raise ModgraftError(wrong) from error
            known = signature(type(self)).parameters
            if others := [repr(name) for name in kwargs if name not in known]:
                raise ArgumentError(
                    f"{type(self).__name__} got an unexpected keyword argument {others[0]}; it has "
                    f"{', '.join(known) or 'none'}"
                ) from error
            raise
        if wrong := _wrong(self):
            raise ModgraftError(wrong)

    cls.__init__ = init  # type: ignore[misc]


def _wrong(method: Configured) -> str | None:
    """Return what is wrong with the type of a field's value, None where nothing is."""
    types = _types(type(method))
    values = {name: getattr(method, name) for name in types if hasattr(method, name)}
    found = mismatch(values, types)
    return None if found is None else f"{type(method).__name__}({found[0]}): {found[1]}"


@cache
def _types(cls: type) -> dict[str, Any]:
    """Return each field's type; empty where an annotation's name cannot be resolved from here."""
    try:
        hints = get_type_hints(cls)
    except NameError:
        return {}
    return {f.name: hints[f.name] for f in fields(cls)}


C = TypeVar("C", bound=Configured)


def resolve(name: str, kind: type[C]) -> type[C]:
    """Find a class by its name: a built-in one, or a user's that has been imported.

    Args:
        name: of the class.
        kind: the base class it must have, ``Computation`` or ``Router``.

    Raises:
        UnknownNameError: if no such class has been defined.
    """
    found = public(name) or REGISTRY.get(name)
    if found is not None and issubclass(found, kind):
        return found
    every = {n: each for n in dir(modgraft) if (each := public(n))}
    known = sorted(
        n for n, each in (REGISTRY | every).items() if issubclass(each, kind) and final(each)
    )
    what = "computation, router or aggregation" if kind is Configured else kind.__name__.lower()
    raise UnknownNameError(
        f"no {what} {name!r}; known: {', '.join(known)}. "
        f"If it is your own class, import the file that defines it first"
    )


def public(name: str) -> type[Configured] | None:
    """Return the class of this name in the library; None where it has none.

    It is so whatever a user's class is called, and whichever of them was defined last.
    """
    found = getattr(modgraft, name) if name in dir(modgraft) else None
    return found if isinstance(found, type) and issubclass(found, Configured) else None


def final(kind: type[Configured]) -> bool:
    """Return whether the class can be instantiated and is no base class of a registered one."""
    abstract = getattr(kind, "__abstractmethods__", None)
    return not abstract and set(REGISTRY.values()).isdisjoint(kind.__subclasses__())


def mismatch(values: Mapping[str, Any], types: Mapping[str, Any]) -> tuple[str, str] | None:
    """Find the first value that is not of its type: ``("rank='8'", "rank is int, not str")``.

    Args:
        values: by name.
        types: by name, as ``typing.get_type_hints`` gives them; a value without one is not checked.
    """
    for name, value in values.items():
        if name in types and not _fits(value, types[name]):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:59]}…"
            wanted = re.sub(r"[a-z_]+\.", "", formatannotation(types[name]))
            found = type(value).__name__
            if isinstance(value, float) and not abs(value) <= _LARGEST:
                found = "NaN" if value != value else "infinite as a float32"
            return f"{name}={shown}", f"{name} is {wanted}, not {found}"
    return None


def _fits(value: Any, wanted: Any) -> bool:
    """Return whether a value is of a field's type.

    A list may stand for a tuple, as JSON has it; of a ``Literal`` only the type is compared, since
    the class itself says which words it knows.
    """
    kind, inner = get_origin(wanted) or wanted, get_args(wanted)
    if kind is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is Literal:
        return any(isinstance(value, type(one)) for one in inner)
    if kind in (int, float):
        number = isinstance(value, int if kind is int else (int, float))
        # NaN is no number, and what is infinite as a float32 makes one
        return number and not isinstance(value, bool) and (kind is int or abs(value) <= _LARGEST)
    if kind is dict and inner:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in pairs)
    if kind in (tuple, Sequence) and inner:
        several = isinstance(value, (tuple, list))
        return several and all(_fits(one, inner[0]) for one in value)
    return not isinstance(kind, type) or isinstance(value, kind)
