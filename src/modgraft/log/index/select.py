"""Translate a query to SQL over the index."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modgraft.core.errors import ModgraftError, UnknownNameError
from modgraft.log.index.query import Hit, Query
from modgraft.log.index.rows import searchable
from modgraft.log.index.times import span

if TYPE_CHECKING:
    from modgraft.log.index.database import Database
    from modgraft.log.syntax.actions import Actions

_WORDS = re.compile(r'"([^"]*)"|(\S+)')
_ALNUM = re.compile(r"[^\W_]+")
READING_STATUSES = ("skimmed", "digging", "full_read", "read")
"""How far a source was read, from the least to the most."""
STATUSES = (*READING_STATUSES, "open", "answered")

EVENT_COLUMNS = (
    "files.note, files.path, files.digest, events.line, events.end_line, action, arguments, result,"
    " status, events.at, events.at_from, events.keys, events.about, events.section, events.line"
)
BLOCK_COLUMNS = (
    "files.note, files.path, files.digest, blocks.line, blocks.end_line, events.action, "
    "events.arguments, events.result, events.status, blocks.at, blocks.at_from, events.keys, "
    "events.about, blocks.section, events.line"
)


@dataclass(frozen=True, slots=True)
class Row:
    """A selected row, before its text is read from the file."""

    path: str
    digest: bytes
    hit: Hit


def row(values: tuple[Any, ...], score: float = 0.0) -> Row:
    """Build a row from the values of ``EVENT_COLUMNS`` or ``BLOCK_COLUMNS``."""
    note, path, digest, line, end, action, arguments, result, status, at, at_from = values[:11]
    keys, about, section, event_line = values[11:]
    hit = Hit(
        note, line, end, action or "", arguments, result, status or "", "", at, at_from,
        tuple((keys or "").split()), about or 0, score, section or "", event_line,
    )  # fmt: skip
    return Row(path, digest, hit)


def blocks(database: Database, where: str, *values: Any) -> list[Row]:
    """Select blocks by a condition on ``blocks`` and ``files``, in order of time and place."""
    statement = (
        f"SELECT {BLOCK_COLUMNS} FROM blocks JOIN files ON files.id = blocks.file "  # noqa: S608
        f"LEFT JOIN events ON events.id = blocks.event WHERE {where} "
        "ORDER BY blocks.at, files.note, blocks.line"
    )
    return [row(r) for r in database.rows(statement, *values)]


def match_expression(text: str) -> str:
    """Translate words and "phrases" to an FTS5 expression in which all must occur.

    Raises:
        ModgraftError: if there is no word in it.
    """
    terms = []
    for phrase, word in _WORDS.findall(searchable(text)):
        parts = _ALNUM.findall(phrase or word)
        if parts:
            terms.append('"' + " ".join(parts) + '"')
    if not terms:
        raise ModgraftError(f"{text!r} holds no word to look for; write letters or digits")
    return " AND ".join(terms)


def select(database: Database, query: Query, actions: Actions) -> list[Row]:
    """Select the rows of a query, in its order.

    Raises:
        UnknownNameError: An action, a note or a status that does not exist.
        ModgraftError: A time or a text that cannot be read.
    """
    lines = bool(query.text) and not query.actions and not query.status
    table = "blocks" if lines else "events"
    where, values = conditions(database, query, actions, table)
    joins = [f"{table} JOIN files ON files.id = {table}.file"]
    if lines:
        joins.append("LEFT JOIN events ON events.id = blocks.event")
    score = "0.0"
    if query.text:
        words = "block_words" if lines else "event_words"
        joins.append(f"JOIN {words} ON {words}.rowid = {table}.id")
        where.append(f"{words} MATCH ?")
        values.append(f"text : ({match_expression(query.text)})")
        score = f"-bm25({words})"
    order = f"{table}.at, files.note, {table}.line, {table}.id"
    if query.newest:
        order = f"{table}.at DESC, files.note, {table}.line DESC, {table}.id DESC"
    elif query.text:
        order = f"score DESC, {order}"
    columns = BLOCK_COLUMNS if lines else EVENT_COLUMNS
    statement = (
        f"SELECT {columns}, {score} AS score FROM {' '.join(joins)} "  # noqa: S608
        f"WHERE {' AND '.join(where) or '1'} ORDER BY {order} LIMIT ? OFFSET ?"
    )
    values += [-1 if query.limit is None else query.limit, query.offset]
    return [row(tuple(r[:-1]), r[-1]) for r in database.rows(statement, *values)]


def conditions(
    database: Database, query: Query, actions: Actions, table: str
) -> tuple[list[str], list[Any]]:
    """Translate a query, without its text, to SQL conditions on ``table`` and their values."""
    where: list[str] = []
    values: list[Any] = []

    def add(condition: str, *more: Any) -> None:
        where.append(condition)
        values.extend(more)

    if query.actions:
        names = canonical_names(query.actions, actions, database)
        add(f"events.action IN ({', '.join('?' * len(names))})", *names)
    if query.status:
        if query.status not in STATUSES:
            raise UnknownNameError.among("status", query.status, STATUSES)
        add("events.status = ?", query.status)
    if query.cites:
        which = "event" if table == "events" else "block"
        citing = f"SELECT {which} FROM cites WHERE key = ? COLLATE NOCASE"  # noqa: S608
        add(f"{table}.id IN ({citing})", query.cites.lstrip("@"))
    if query.note:
        found = find_note_ids(database, query.note)
        add(f"{table}.file IN ({', '.join('?' * len(found))})", *found)
    if query.section:
        add(f"{table}.section = ? COLLATE NOCASE", query.section)
    if query.since is not None:
        add(f"{table}.at >= ?", span(query.since)[0])
    if query.until is not None:
        add(f"{table}.at <= ?", span(query.until)[1])
    return where, values


def canonical_names(
    names: tuple[str, ...] | str, actions: Actions, database: Database
) -> list[str]:
    """Resolve actions to the names in the table, or to names that some note uses.

    Raises:
        UnknownNameError: for an action that neither has.
    """
    found = []
    for name in (names,) if isinstance(names, str) else names:
        action = actions.find(name)
        if action is None:
            noted = [a for (a,) in database.rows("SELECT DISTINCT action FROM events")]
            if name not in noted:
                raise UnknownNameError.among("action", name, {*noted, *(a.name for a in actions)})
        found.append(action.name if action else name)
    return found


def find_note_ids(database: Database, name: str) -> list[int]:
    """Find the ids of the notes that a name, a path or a pattern refers to.

    Raises:
        UnknownNameError: if there is no such note.
    """
    rows = database.rows("SELECT id, note FROM files WHERE note = ?", name)  # as [it].md is spelled
    if not rows:
        rows = database.rows(
            "SELECT id, note FROM files WHERE note GLOB ? OR note GLOB ?", name, f"{name}.md"
        )
    if not rows:
        ending = f"%/{name.removesuffix('.md')}.md"
        folder = f"{name.rstrip('/')}/note.md"
        rows = database.rows(
            "SELECT id, note FROM files WHERE note LIKE ? OR note = ? OR note LIKE ?",
            ending, folder, f"%/{folder}",
        )  # fmt: skip
    if not rows:
        known = [n for (n,) in database.rows("SELECT note FROM files ORDER BY note")]
        raise UnknownNameError.among("note", name, known)
    return [i for i, _ in rows]
