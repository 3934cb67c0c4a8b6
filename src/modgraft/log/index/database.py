"""The index's database: SQLite with FTS5, a cache of the notes that may be deleted.

    files ── blocks ── block_words (FTS5)         sources, broken    the bibliography
         ├── events ── event_words (FTS5)         written, tracked   when git first saw a line
         └── cites                                facts              what was seen last

Each note is one transaction, in a write-ahead log: a killed process keeps the notes it finished.
"""

from __future__ import annotations

import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from modgraft.core.errors import ModgraftError

WAIT = 5.0
"""Seconds to wait for another process that is writing."""

WAL = 10_000
"""Pages of the write-ahead log before a checkpoint; many make a first indexing faster."""

SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE files (id INTEGER PRIMARY KEY, note TEXT UNIQUE, path TEXT, mtime INTEGER,
    size INTEGER, inode INTEGER, digest BLOB, degraded INTEGER, problems TEXT);
CREATE TABLE blocks (id INTEGER PRIMARY KEY, file INTEGER, line INTEGER, end_line INTEGER,
    kind TEXT, depth INTEGER, section TEXT, event INTEGER, at TEXT, at_from TEXT, text TEXT,
    hash BLOB);
CREATE TABLE events (id INTEGER PRIMARY KEY, file INTEGER, line INTEGER, end_line INTEGER,
    action TEXT, written TEXT, arguments TEXT, result TEXT, status TEXT, section TEXT,
    depth INTEGER, at TEXT, at_from TEXT, keys TEXT, about INTEGER, said INTEGER);
CREATE TABLE cites (file INTEGER, line INTEGER, key TEXT, event INTEGER, block INTEGER,
    argument INTEGER, marked INTEGER);
CREATE TABLE sources (key TEXT PRIMARY KEY, title TEXT, authors TEXT, year TEXT, url TEXT,
    abstract TEXT, file TEXT, line INTEGER);
CREATE TABLE broken (file TEXT, line INTEGER, reason TEXT);
CREATE TABLE tracked (id INTEGER PRIMARY KEY, path TEXT UNIQUE, root TEXT);
CREATE TABLE written (path INTEGER, line INTEGER, at TEXT, PRIMARY KEY (path, line)) WITHOUT ROWID;
CREATE VIRTUAL TABLE block_words USING fts5(text, context, tokenize='porter unicode61');
CREATE VIRTUAL TABLE event_words USING fts5(text, tokenize='porter unicode61');
INSERT INTO block_words (block_words, rank) VALUES ('automerge', 8), ('crisismerge', 64);
INSERT INTO event_words (event_words, rank) VALUES ('automerge', 8), ('crisismerge', 64);
CREATE INDEX blocks_file ON blocks (file, line);
CREATE INDEX blocks_at ON blocks (at);
CREATE INDEX blocks_hash ON blocks (hash);
CREATE INDEX events_file ON events (file, line);
CREATE INDEX events_action ON events (action, at);
CREATE INDEX events_at ON events (at);
CREATE INDEX cites_key ON cites (key);
CREATE INDEX cites_file ON cites (file);
"""

VERSION = zlib.crc32(SCHEMA.encode()) >> 1
"""The schema's version, a checksum of it; an index of another version is built again."""


T = TypeVar("T")


class LockedIndexError(ModgraftError):
    """Another process holds the index locked for too long."""


class CorruptIndexError(ModgraftError):
    """The index's file is damaged; it is built again from the notes."""


class Database:
    """The open database; ``remarks`` say what had to be repaired to open it, one line each."""

    def __init__(self, path: Path, wait: float = WAIT) -> None:
        self.path, self.wait = path, wait
        self.remarks: list[str] = []
        self.lock = threading.RLock()
        self.in_memory = False
        self._cache: dict[str, Any] = {}
        self._state: tuple[int, int] | None = None
        self.connection = self._open()

    def _open(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            ignore = self.path.parent / ".gitignore"
            if self.path.parent.name == ".modgraft" and not ignore.exists():
                ignore.write_text("*\n", encoding="utf-8")
        except OSError as error:
            return self._open_in_memory(error.strerror or type(error).__name__)
        try:
            return self._connect_file()
        except CorruptIndexError as error:
            self.remarks.append(f"{self.path}:1: warning index {error}")
            self._delete()
            return self._connect_file()
        except sqlite3.OperationalError as error:
            return self._open_in_memory(str(error))

    def _connect_file(self) -> sqlite3.Connection:
        connection = _connect(str(self.path), self.wait)
        try:
            with self._translated_errors():
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(f"PRAGMA wal_autocheckpoint = {WAL}")
                self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _open_in_memory(self, why: str) -> sqlite3.Connection:
        """Open a database in memory, copied from the file where that can be read."""
        self.in_memory = True
        self.remarks.append(
            f"{self.path}:1: warning index cannot be written ({why}); it is kept in memory, and "
            "built again by every process"
        )
        connection = _connect(":memory:", self.wait)
        if self.path.is_file():
            with suppress(sqlite3.DatabaseError):  # then it is built again
                stored = sqlite3.connect(f"{self.path.as_uri()}?immutable=1", uri=True)
                with stored:
                    stored.backup(connection)
                stored.close()
        self._prepare(connection)
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == VERSION:
            return
        if version:
            raise CorruptIndexError(f"is of version {version}, not {VERSION}; it is built again")
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:  # still, under the lock
            for statement in SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")

    def rebuild(self, why: str) -> None:
        """Replace the database by an empty one, and remark why."""
        with self.lock:
            self.remarks.append(f"{self.path}:1: warning index {why}")
            self._state = None
            self.connection.close()
            if not self.in_memory:
                self._delete()
                self.connection = self._open()
            else:
                self.connection = _connect(":memory:", self.wait)
                self._prepare(self.connection)

    def _delete(self) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def close(self) -> None:
        """Close the database."""
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction: all of it is written, or nothing.

        Raises:
            LockedIndexError: if another process keeps writing for longer than ``wait``.
            CorruptIndexError: if the file is damaged.
        """
        with self.lock, self._translated_errors():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
            except BaseException:
                with suppress(sqlite3.Error):  # the first error says more
                    self.connection.execute("ROLLBACK")
                raise
            self.connection.execute("COMMIT")

    def rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows."""
        with self.lock, self._translated_errors():
            return self.connection.execute(statement, values).fetchall()

    def cached(self, name: str, make: Callable[[], T]) -> T:
        """Return the result of ``make``, kept until some process changes the database."""
        with self.lock:
            state = (self.rows("PRAGMA data_version")[0][0], self.connection.total_changes)
            if self._state != state:
                self._cache, self._state = {}, state
            if name not in self._cache:
                self._cache[name] = make()
            return self._cache[name]

    def optimize(self) -> None:
        """Merge the segments of the full-text indexes, which many small transactions leave."""
        with self.transaction() as db:
            for words in ("block_words", "event_words"):
                db.execute(f"INSERT INTO {words} ({words}) VALUES ('optimize')")  # noqa: S608

    def fact(self, name: str) -> str | None:
        """Return the value stored under ``name`` in the table of facts; None without one."""
        rows = self.rows("SELECT value FROM facts WHERE name = ?", name)
        return rows[0][0] if rows else None

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise LockedIndexError(
                    f"{self.path}: another process is writing to the index; waited "
                    f"{self.wait:g} s. Try again when it is done, or delete the file: it is only "
                    "a cache"
                ) from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise CorruptIndexError(f"is damaged ({error}); it is built again") from error
            raise


def _connect(path: str, wait: float) -> sqlite3.Connection:
    # One connection, used under a lock: the page's threads share it.
    return sqlite3.connect(path, timeout=wait, isolation_level=None, check_same_thread=False)
