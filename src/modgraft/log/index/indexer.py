"""Bring the index up to date with the notes, their bibliography and their git history."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modgraft.core.errors import ModgraftError
from modgraft.log.index import git_dates
from modgraft.log.index.bibliography import Bibliography, Broken, Entry
from modgraft.log.index.find_notes import FoundFiles, find_notes, stamp
from modgraft.log.index.rows import Rows, rows
from modgraft.log.index.times import date_in_name, file_time

if TYPE_CHECKING:
    from modgraft.log.index.database import Database
    from modgraft.log.settings import Settings
    from modgraft.log.syntax.actions import Actions
    from modgraft.log.syntax.note import Note


OPTIMIZE_FROM = 500
"""The number of changed notes from which the full-text indexes are optimized at the end."""
SET_FACT = "INSERT OR REPLACE INTO facts VALUES (?, ?)"
MARK_STALE = "UPDATE files SET mtime = 0"
"""Notes with this time are read again, by this process or, if it is killed, by the next."""


@dataclass(frozen=True, slots=True)
class Indexed:
    """The report of an indexing; ``problems`` are one line each, with file and line."""

    seen: int
    parsed: int
    degraded: int
    changed: int
    removed: int
    seconds: float
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.seen} notes seen = {self.parsed} parsed + {self.degraded} degraded; "
            f"{self.changed} changed, {self.removed} removed, in {self.seconds:.2f} s"
        )


class Indexer:
    """Writes the index of one log."""

    def __init__(self, database: Database, settings: Settings, actions: Actions) -> None:
        self.database, self.settings, self.actions = database, settings, actions
        self._sources: tuple[str | None, dict[str, Entry]] = ("", {})

    def run(self) -> Indexed:
        """Index what changed since the last run.

        Raises:
            ModgraftError: if not every note that was seen is in the index.
            LockedIndexError: if another process keeps writing.
        """
        began = time.perf_counter()
        found = find_notes(self.settings.folders)
        problems = [*map(str, found.problems), *self.database.remarks]
        self.database.remarks.clear()
        self._check_actions()
        self._read_bibliography(found, problems)
        self._read_history(problems)
        sources = self.sources()
        stamps = self.database.rows("SELECT path, mtime, size, inode FROM files")
        known = {path: tuple(stamp) for path, *stamp in stamps}
        changed, gone = 0, 0
        for file in found.notes:
            before = known.pop(file.path, None)
            if before == file.stamp:
                continue
            kept = self.write(file.path, sources)
            changed += kept
            if not kept:
                gone += 1
                problems.append(f"{file.path}:1: warning deleted while it was read")
        for path in known:
            self.remove(path)
        if changed + len(known) >= OPTIMIZE_FROM:
            self.database.optimize()
        statement = "SELECT problems FROM files WHERE problems IS NOT NULL ORDER BY path"
        for (said,) in self.database.rows(statement):
            problems += json.loads(said)
        parsed, degraded = self._count(len(found.notes) - gone)
        with self.database.transaction() as db:
            db.execute(SET_FACT, ("indexed", file_time(time.time())))
        seconds = time.perf_counter() - began
        seen, removed = parsed + degraded, len(known)
        return Indexed(seen, parsed, degraded, changed, removed, seconds, tuple(problems))

    def _count(self, seen: int) -> tuple[int, int]:
        """Count the parsed and the degraded notes, which must be all that were seen."""
        known, degraded = self.database.rows("SELECT count(*), total(degraded) FROM files")[0]
        parsed, degraded = known - int(degraded), int(degraded)
        if seen != known:
            raise ModgraftError(
                f"{self.settings.root}: {seen} notes were seen, but {parsed} parsed + {degraded} "
                f"degraded are in the index. Delete {self.database.path} and index again"
            )
        return parsed, degraded

    # -- notes ---------------------------------------------------------------------------------

    def write(self, path: str, sources: Mapping[str, Entry]) -> bool:
        """Index a note as it is now, in one transaction; return False if it was deleted."""
        from modgraft.log.syntax.parse import parse  # not needed where no note changed

        name = self.name(path)
        try:
            with Path(path).open("rb") as file:
                status = os.fstat(file.fileno())
                data = file.read()
        except FileNotFoundError:
            self.remove(path)
            return False
        except OSError as error:
            problem = f"{name}:1: error unreadable {error.strerror}; its permissions forbid it?"
            self._replace(path, (0, 0, 0), b"", [problem], Rows())
            return True
        note = parse(data, name, self.actions)
        made = rows(note, self._line_times(path, note, status.st_mtime), sources)
        digest = blake2b(data, digest_size=16).digest()
        self._replace(path, stamp(status), digest, _degraded(note), made)
        return True

    def remove(self, path: str) -> None:
        """Remove a note and everything read from it."""
        with self.database.transaction() as db:
            _forget(db, path)

    def name(self, path: str) -> str:
        """Return a note's name: its path relative to the root of the log."""
        root = str(self.settings.root)
        inside = path.startswith(root.rstrip(os.sep) + os.sep)
        return Path(os.path.relpath(path, root) if inside else path).as_posix()

    def _replace(
        self, path: str, stamp: tuple[int, int, int], digest: bytes, problems: list[str], made: Rows
    ) -> None:
        with self.database.transaction() as db:
            _forget(db, path)
            file = db.execute(
                "INSERT INTO files (note, path, mtime, size, inode, digest, degraded, problems) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (self.name(path), path, *stamp, digest, int(bool(problems)),
                 json.dumps(problems) if problems else None),
            ).lastrowid  # fmt: skip
            _insert(db, file or 0, made)

    def _check_actions(self) -> None:
        """Mark every note as stale if the table of actions changed, by which notes are parsed."""
        table = repr(self.actions.rows)
        if self.database.fact("actions") != table:
            with self.database.transaction() as db:
                db.execute(MARK_STALE)
                db.execute(SET_FACT, ("actions", table))

    # -- the bibliography ----------------------------------------------------------------------

    def sources(self) -> dict[str, Entry]:
        """Return the entries of the bibliography from the index, without reading its files."""
        seen = self.database.fact("bibliographies")
        if self._sources[0] == seen:
            return self._sources[1]
        statement = "SELECT key, title, authors, year, url, abstract, file, line FROM sources"
        read = {
            row[0]: Entry(row[0], row[1], tuple(json.loads(row[2])), *row[3:])
            for row in self.database.rows(statement)
        }
        self._sources = seen, read
        return read

    def bibliography(self) -> Bibliography:
        """Return the bibliography from the index, with its broken entries."""
        broken = self.database.rows("SELECT file, line, reason FROM broken")
        return Bibliography(self.sources(), tuple(Broken(*row) for row in broken))

    def _read_bibliography(self, found: FoundFiles, problems: list[str]) -> None:
        """Read the bibliography again if one of its files changed."""
        named = self.settings.bibliography
        files = [(one.path, one.stamp) for one in found.bibliographies]
        if named is not None:
            files = [(str(path), stamp(path.stat())) for path in named]
        seen = json.dumps(files)
        if seen != self.database.fact("bibliographies"):
            try:
                read = Bibliography.read([path for path, _ in files])
            except OSError as error:
                problems.append(f"{error.filename}:1: error bibliography {error.strerror}")
                return
            self._store_sources(read, seen)
        rows = self.database.rows("SELECT file, line, reason FROM broken ORDER BY file, line")
        problems += [f"{file}:{line}: warning bibliography {why}" for file, line, why in rows]

    def _store_sources(self, read: Bibliography, seen: str) -> None:
        """Store the bibliography and mark the notes that cite a changed entry as stale."""
        old = self.sources()
        keys = {k for k in {*old, *read.entries} if old.get(k) != read.entries.get(k)}
        with self.database.transaction() as db:
            db.executemany("DELETE FROM sources WHERE key = ?", [(key,) for key in keys])
            db.executemany(
                "INSERT INTO sources VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [(e.key, e.title, json.dumps(e.authors, ensure_ascii=False), e.year, e.url,
                  e.abstract, e.file, e.line)
                 for e in (read.entries[key] for key in keys if key in read.entries)],
            )  # fmt: skip
            db.execute("DELETE FROM broken")
            broken = [(b.file, b.line, b.reason) for b in read.broken]
            db.executemany("INSERT INTO broken VALUES (?, ?, ?)", broken)
            db.execute(SET_FACT, ("bibliographies", seen))
            shown = [(k,) for k in keys if not _same_words(old.get(k), read.entries.get(k))]
            citing = "SELECT file FROM cites WHERE key = ?"
            db.executemany(f"{MARK_STALE} WHERE id IN ({citing})", shown)

    # -- time ----------------------------------------------------------------------------------

    def _read_history(self, problems: list[str]) -> None:
        """Read the commits since the last run, of each repository that holds notes."""
        repositories: dict[Path, list[Path]] = {}
        for folder in self.settings.folders:
            real = folder.resolve()
            root = git_dates.find_repository(real)
            if root is not None:
                repositories.setdefault(root, []).append(real)
        for root, folders in repositories.items():
            try:
                self._read_commits(root, folders)
            except git_dates.GitError as error:
                problems.append(f"{root}:1: warning git {error}; times come from notes and files")

    def _read_commits(self, root: Path, folders: list[Path]) -> None:
        """Store when lines were written, and mark the notes that a commit touched as stale."""
        fact = f"git {root} {' '.join(map(str, folders))}"
        new, old = git_dates.head(root), self.database.fact(fact)
        if new is None or new == old:
            return
        rewritten = old is not None and not git_dates.is_ancestor(root, old)
        tracked: dict[str, int] = {}
        with self.database.transaction() as db:
            if rewritten:
                own = "SELECT id FROM tracked WHERE root = ?"
                db.execute(f"DELETE FROM written WHERE path IN ({own})", (str(root),))  # noqa: S608
            for line in git_dates.added_lines(root, folders, None if rewritten else old):
                path = f"{root}{os.sep}{line.path}"
                if path not in tracked:
                    values = path, str(root)
                    db.execute("INSERT OR IGNORE INTO tracked (path, root) VALUES (?, ?)", values)
                    row = db.execute("SELECT id FROM tracked WHERE path = ?", (path,)).fetchone()
                    tracked[path] = row[0]
                if line.renamed_from:
                    db.execute(
                        "INSERT OR IGNORE INTO written SELECT ?, line, at FROM written WHERE path "
                        "= (SELECT id FROM tracked WHERE path = ?)",
                        (tracked[path], f"{root}{os.sep}{line.renamed_from}"),
                    )
                else:
                    seen = tracked[path], line.line, line.at
                    db.execute("INSERT OR IGNORE INTO written VALUES (?, ?, ?)", seen)
            db.execute(SET_FACT, (fact, new))
            real = {os.path.realpath(f): str(f) for f in self.settings.folders}
            touched = [(_seen_as(path, real),) for path in tracked]
            db.execute(MARK_STALE) if rewritten else db.executemany(
                f"{MARK_STALE} WHERE path = ?", touched
            )

    def _line_times(self, path: str, note: Note, mtime: float) -> Callable[[int], tuple[str, str]]:
        """Return a function from a line of this note to its time and the source of that time."""
        statement = (
            "SELECT line, at FROM written WHERE path = (SELECT id FROM tracked WHERE path = ?)"
        )
        first: dict[int, str] = dict(self.database.rows(statement, os.path.realpath(path)))
        named = date_in_name(Path(path).stem) or date_in_name(Path(path).parent.name)
        other = (named, "name") if named else (file_time(mtime), "file")

        def at(line: int) -> tuple[str, str]:
            found = first.get(git_dates.fingerprint(note.line(line))) if first else None
            return (found, "git") if found is not None else other

        return at


def _degraded(note: Note) -> list[str]:
    """Return the reasons why a note is degraded, one line each."""
    if not note.degraded:
        return []
    errors = [str(d) for d in note.diagnostics if d.severity == "error"]
    return errors or [f"{note.name}:1: error degraded some of it could not be read"]


def _same_words(old: Entry | None, new: Entry | None) -> bool:
    """Return whether two versions of an entry give the blocks that cite it the same search
    words."""
    return (
        old is not None and new is not None and (old.title, old.authors) == (new.title, new.authors)
    )


def _seen_as(path: str, folders: Mapping[str, str]) -> str:
    """Map a resolved path back to the path by which the log's folders lead to it."""
    for real, named in folders.items():
        if path.startswith(real + os.sep):
            return named + path[len(real) :]
    return path


def _forget(db: sqlite3.Connection, path: str) -> None:
    row = db.execute("SELECT id FROM files WHERE path = ?", (path,)).fetchone()
    if row is None:
        return
    for words, table in (("block_words", "blocks"), ("event_words", "events")):
        of_file = f"SELECT id FROM {table} WHERE file = ?"  # noqa: S608
        db.execute(f"DELETE FROM {words} WHERE rowid IN ({of_file})", row)  # noqa: S608
    for table in ("blocks", "events", "cites"):
        db.execute(f"DELETE FROM {table} WHERE file = ?", row)  # noqa: S608
    db.execute("DELETE FROM files WHERE id = ?", row)


def _insert(db: sqlite3.Connection, file: int, made: Rows) -> None:
    events = _next(db, "events")
    blocks = _next(db, "blocks")

    def event(index: Any) -> int | None:
        return None if index is None else events + index

    db.executemany(
        f"INSERT INTO events VALUES ({', '.join('?' * 16)})",  # noqa: S608
        [(events + i, file, *row) for i, row in enumerate(made.events)],
    )
    db.executemany(
        "INSERT INTO event_words (rowid, text) VALUES (?, ?)",
        [(events + i, text) for i, text in enumerate(made.event_words)],
    )
    db.executemany(
        f"INSERT INTO blocks VALUES ({', '.join('?' * 12)})",  # noqa: S608
        [
            (blocks + i, file, *row[:5], event(row[5]), *row[6:])
            for i, row in enumerate(made.blocks)
        ],
    )
    db.executemany(
        "INSERT INTO block_words (rowid, text, context) VALUES (?, ?, ?)",
        [(blocks + i, *words) for i, words in enumerate(made.block_words)],
    )
    db.executemany(
        "INSERT INTO cites VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(file, line, key, event(of), blocks + block, *flags)
         for line, key, of, block, *flags in made.cites],
    )  # fmt: skip


def _next(db: sqlite3.Connection, table: str) -> int:
    return (db.execute(f"SELECT max(id) FROM {table}").fetchone()[0] or 0) + 1  # noqa: S608
