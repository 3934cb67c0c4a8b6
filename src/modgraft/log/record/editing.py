"""Lines put into a note's sections; every byte that was there stays where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modgraft.core.errors import DataError
from modgraft.log.syntax.parse import parse

if TYPE_CHECKING:
    from modgraft.log.syntax.note import Note, Section

SECTIONS = ("tl;dr", "Context", "Done", "Learned", "Next?", "Log")
"""The sections of a note, in their order."""


def empty() -> str:
    """A note in which nothing has happened yet."""
    return "\n".join(f"## {title}\n" for title in SECTIONS)


def section(note: Note, title: str) -> Section:
    """The first section of that title.

    Raises:
        DataError: the note has none.
    """
    for found in note.sections:
        if found.title.strip().lower() == title.lower():
            return found
    raise DataError(
        f"the note has no section '## {title}'", file=note.name,
        remedy=f"Add the line '## {title}' where it is to stand",
    )  # fmt: skip


def end_of(note: Note, title: str) -> int:
    """The last line of a section that is not blank; its heading where there is no other."""
    found = section(note, title)
    at = found.end_line
    while at > found.line and not note.line(at).strip():
        at -= 1
    return at


def append(data: bytes, title: str, lines: Sequence[str], name: str | None = None) -> bytes:
    """The note with these lines at the end of a section, before the blank lines that end it."""
    note = parse(data, name)
    return insert(note, end_of(note, title), lines)


def insert(note: Note, after: int, lines: Sequence[str]) -> bytes:
    """The note with these lines after line `after`, ending as its others do."""
    at = note.line_range(after)[1]
    before, rest, end = note.data[:at], note.data[at:], _ending(note.data)
    if not before.endswith((b"\n", b"\r")):
        before += end
    new = b"".join(line.encode() + end for line in lines)
    if rest.startswith(b"#"):  # a heading keeps its distance
        new += end
    return before + new + rest


def replace(note: Note, line: int, text: str) -> bytes:
    """The note with one line replaced, its ending kept."""
    start, end = note.line_range(line)
    old = note.data[start:end]
    kept = old[len(old.rstrip(b"\r\n")) :]
    return note.data[:start] + text.encode() + kept + note.data[end:]


def _ending(data: bytes) -> bytes:
    return b"\r\n" if data.count(b"\r\n") * 2 > data.count(b"\n") else b"\n"
