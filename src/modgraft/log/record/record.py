"""Record by hand: start a note, add events to its Log, and collect its lessons at the end.

The Log is append-only: a new event goes to its end, under the last event or beside it, and every
byte before it stays.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modgraft.core.errors import DataError, ModgraftError
from modgraft.log.record.editing import append, create, empty, end_of, insert, rewrite, section
from modgraft.log.syntax.actions import ACTIONS, Actions
from modgraft.log.syntax.parse import parse

if TYPE_CHECKING:
    from modgraft.log.syntax.note import Event, Note

NAME = re.compile(r"\[?\s*(\w+)")
"""The start of an event, with its name."""

COPIED = {"lesson_learned": "Learned", "eureka": "Next?", "hypothesize": "Next?"}
"""Action → the section to which `finish` copies its events."""


def new_note(path: str | Path) -> Path:
    """Create a note with its six sections, and return its path.

    Raises:
        DataError: the note exists already.
    """
    path = Path(path)
    path = path if path.suffix == ".md" else path.with_name(f"{path.name}.md")
    create(path, empty().encode())
    return path


def add(
    path: str | Path,
    event: str,
    *remarks: str,
    under: int | str | None = None,
    plain: bool = False,
    actions: Actions | None = None,
) -> int:
    """Add an event at the end of a note's Log, and return its line.

    Args:
        path: the note's file.
        event: ``skim(@key) -> _digging``, with brackets or without, and any text after it.
        remarks: lines of the list below it.
        under: the line of an item of the Log to add it below, or "last" for the last event.
            Since the Log is append-only, this must be its last item or one around it. None: the
            event is not below another.
        plain: add the text as a plain line, not an event.
        actions: the table of actions; None means the built-in one.

    Raises:
        MissingFileError: there is no such note.
        DataError: it has no Log, or something in it is not closed (a code fence).
        ModgraftError: the text is no event, or not one line, or nothing can be added below `under`.
    """
    path, where = Path(path), 0
    for text in (event, *remarks):
        _one_line(text)
    said = event.strip() if plain else written(event, actions)

    def change(data: bytes) -> bytes:
        nonlocal where
        before = parse(data, str(path), actions)
        last = end_of(before, "Log")
        indent, step = _place(before, last, under)
        lines = [f"{indent}- {said}"]
        lines += [f"{indent}{step}- {remark.strip()}" for remark in remarks]
        new, where = insert(before, last, lines), last + 1
        _check(before, parse(new, str(path), actions), where, plain)
        return new

    rewrite(path, change)
    return where


def _one_line(text: str) -> None:
    """Raise an error unless the text is one line."""
    if not text.strip() or len(text.strip().splitlines()) > 1:
        raise ModgraftError(
            f"{text!r:.80}: an event is one line, and so is each remark under it; give several "
            "remarks for several lines"
        )
    if re.search(r"[\x00\ud800-\udfff]", text):  # surrogates: the shell's text was not UTF-8
        raise ModgraftError(f"{text!r:.80}: not text in UTF-8, or a NUL is in it; write it anew")


def written(text: str, actions: Actions | None = None) -> str:
    """Return an event's text in brackets, as it will stand in the note.

    Raises:
        ModgraftError: the text is no event; the error proposes an action with a similar name.
    """
    text = text.strip()
    for line in (text, f"[{text}]"):
        events = parse(f"- {line}".encode(), actions=actions).events
        if events and events[0].closed and events[0].start == 2:
            return line
    known = actions or ACTIONS
    called = NAME.match(text)
    near = known.nearest(called[1]) if called else None
    meant = f" Did you mean {near.name}?" if near is not None and called else ""
    raise ModgraftError(
        f"{text!r:.120} is no event.{meant} Write name(arguments) -> result, such as "
        f"skim(@key) -> _digging; the names are {', '.join(row.name for row in known)}. To have "
        "the line as it is: plain=True, on the command line --plain"
    )


def _place(note: Note, last: int, under: int | str | None) -> tuple[str, str]:
    """Return the indent of a new item after line `last`, and the further indent of its list."""
    first, step = section(note, "Log").line, _step(note)
    inside = [n for n, b in enumerate(note.blocks) if first < b.line <= last]
    if under is None:
        top = [n for n in inside if note.blocks[n].kind == "item" and _parent(note, n) is None]
        return (_indent(note, top[-1]) if top else ""), step
    found = _find_item(note, inside, under)
    deeper = [n for n in inside if _parent(note, n) == found]
    return (_indent(note, deeper[-1]) if deeper else _indent(note, found) + step), step


def _find_item(note: Note, inside: list[int], under: int | str) -> int:
    """Find the item that `under` refers to, as an index of the blocks."""
    still: list[int] = []  # the items around the Log's last block, the innermost first
    at = inside[-1] if inside else None
    while at is not None:
        if note.blocks[at].kind == "item":
            still.append(at)
        at = note.blocks[at].parent
    events = {event.block for event in note.events}
    meant = [n for n in still if (n in events if under == "last" else note.blocks[n].line == under)]
    if meant:
        return meant[0]
    lines = ", ".join(str(note.blocks[n].line) for n in still) or "none: the Log is empty"
    what = "the last event" if under == "last" else f"line {under}"
    raise ModgraftError(
        f"{note.name}: nothing can be added under {what}, for the Log is append-only; what can be "
        f"expanded are the lines {lines}"
    )


def _parent(note: Note, block: int) -> int | None:
    """Return the innermost item around a block; None without one."""
    at = note.blocks[block].parent
    while at is not None and note.blocks[at].kind != "item":
        at = note.blocks[at].parent
    return at


def _step(note: Note) -> str:
    """Return the note's most frequent indent of a list below an item."""
    steps: Counter[int] = Counter()
    for n, block in enumerate(note.blocks):
        if block.kind == "item" and (above := _parent(note, n)) is not None:
            steps[len(_indent(note, n)) - len(_indent(note, above))] += 1
    usual = steps.most_common(1)
    return " " * (usual[0][0] if usual and usual[0][0] > 0 else 2)


def _indent(note: Note, block: int) -> str:
    line = note.line(note.blocks[block].line)
    return line[: len(line) - len(line.lstrip(" \t"))]


def _check(before: Note, after: Note, where: int, plain: bool) -> None:
    """Raise an error unless the new line is parsed as intended and the old ones as before."""
    new = [e for e in after.events if e.line == where]
    item = any(b.line == where and b.kind == "item" for b in after.blocks)
    old = [(e.action, e.line) for e in after.events if e.line < where]
    kept = [(e.action, e.line) for e in before.events if e.line < where]
    if old == kept and item and (plain or (new and new[0].closed and new[0].section == "Log")):
        return
    raise DataError(
        f"what is added at line {where} would not be read as an event: something before it is "
        "still open, such as a code fence", file=before.name,
        remedy="modgraft log check says where; close it first",
    )  # fmt: skip


# -- at the end --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finished:
    """How many events `finish` copied to each section."""

    learned: int
    next: int


def finish(path: str | Path, actions: Actions | None = None) -> Finished:
    """Copy the Log's lessons to Learned and its ideas to Next?; the Log is not changed.

    An event that already stands outside the Log is not copied again, so this may be done at any
    time and repeatedly. Events are compared by their text or, without any (``[lesson_learned]``),
    by the first line below them.

    Raises:
        MissingFileError: there is no such note.
        DataError: one of the sections is missing.
    """
    path, count = Path(path), Counter[str]()

    def change(data: bytes) -> bytes:
        note = parse(data, str(path), actions)
        count.clear()
        known = [_identity(e) for e in note.events if e.section != "Log"]
        for event in note.events:
            target = COPIED.get(event.action)
            if target is None or event.section != "Log" or _identity(event) in known:
                continue
            known.append(_identity(event))
            count[target] += 1
            data = append(data, target, _copy(note, event), str(path))
        return data

    rewrite(path, change)
    return Finished(count["Learned"], count["Next?"])


def _identity(event: Event) -> tuple[str, ...]:
    """Return the words by which events are compared."""
    said = event.result or event.arguments
    body = event.body.strip().splitlines()
    text = said or (body[0].lstrip(" \t-*+") if body else "")
    return event.action, " ".join(text.split())


def _copy(note: Note, event: Event) -> list[str]:
    """Return the lines of an event with the list below it, moved to the margin.

    An event that shares its item with other words or events is copied alone.
    """
    own = note.data[event.start : event.end].decode("utf-8", "replace")
    before = note.data[note.line_range(event.line)[0] : event.start].decode("utf-8", "replace")
    alone = sum(e.block == event.block for e in note.events) == 1
    if not alone or not re.fullmatch(r"\s*([-*+]|\d+[.)])\s+", before):
        return [f"- {' '.join(own.split())}"]
    margin = len(before) - len(before.lstrip(" \t"))
    lines = [note.line(n) for n in range(event.line, event.end_line + 1)]
    return [line[min(margin, len(line) - len(line.lstrip(" \t"))) :].rstrip() for line in lines]
