"""The index of a log: notes in folders, and the queries that have an exact answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from modgraft.core.errors import MissingFileError
from modgraft.log.index.database import WAIT, CorruptIndexError, Store
from modgraft.log.index.indexer import Indexed, Indexer
from modgraft.log.index.query import Hit, Owed, Query
from modgraft.log.index.select import BLOCK, EVENT, Row, blocks, notes_named, row, select
from modgraft.log.index.times import span
from modgraft.log.settings import Settings, settings
from modgraft.log.syntax.actions import ACTIONS

if TYPE_CHECKING:
    from modgraft.log.index.bibliography import Bibliography
    from modgraft.log.syntax.note import Note

RANKS = ("skimmed", "digging", "full_read", "read")
OWED = {"skimmed": "", "digging": "dig deeper", "full_read": "read in full", "read": ""}
_DISTRACTED = 3  # times that a note may change while it is read, before it is left out


class Index:
    """The notes in some folders, their index, and the queries over both.

    The text in every result is read from the notes again: a note that changed since it was indexed
    is first indexed again, and results from a deleted note are left out. Only ``update()`` finds
    new notes; an index that was never built is built by the first query. ``indexed`` is the report
    of the last update.
    """

    def __init__(self, settings: Settings, wait: float = WAIT) -> None:
        self.settings = settings
        self.actions = ACTIONS.extended(settings.actions) if settings.actions else ACTIONS
        self.store = Store(settings.index, wait)
        self._indexer = Indexer(self.store, settings, self.actions)
        self.indexed: Indexed | None = None

    @classmethod
    def open(
        cls,
        *folders: str | Path,
        bibliography: str | Path | tuple[str | Path, ...] | None = None,
        index: str | Path | None = None,
        wait: float = WAIT,
    ) -> Self:
        """The log of ``folders``; without any, of those that the project names.

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
        """Let go of the index's file."""
        self.store.close()

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
        with self.store.lock:
            if anew:
                self.store.rebuild("is built anew, as was asked")
                self.store.remarks.clear()
            try:
                done = self._indexer.run()
            except CorruptIndexError as error:
                self.store.rebuild(str(error))
                done = self._indexer.run()
            self.indexed = done
        return done

    # -- queries -------------------------------------------------------------------------------

    def query(self, query: Query | None = None, /, **fields: Any) -> list[Hit]:
        """Events and blocks; ``log.query(Query(...))`` or ``log.query(actions="skim", ...)``.

        Raises:
            UnknownNameError: An action, a note or a status that there is not.
            ModgraftError: A time or a text that cannot be read.
        """
        asked = replace(query, **fields) if query is not None else Query(**fields)
        return self.select(lambda: select(self.store, asked, self.actions))

    def select(self, ask: Callable[[], list[Row]]) -> list[Hit]:
        """What ``ask`` selects, each with its text as it stands in its file now."""
        with self.store.lock:
            self._ready()
            found = self._asked(ask)
            lines, changed = self._reread(found)
            for _ in range(_DISTRACTED):
                if not changed:
                    break
                for path in changed:
                    self._indexer.write(path, self._indexer.sources())
                found = self._asked(ask)
                lines, changed = self._reread(found)
            return [_with_text(r.hit, lines[r.path]) for r in found if r.path in lines]

    def _asked(self, ask: Callable[[], list[Row]]) -> list[Row]:
        try:
            return ask()
        except CorruptIndexError as error:
            self.recover(error)
            return ask()

    def recover(self, error: CorruptIndexError) -> None:
        """Build a damaged index again from the notes, and warn about it."""
        warnings.warn(f"{self.store.path}: the index {error}", stacklevel=4)
        self.store.rebuild(str(error))
        self.update()

    def _reread(self, found: list[Row]) -> tuple[dict[str, list[bytes]], set[str]]:
        """The lines of the notes that are as they were indexed, and the notes that are not."""
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
        try:
            if self.store.fact("indexed") is None:
                self.update()
        except CorruptIndexError as error:
            self.recover(error)

    def backlinks(self, key: str) -> list[Hit]:
        """Every line that cites ``key``, each with the event that it belongs to."""
        statement = (
            f"SELECT {BLOCK.replace('blocks.line, blocks.end_line', 'cites.line, cites.line')} "  # noqa: S608
            "FROM cites JOIN files ON files.id = cites.file JOIN blocks ON blocks.id = cites.block "
            "LEFT JOIN events ON events.id = cites.event WHERE cites.key = ? COLLATE NOCASE "
            "ORDER BY blocks.at, files.note, cites.line"
        )
        return self.select(lambda: [row(r) for r in self.store.rows(statement, key.lstrip("@"))])

    def reading_queue(self) -> list[Owed]:
        """Sources by how far they got, those that are owed most first."""
        furthest: dict[str, Hit] = {}
        for hit in self.select(self._furthest):
            for key in hit.keys[: hit.about]:
                if key not in furthest or _rank(hit) > _rank(furthest[key]):
                    furthest[key] = hit
        sources = self.bibliography.entries
        queue = [
            Owed(
                key, hit.status, OWED[hit.status],
                sources[key].title if key in sources else "", hit.note, hit.line, hit.when,
            )
            for key, hit in furthest.items()
        ]  # fmt: skip
        order = {"full_read": 0, "digging": 1, "skimmed": 2, "read": 3}
        return sorted(queue, key=lambda owed: order[owed.status])

    def _furthest(self) -> list[Row]:
        """For each source the event that got furthest; only these are read again."""
        statement = (
            f"SELECT {EVENT} FROM events JOIN files ON files.id = events.file "  # noqa: S608
            "WHERE action IN ('skim', 'read') ORDER BY events.at, files.note, events.line"
        )
        best: dict[str, Row] = {}
        for each in map(row, self.store.rows(statement)):
            for key in each.hit.keys[: each.hit.about]:
                if key not in best or _rank(each.hit) > _rank(best[key].hit):
                    best[key] = each
        return list(dict.fromkeys(best.values()))

    def questions(self, open: bool = True) -> list[Hit]:
        """Questions without an answer below them; with ``open=False``, all."""
        return self.query(actions="question", status="open" if open else None)

    def lessons(self) -> list[Hit]:
        """The lessons learned."""
        return self.query(actions="lesson_learned")

    def changed(self, since: str | date, until: str | date | None = None) -> list[Hit]:
        """Every block that was written from ``since`` to the end of ``until``, in that order."""
        first, last = span(since)[0], span(until)[1] if until is not None else "9999"
        where = "blocks.at >= ? AND blocks.at <= ?"
        return self.select(lambda: blocks(self.store, where, first, last))

    def section(self, note: str, title: str) -> list[Hit]:
        """The blocks of one section of a note, without its heading.

        Raises:
            UnknownNameError: if there is no such note.
        """
        self._ready()
        (file, *_) = notes_named(self.store, note)
        where = "blocks.file = ? AND blocks.section = ? COLLATE NOCASE AND kind != 'heading'"
        return self.select(lambda: blocks(self.store, where, file, title))

    # -- notes and sources ---------------------------------------------------------------------

    @property
    def bibliography(self) -> Bibliography:
        """The sources that can be cited, as they were last indexed."""
        self._ready()
        return self._indexer.bibliography()

    def notes(self) -> list[str]:
        """The names of all notes."""
        self._ready()
        names = "SELECT note FROM files ORDER BY note"
        return self.store.remembered("notes", lambda: [n for (n,) in self.store.rows(names)])[:]

    def name(self, path: Path) -> str:
        """A file's name in the log: its path from the root, where it is below that."""
        return self._indexer.name(str(path))

    def path(self, note: str) -> Path:
        """Where a note is.

        Raises:
            UnknownNameError: if there is no such note, or no single one.
        """
        self._ready()
        (found, *_) = notes_named(self.store, note)
        return Path(self.store.rows("SELECT path FROM files WHERE id = ?", found)[0][0])

    def note(self, name: str) -> Note:
        """A note, parsed as it is now.

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
    return RANKS.index(hit.status)


def _with_text(hit: Hit, lines: list[bytes]) -> Hit:
    text = b"\n".join(lines[hit.line - 1 : hit.end_line]).decode("utf-8", "replace")
    return replace(hit, text=text)
