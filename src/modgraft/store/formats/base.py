"""The formats there are, by name: each is a folder here that recognises, reads and writes.

Its ``read.py`` defines ``holds`` and ``read``, and its ``write.py`` ``write``, as :class:`Format`
describes them. Whatever stands in a folder and is not understood is refused, and so is what cannot
be written: nothing is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from torch import nn

from modgraft.core.errors import ModgraftError
from modgraft.engine.implant import check_name
from modgraft.store.stored import Stored
from modgraft.training.host_like import HostLike

NAMES: tuple[str, ...] = ("peft", "adapterhub")
"""The formats, each the name of a folder here."""


@dataclass(frozen=True)
class Format:
    """What a format's folder defines.

    Attributes:
        holds: whether a folder looks like one of this format.
        read: reads the modules in a folder, for a host's model, or raises a CheckpointError: for a
            damaged folder, or one that holds what is not understood.
        write: writes modules of a host to a folder, or raises a ModgraftError: for what the format
            has no place for.
    """

    holds: Callable[[Path], bool]
    read: Callable[[Path, nn.Module], Stored]
    write: Callable[[HostLike, Sequence[str], Path], None]


def module_name(text: str, default: str) -> str:
    """Return what a module can be called, of what another tool calls it: ``my-task``, my_task."""
    name = re.sub(r"\W", "_", text)
    try:
        check_name(name)
    except ModgraftError:
        return default
    return name


def named(name: str) -> Format:
    """Return a format by its name.

    Raises:
        ModgraftError: for another name.
    """
    if name not in NAMES:
        known = ", ".join(("modgraft", *NAMES))
        raise ModgraftError(f"format={name!r}: there are {known}")
    reader, writer = (import_module(f"{__package__}.{name}.{part}") for part in ("read", "write"))
    return Format(reader.holds, reader.read, writer.write)


def found_in(folder: Path) -> Format | None:
    """Return the format of a folder, None where it is none of these."""
    return next((one for name in NAMES if (one := named(name)).holds(folder)), None)
