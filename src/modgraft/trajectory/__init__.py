"""modgraft.trajectory: the research log, recorded, checked and asked.

The public names are imported when they are first used; none of them needs torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modgraft.trajectory.actions import Action, Actions
    from modgraft.trajectory.answer import Answer, Evidence
    from modgraft.trajectory.bibliography import Bibliography, Entry
    from modgraft.trajectory.indexing import Indexed
    from modgraft.trajectory.log import Log
    from modgraft.trajectory.note import (
        Block,
        Citation,
        Code,
        Diagnostic,
        Event,
        Figure,
        Fix,
        Link,
        Note,
        Quote,
        Section,
        Span,
    )
    from modgraft.trajectory.query import Hit, Owed, Query
    from modgraft.trajectory.record import add, finish, new_note
    from modgraft.trajectory.runs import write_run
    from modgraft.trajectory.scanner import parse

__all__ = [
    "Action",
    "Actions",
    "Answer",
    "Bibliography",
    "Block",
    "Citation",
    "Code",
    "Diagnostic",
    "Entry",
    "Event",
    "Evidence",
    "Figure",
    "Fix",
    "Hit",
    "Indexed",
    "Link",
    "Log",
    "Note",
    "Owed",
    "Query",
    "Quote",
    "Section",
    "Span",
    "add",
    "finish",
    "new_note",
    "parse",
    "write_run",
]

_HOMES = {
    "actions": ("Action", "Actions"),
    "answer": ("Answer", "Evidence"),
    "bibliography": ("Bibliography", "Entry"),
    "indexing": ("Indexed",),
    "log": ("Log",),
    "note": (
        "Block",
        "Citation",
        "Code",
        "Diagnostic",
        "Event",
        "Figure",
        "Fix",
        "Link",
        "Note",
        "Quote",
        "Section",
        "Span",
    ),
    "query": ("Hit", "Owed", "Query"),
    "record": ("add", "finish", "new_note"),
    "runs": ("write_run",),
    "scanner": ("parse",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'modgraft.trajectory' has no attribute {name!r}")
    value = getattr(import_module(f"modgraft.trajectory.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
