"""Edit notes: put lines into their sections, and rewrite a file completely or not at all.

Every byte that was there stays where it is. Only one process at a time rewrites a file.
"""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from modgraft.core.errors import DataError, MissingFileError
from modgraft.core.files import whole
from modgraft.log.syntax.blocks import SECTIONS
from modgraft.log.syntax.parse import parse

if TYPE_CHECKING:
    from modgraft.log.syntax.note import Note, Section


def empty() -> str:
    """Return the text of a new note: the six sections, empty."""
    return "\n".join(f"## {title}\n" for title in SECTIONS)


def section(note: Note, title: str) -> Section:
    """Return the first section with that title.

    Raises:
        DataError: the note has no such section.
    """
    for found in note.sections:
        if found.title.strip().lower() == title.lower():
            return found
    raise DataError(
        f"the note has no section '## {title}'", file=note.name,
        remedy=f"Add the line '## {title}' where it is to stand",
    )  # fmt: skip


def end_of(note: Note, title: str) -> int:
    """Return the number of a section's last line that is not blank, or of its heading."""
    found = section(note, title)
    at = found.end_line
    while at > found.line and not note.line(at).strip():
        at -= 1
    return at


def append(data: bytes, title: str, lines: Sequence[str], name: str | None = None) -> bytes:
    """Add lines at the end of a section, before the blank lines that end it; return the note."""
    note = parse(data, name)
    return insert(note, end_of(note, title), lines)


def insert(note: Note, after: int, lines: Sequence[str]) -> bytes:
    """Add lines after line `after`, with the note's usual line break; return the note."""
    at = note.line_range(after)[1]
    before, rest, end = note.data[:at], note.data[at:], _ending(note.data)
    if not before.endswith((b"\n", b"\r")):
        before += end
    new = b"".join(line.encode() + end for line in lines)
    if rest.startswith(b"#"):  # a heading keeps its distance
        new += end
    return before + new + rest


def replace(note: Note, line: int, text: str) -> bytes:
    """Replace one line, keep its line break, and return the note."""
    start, end = note.line_range(line)
    old = note.data[start:end]
    kept = old[len(old.rstrip(b"\r\n")) :]
    return note.data[:start] + text.encode() + kept + note.data[end:]


def _ending(data: bytes) -> bytes:
    return b"\r\n" if data.count(b"\r\n") * 2 > data.count(b"\n") else b"\n"


# -- files -------------------------------------------------------------------------------------


def create(path: Path, data: bytes) -> None:
    """Write a new file, completely; of two processes that create it the second is refused.

    Raises:
        DataError: the file exists already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(part)  # fails where the name is taken, at whatever moment
    except FileExistsError as error:
        raise DataError(
            "there is such a note already", file=path, remedy="Take another name, or add to it"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    _sync(path.parent)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> bytes:
    """Replace a file's content by the result of ``change``, and return the new content.

    A process that is killed leaves the old file or the new one. Other processes that rewrite the
    same file wait; a program that does not wait, such as an editor, is noticed unless it saves at
    the very moment of the replacement. A symbolic link stays a link, and permissions are kept.

    Raises:
        MissingFileError: the file does not exist.
        DataError: another program changed the file meanwhile.
    """
    path = path.resolve()
    with _locked(path):
        data = path.read_bytes()
        new = change(data)
        if new == data:
            return data
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            left.unlink(missing_ok=True)  # left by a process that was killed
        with whole(path) as part:
            part.write_bytes(new)
            if path.read_bytes() != data:
                raise DataError(
                    "it was changed by another program meanwhile, and is left as that program "
                    "wrote it", file=path, remedy="Look at it, and do this again",
                )  # fmt: skip
        _sync(path.parent)
    return new


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock the file itself, so that no lock file is left beside it."""
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise MissingFileError(
                "there is no such note", file=path, remedy="modgraft log new NAME starts one"
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # the previous holder of the lock may have put another file in its place
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                yield
                return


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
