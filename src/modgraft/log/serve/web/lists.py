"""The lists on the website beside hits: days, counts, notes, sources; read from the index."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from modgraft.log.serve.web.rendering import day

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modgraft.log.index.query import Hit, Owed
    from modgraft.log.log import Log
    from modgraft.log.syntax.note import Note

DATED = {
    "git": "by its commit",
    "note": "as the note says",
    "name": "by the note’s name",
    "file": "by the file’s time",
}
"""`Hit.when_from` in words."""

ELSEWHERE = 4
"""Other citations that are listed beside a source."""

LINKING = 20
"""Links from other notes that are listed beside a note."""


@dataclass(frozen=True, slots=True)
class Day:
    """A day of the timeline: its notes, each with its events in the note's order."""

    date: str
    shown: str
    dated_by: str
    notes: list[tuple[str, list[Hit]]]


def days(hits: Iterable[Hit]) -> list[Day]:
    """Group hits by day, in the order given, and by note; within a note sort by line."""
    made = []
    for when, of in groupby(hits, lambda hit: hit.when[:10]):
        day_hits = sorted(of, key=lambda hit: hit.note)
        notes = [
            (note, sorted(group, key=lambda hit: hit.line))
            for note, group in groupby(day_hits, lambda hit: hit.note)
        ]
        dated = ", ".join(sorted({DATED.get(hit.when_from, hit.when_from) for hit in day_hits}))
        made.append(Day(when, day(when), dated, notes))
    return made


def tiles(log: Log) -> list[tuple[str, str, int]]:
    """Count what is in the log; each count has the page that lists it: (path, name, count)."""
    counts = (
        ("/notes", "notes", "SELECT count(*) FROM files"),
        ("/search", "events", "SELECT count(*) FROM events"),
        ("/queue", "sources looked at",
         "SELECT count(DISTINCT key) FROM cites JOIN events ON events.id = cites.event "
         "WHERE argument AND action IN ('skim', 'read')"),
        ("/questions", "open questions",
         "SELECT count(*) FROM events WHERE action = 'question' AND status = 'open'"),
        ("/lessons", "lessons", "SELECT count(*) FROM events WHERE action = 'lesson_learned'"),
    )  # fmt: skip
    return [(path, name, log.database.rows(query)[0][0]) for path, name, query in counts]


@dataclass(frozen=True, slots=True)
class ListedNote:
    """A note in the list of notes."""

    name: str
    gist: str
    events: int
    when: str
    degraded: bool


def notes(log: Log, limit: int, offset: int) -> list[ListedNote]:
    """List notes, the newest first, each with the start of its tl;dr."""
    rows = log.database.rows(
        """SELECT note, degraded,
            (SELECT text FROM blocks WHERE blocks.file = files.id AND section = 'tl;dr'
                AND kind != 'heading' ORDER BY line LIMIT 1),
            (SELECT count(*) FROM events WHERE events.file = files.id),
            (SELECT max(at) FROM blocks WHERE blocks.file = files.id) AS newest
        FROM files ORDER BY newest DESC, note LIMIT ? OFFSET ?""",
        limit, offset,
    )  # fmt: skip
    return [
        ListedNote(note, " ".join((gist or "").split())[:240], events, when or "", bool(degraded))
        for note, degraded, gist, events, when in rows
    ]


@dataclass(frozen=True, slots=True)
class Cited:
    """A source of a note, and where else in the log it is cited."""

    key: str
    title: str
    elsewhere: list[tuple[str, int]]
    more: int


def cited(log: Log, note: Note) -> list[Cited]:
    """List the sources of a note, in the order of their first citation."""
    keys = list(dict.fromkeys(one.key for one in (*note.citations, *note.mentions)))
    marks = ", ".join("?" * len(keys))
    rows = log.database.rows(
        f"""SELECT key, note, line, count FROM (
            SELECT key, note, line, row_number() OVER (PARTITION BY key ORDER BY note, line) AS nth,
                count(*) OVER (PARTITION BY key) AS count
            FROM cites JOIN files ON files.id = cites.file WHERE key IN ({marks}) AND note != ?)
        WHERE nth <= {ELSEWHERE}""",  # noqa: S608  (a number of ours, and question marks)
        *keys, note.name,
    )  # fmt: skip
    entries = log.bibliography.entries
    return [
        Cited(
            key,
            entries[key].title if key in entries else "",
            [(name, line) for other, name, line, _ in rows if other == key],
            max((count for other, *_, count in rows if other == key), default=0) - ELSEWHERE,
        )
        for key in keys
    ]


def linking(log: Log, note: Note) -> list[tuple[str, int]]:
    """List where other notes link to this one, by its file's name or as [[name]]."""
    name = (note.name or "").rpartition("/")[2]
    stem = name.removesuffix(".md")
    return [
        (other, line)
        for other, line in log.database.rows(
            """SELECT note, line FROM blocks JOIN files ON files.id = blocks.file
            WHERE (instr(text, ?) OR instr(text, ?) OR instr(text, ?)) AND note != ?
            ORDER BY at, note, line LIMIT ?""",
            f"({name}", f"/{name}", f"[[{stem}", note.name, LINKING,
        )
    ]  # fmt: skip


def facts(log: Log, note: Note) -> list[str]:
    """Describe a note: when it was written, its lines and its events."""
    first, last = log.database.rows(
        """SELECT min(at), max(at) FROM blocks JOIN files ON files.id = blocks.file
        WHERE note = ?""", note.name,
    )[0]  # fmt: skip
    when = [day(at) for at in dict.fromkeys((first, last)) if at]
    events = len(note.events)
    return [
        *([" – ".join(dict.fromkeys(when))] if when else []),
        f"{note.lines} lines",
        f"{events} event{'s' if events != 1 else ''}",
    ]


GROUPS = {
    "full_read": "to read in full",
    "digging": "to dig deeper",
    "skimmed": "skimmed, nothing owed",
    "read": "read",
}
"""Status → the title of its group in the reading queue."""


def queue(owed: list[Owed]) -> list[tuple[str, str, list[Owed]]]:
    """Group the reading queue by status: (status, title, sources)."""
    return [
        (status, title, rows)
        for status, title in GROUPS.items()
        if (rows := [each for each in owed if each.status == status])
    ]
