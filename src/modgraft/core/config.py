"""Modules whose constructor's signature is their configuration."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from functools import cache, wraps
from typing import Any, Self, TypeVar, dataclass_transform, get_type_hints

from torch import nn

import modgraft
from modgraft.core.errors import ModgraftError, UnknownNameError
from modgraft.core.typed import mismatch

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

    def brief(self) -> str:
        """The shortest call that makes an equal: only the arguments that are not the defaults."""
        parts = []
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            if each.default is MISSING or value != each.default:
                shown = value.brief() if isinstance(value, Configured) else repr(value)
                parts.append(f"{each.name}={shown}")
        return f"{type(self).__name__}({', '.join(parts)})"

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
    types = _types(type(method))
    values = {name: getattr(method, name) for name in types if hasattr(method, name)}
    found = mismatch(values, types)
    return None if found is None else f"{type(method).__name__}({found[0]}): {found[1]}"


@cache
def _types(cls: type) -> dict[str, Any]:
    """Each field's type; of none where an annotation names what cannot be seen from here."""
    try:
        hints = get_type_hints(cls)
    except NameError:
        return {}
    return {f.name: hints[f.name] for f in fields(cls)}


C = TypeVar("C", bound=Configured)


def resolve(name: str, kind: type[C]) -> type[C]:
    """The class called ``name``, of a kind: a computation, a router; built in or the user's own.

    Raises:
        UnknownNameError: if no such class has been defined.
    """
    if name not in REGISTRY:  # a public class is defined when it is first asked for
        for public in dir(modgraft):
            getattr(modgraft, public)
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
