"""The formats there are, by name: each is a folder here that recognises, reads and writes.

Its ``read.py`` defines ``holds`` and ``read``, and its ``write.py`` ``write``, as :class:`Format`
describes them. Whatever stands in a folder and is not understood is refused, and so is what cannot
be written: nothing is left out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from modgraft.core.errors import CheckpointError, ModgraftError, warn
from modgraft.core.files import finish
from modgraft.core.plain import full_name, plain, plain_name
from modgraft.core.sites import located
from modgraft.engine.implant import Implant, check_name, learning_parts
from modgraft.store.formats.heads import head_weights
from modgraft.store.stored import Stored
from modgraft.training.host_like import HostLike

NAMES: tuple[str, ...] = ("peft", "adapterhub")
"""The formats, each the name of a folder here."""


@dataclass(frozen=True)
class Format:
    """What a format's folder defines.

    ``read`` and ``write`` are given the model without what torch has wrapped around it and its
    layers, so that a file names the layers of the plain model.

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

    def read(folder: Path, model: nn.Module) -> Stored:
        before = _stamps(folder)
        found = reader.read(folder, plain(model))
        if _stamps(folder) != before:  # its files may be of two saves
            raise CheckpointError(f"{folder} was written to while it was read; load it again")
        if lacking := head_weights(plain(model)) - set(found.card.beside):
            warn(
                f"{folder} does not hold {', '.join(sorted(lacking))}, and nothing tells what they "
                f"were where it was trained: in this host they stay as they are (a head that "
                f"from_pretrained made anew answers at random)",
            )
        return _for_wrapped(found, model)

    def write(host: HostLike, names: Sequence[str], folder: Path) -> None:
        is_plain = plain(host.model) is host.model
        unwrapped: Any = host if is_plain else _Unwrapped(host)
        writer.write(unwrapped, names, folder)
        kept = {n for name in names for n in unwrapped._implants[name].beside}
        if lacking := head_weights(unwrapped.model) - kept - learning_parts(unwrapped.model):
            layers = sorted({f"host.{name.rpartition('.')[0]}" for name in lacking})
            warn(
                f"{', '.join(sorted(lacking))} of this host did not train with {', '.join(names)}, "
                f"so that {folder} is without, and this format keeps nothing that tells one head "
                f"from another: give the host away too, or train the head as well: "
                f"host.fit(…, train={[names[0], *layers]})",
            )

    return Format(reader.holds, read, write)


def _stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return what tells whether the files of JSON are those that were there."""
    found = {}
    for path in folder.glob("*.json"):
        with suppress(FileNotFoundError):  # removed since it was listed
            found[path] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


class _Unwrapped:
    """What ``write`` needs of a host: its model without wrappers, and modules that name it so."""

    def __init__(self, host: HostLike) -> None:
        self.model = plain(host.model)
        self._implants = {n: self._named(i, host.model) for n, i in host._implants.items()}

    def _named(self, implant: Implant, model: nn.Module) -> Implant:
        named = copy.copy(implant)
        named.paths = tuple(plain_name(model, path) for path in implant.paths)
        named.beside = frozenset(plain_name(model, name) for name in implant.beside)
        return named


def _for_wrapped(found: Stored, model: nn.Module) -> Stored:
    """Name what was found in a folder as this model does, which may be wrapped."""
    if plain(model) is model:
        return found

    def label(site: str) -> str:
        return located(model, [full_name(model, site)])[0].label

    return found.named(label, lambda name: full_name(model, name))


def found_in(folder: Path) -> Format | None:
    """Return the format of a folder, None where it is none of these.

    What a process that was killed had written to it is moved to its places.

    Raises:
        ModgraftError: where that cannot be done, or another process is at it.
    """
    finish(folder)
    return next((one for name in NAMES if (one := named(name)).holds(folder)), None)
