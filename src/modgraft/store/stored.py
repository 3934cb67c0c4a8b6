"""Modules as a folder holds them, in any format, not yet in a host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from modgraft.store.card import Card
from modgraft.store.file import Entry


@dataclass(frozen=True)
class Stored:
    """What a folder holds.

    Attributes:
        folder: where.
        card: what they are.
        entries: returns type and shape of each tensor, by its name; they are not kept while
            modules wait for their first use.
        read: reads all tensors, and verifies them: ``<module>:<site>:<name>``, and ``:<name>`` for
            weights of the host that trained with the modules.
        stem: what all names begin with where one module of another tool is several here, as
            ``qa`` and ``qa_input``; "" where each has its own.
    """

    folder: Path
    card: Card
    entries: Callable[[], Mapping[str, Entry]]
    read: Callable[[], Mapping[str, Tensor]]
    stem: str = ""
