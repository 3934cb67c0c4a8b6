"""The library's exceptions and warnings: each says what went wrong, where, and what to do about it.

All derive from `ModgraftError`, which is a `ValueError`; where a built-in says more (an unknown
name is a `KeyError`, a missing file a `FileNotFoundError`), the class derives from that too, so
either can be caught.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any


def an(noun: str) -> str:
    """Return a class's name with its article: ``an Adapter``, ``a LoRA``."""
    return f"{'an' if noun[:1] in 'AEIOaeio' else 'a'} {noun}"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Join names with commas; of many, the first, and count the rest."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def warn(words: str) -> None:
    """Warn of ``words``, at the line outside of libraries that has led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _room(frame.f_globals) in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(words, stacklevel=level)


_LIBRARIES = {"modgraft", "torch", "transformers", "accelerate", "contextlib", "functools"}


def _room(of: dict[str, Any]) -> str:
    return str(of.get("__name__")).partition(".")[0]


class ModgraftError(ValueError):
    """Base of every error modgraft raises on purpose."""

    def __str__(self) -> str:
        # KeyError would print its argument's repr, and OSError its errno
        return " ".join(str(arg) for arg in self.args)


class UnknownNameError(ModgraftError, KeyError):
    """A module, form, role or question id that nobody has defined."""

    @classmethod
    def among(cls, kind: str, name: object, known: Iterable[object]) -> UnknownNameError:
        """Make the error for `name`, which is no `kind`; `known` are the names that exist."""
        names = [repr(each) for each in sorted(map(str, known))]
        return cls(f"no {kind} is named {name!r}; there are: {listed(names) or 'none'}")


class ArgumentError(ModgraftError, TypeError):
    """An argument that a method has not."""


class SiteError(ModgraftError):
    """A selection of sites that matched nothing, too few or too many, or the wrong kind."""


class CompositionError(ModgraftError):
    """An expression that cannot be read, or that means nothing for the modules it names."""


class UndividedError(CompositionError):
    """Modules that differ between the examples of a batch, at a layer that runs once for all.

    Args:
        words: what is said.
        path: the layer's.
    """

    def __init__(self, words: str, path: str) -> None:
        super().__init__(words)
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.path)


class SideError(ModgraftError):
    """A side input that is missing, has the wrong shape, or reached nobody."""


class CheckpointError(ModgraftError):
    """A saved module or run that is incomplete, corrupt, or belongs to another host."""


class ContractError(ModgraftError, AssertionError):
    """A method that breaks a rule which every method keeps; see :mod:`modgraft.testing`."""


class DataError(ModgraftError):
    """Bad data: a record, image, feature or file that cannot be used as it is.

    Args:
        reason: What is wrong.
        id: The question's id, where one question is at fault.
        file: The file in which it was found.
        remedy: What the user can do about it.
    """

    def __init__(
        self,
        reason: str,
        *,
        id: str | None = None,
        file: str | Path | None = None,
        remedy: str = "",
    ) -> None:
        self.reason, self.id, self.file, self.remedy = reason, id, file, remedy
        where = [f"{file}"] if file is not None else []
        where += [f"question {id!r}"] if id is not None else []
        message = f"{', '.join(where)}: {reason}" if where else reason
        super().__init__(f"{message}. {remedy}" if remedy else message)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders (a loader's workers) by their positional arguments alone.
        make = partial(type(self), self.reason, id=self.id, file=self.file, remedy=self.remedy)
        return make, ()


class MissingFileError(DataError, FileNotFoundError):
    """A data file that is not where it should be."""
