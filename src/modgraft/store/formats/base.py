"""What a format of another tool is, and which there are.

Each is a file beside this one with three functions, as :class:`Format` describes them. Whatever
stands in a folder and is not understood is refused, and so is what cannot be written: nothing is
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from torch import nn

from modgraft.core.errors import ModgraftError
from modgraft.store.stored import Stored
from modgraft.training.host_like import HostLike

NAMES: tuple[str, ...] = ("peft", "adapterhub")
"""The formats, each the name of a file beside this one."""


class Format(Protocol):
    """What a format's file defines."""

    def holds(self, folder: Path) -> bool:
        """Return whether a folder looks like one of this format."""
        ...

    def read(self, folder: Path, model: nn.Module) -> Stored:
        """Read the modules in a folder, for a host's model; see :class:`Stored`.

        Raises:
            CheckpointError: for a damaged folder, or one that holds what is not understood.
        """
        ...

    def write(self, host: HostLike, names: Sequence[str], folder: Path) -> None:
        """Write modules of a host to a folder.

        Raises:
            ModgraftError: for what the format has no place for.
        """
        ...


def named(name: str) -> Format:
    """Return a format by its name.

    Raises:
        ModgraftError: for another name.
    """
    if name not in NAMES:
        known = ", ".join(("modgraft", *NAMES))
        raise ModgraftError(f"format={name!r}: there are {known}")
    return cast(Format, import_module(f"{__package__}.{name}"))


def found_in(folder: Path) -> Format | None:
    """Return the format of a folder, None where it is none of these."""
    return next((one for name in NAMES if (one := named(name)).holds(folder)), None)
