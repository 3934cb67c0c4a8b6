"""The index of a log: notes in folders, and the queries that have an exact answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from modgraft.core.errors import MissingFileError, warn
from modgraft.log.index.database import WAIT, CorruptIndexError, Database, T
from modgraft.log.index.indexer import Indexed, Indexer
from modgraft.log.index.query import Hit, Owed, Query
from modgraft.log.index.select import (
    BLOCK_COLUMNS,
    EVENT_COLUMNS,
    READING_STATUSES,
    Row,
    blocks,
    find_note_ids,
    row,
    select,
)
from modgraft.log.index.times import span
from modgraft.log.settings import Settings, settings
from modgraft.log.syntax.actions import ACTIONS

if TYPE_CHECKING:
    from modgraft.log.index.bibliography import Bibliography
    from modgraft.log.syntax.note import Note

OWED = {"full_read": "read in full", "digging": "dig deeper", "skimmed": "", "read": ""}
"""How far a source was read → what is still to be done, the most first."""
_RETRIES = 3  # times that a note may change while it is read, before it is left out


class Index:
    """The notes in some folders, their index, and the queries over both; see `modgraft.log.Log`."""

    def __init__(self, settings: Settings, wait: float = WAIT) -> None:
        self.settings = settings
        self.actions = ACTIONS.extended(settings.actions)
        self.database = Database(settings.index, wait)
        self._indexer = Indexer(self.database, settings, self.actions)
        self.indexed: Indexed | None = None

    @classmethod
    def open(
        cls,
        *folders: str | Path,
        bibliography: str | Path | tuple[str | Path, ...] | None = None,
        index: str | Path | None = None,
        wait: float = WAIT,
    ) -> Self:
        """Open the log of ``folders``; without any, of those that the project names.

        Args:
            folders: Where the notes are.
            bibliography: BibTeX files; left out, those that are configured or in the folders.
            index: The index's file; left out, ``.modgraft/log.sqlite`` above the folders.
            wait: Seconds to wait for another process that writes to the index.

        Raises:
            MissingFileError: A folder that is not there.
            LockedIndexError: An index that stays locked.
        """
        return cls(settings(*folders, bibliography=bibliography, index=index), wait)

    def close(self) -> None:
        """Close the index."""
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, *, anew: bool = False) -> Indexed:
        """Bring the index up to date with the notes; ``anew`` builds it from nothing.

        Raises:
            ModgraftError: if not every note that was seen is in the index.
            LockedIndexError: if another process keeps writing.
        """
        with self.database.lock:
            if anew:
                self.database.rebuild("is built anew, as was asked")
                self.database.remarks.clear()
            try:
                self.indexed = self._indexer.run()
            except CorruptIndexError as error:
                self.database.rebuild(str(error))
                self.indexed = self._indexer.run()
            return self.indexed

    # -- queries -------------------------------------------------------------------------------

    def query(self, query: Query | None = None, /, **fields: Any) -> list[Hit]:
        """Find events and blocks: ``query(Query(...))`` or ``query(actions="skim", ...)``.

        Raises:
            UnknownNameError: An action, a note or a status that does not exist.
            ModgraftError: A time or a text that cannot be read.
        """
        asked = replace(query, **fields) if query is not None else Query(**fields)
        return self.select(lambda: select(self.database, asked, self.actions))

    def select(self, ask: Callable[[], list[Row]]) -> list[Hit]:
        """Return the rows that ``ask`` selects, each with its text as it stands in its file now."""
        with self.database.lock:
            self._ready()
            found = self.recovering(ask)
            lines, changed = self._reread(found)
            for _ in range(_RETRIES):
                if not changed:
                    break
                for path in changed:
                    self._indexer.write(path, self._indexer.sources())
                found = self.recovering(ask)
                lines, changed = self._reread(found)
            return [_with_text(r.hit, lines[r.path]) for r in found if r.path in lines]

    def recovering(self, ask: Callable[[], T]) -> T:
        """Return what ``ask`` does; a damaged index is first built again, with a warning."""
        try:
            return ask()
        except CorruptIndexError as error:
            warn(f"{self.database.path}: the index {error}")
            self.database.rebuild(str(error))
            self.update()
            return ask()

    def _reread(self, found: list[Row]) -> tuple[dict[str, list[bytes]], set[str]]:
        """Return the lines of unchanged notes, and the paths of those that changed."""
        lines: dict[str, list[bytes]] = {}
        changed: set[str] = set()
        for path, digest in {r.path: r.digest for r in found}.items():
            data = None
            with suppress(OSError):  # then it is gone, and what came from it goes too
                data = Path(path).read_bytes()
            if data is not None and blake2b(data, digest_size=16).digest() == digest:
                lines[path] = data.splitlines()  # of bytes: at \n, \r\n and \r, as a note's are
            else:
                changed.add(path)
        return lines, changed

    def _ready(self) -> None:
        if self.recovering(lambda: self.database.fact("indexed")) is None:
            self.update()

    def backlinks(self, key: str) -> list[Hit]:
        """Find every line that cites ``key``, with the event that it belongs to."""
        columns = BLOCK_COLUMNS.replace("blocks.line, blocks.end_line", "cites.line, cites.line")
        statement = (
            f"SELECT {columns} FROM cites "  # noqa: S608
            "JOIN files ON files.id = cites.file JOIN blocks ON blocks.id = cites.block "
            "LEFT JOIN events ON events.id = cites.event WHERE cites.key = ? COLLATE NOCASE "
            "ORDER BY blocks.at, files.note, cites.line"
        )
        return self.select(lambda: [row(r) for r in self.database.rows(statement, key.lstrip("@"))])

    def reading_queue(self) -> list[Owed]:
        """List the sources that were skimmed or read, those with the most left to do first."""
        furthest: dict[str, Hit] = {}
        for hit in self.select(self._furthest):
            for key in hit.keys[: hit.about]:
                if key not in furthest or _rank(hit) > _rank(furthest[key]):
                    furthest[key] = hit
        sources = self.bibliography.entries
        titles = {key: sources[key].title if key in sources else "" for key in furthest}
        queue = [
            Owed(key, hit.status, OWED[hit.status], titles[key], hit.note, hit.line, hit.when)
            for key, hit in furthest.items()
        ]
        return sorted(queue, key=lambda owed: list(OWED).index(owed.status))

    def _furthest(self) -> list[Row]:
        """Select, for each source, the event that got furthest; only these are read again."""
        statement = (
            f"SELECT {EVENT_COLUMNS} FROM events JOIN files ON files.id = events.file "  # noqa: S608
            "WHERE action IN ('skim', 'read') ORDER BY events.at, files.note, events.line"
        )
        best: dict[str, Row] = {}
        for each in map(row, self.database.rows(statement)):
            for key in each.hit.keys[: each.hit.about]:
                if key not in best or _rank(each.hit) > _rank(best[key].hit):
                    best[key] = each
        return list(dict.fromkeys(best.values()))

    def questions(self, open: bool = True) -> list[Hit]:
        """Find the questions without an answer below them; with ``open=False``, all."""
        return self.query(actions="question", status="open" if open else None)

    def lessons(self) -> list[Hit]:
        """Find the lessons learned."""
        return self.query(actions="lesson_learned")

    def changed(self, since: str | date, until: str | date | None = None) -> list[Hit]:
        """Find every block written from ``since`` to the end of ``until``, the oldest first."""
        first, last = span(since)[0], span(until)[1] if until is not None else "9999"
        where = "blocks.at >= ? AND blocks.at <= ?"
        return self.select(lambda: blocks(self.database, where, first, last))

    def section(self, note: str, title: str) -> list[Hit]:
        """Find the blocks of one section of a note, without its heading.

        Raises:
            UnknownNameError: if there is no such note.
        """
        self._ready()
        (file, *_) = find_note_ids(self.database, note)
        where = "blocks.file = ? AND blocks.section = ? COLLATE NOCASE AND kind != 'heading'"
        return self.select(lambda: blocks(self.database, where, file, title))

    # -- notes and sources ---------------------------------------------------------------------

    @property
    def bibliography(self) -> Bibliography:
        """The sources that can be cited, as of the last indexing."""
        self._ready()
        return self._indexer.bibliography()

    def notes(self) -> list[str]:
        """List the names of all notes."""
        self._ready()
        names = "SELECT note FROM files ORDER BY note"
        return self.database.cached("notes", lambda: [n for (n,) in self.database.rows(names)])[:]

    def name(self, path: Path) -> str:
        """Return a file's name in the log: its path relative to the root, if it lies below."""
        return self._indexer.name(str(path))

    def path(self, note: str) -> Path:
        """Return the path of a note.

        Raises:
            UnknownNameError: if there is no such note.
        """
        self._ready()
        (found, *_) = find_note_ids(self.database, note)
        return Path(self.database.rows("SELECT path FROM files WHERE id = ?", found)[0][0])

    def note(self, name: str) -> Note:
        """Parse a note as it is now.

        Raises:
            UnknownNameError: if there is no such note.
            MissingFileError: if it was deleted since it was indexed.
        """
        from modgraft.log.syntax.parse import parse

        path = self.path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            remedy = "Bring the index up to date: log.index()"
            raise MissingFileError("the note is gone", file=path, remedy=remedy) from error
        return parse(data, self._indexer.name(str(path)), self.actions)


def _rank(hit: Hit) -> int:
    return READING_STATUSES.index(hit.status)


def _with_text(hit: Hit, lines: list[bytes]) -> Hit:
    text = b"\n".join(lines[hit.line - 1 : hit.end_line]).decode("utf-8", "replace")
    return replace(hit, text=text)
