"""Find the notes of a log: every ``*.md`` in its folders, whatever else lies there."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modgraft.log.syntax.note import Diagnostic, Severity

#: folders that hold no notes; hidden ones are not entered either
IGNORED_FOLDERS = frozenset({"node_modules", "__pycache__"})


@dataclass(frozen=True, slots=True)
class File:
    """A file with the stamp by which a change is noticed."""

    path: str
    stamp: tuple[int, int, int]


@dataclass
class FoundFiles:
    """The notes and the bibliographies of some folders, and the problems on the way."""

    notes: list[File] = field(default_factory=list)
    bibliographies: list[File] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)

    def add(self, severity: Severity, code: str, message: str, path: str) -> None:
        """Report a problem with a file or folder as a whole."""
        from modgraft.log.syntax.note import Diagnostic  # a query without problems needs no parser

        self.problems.append(Diagnostic(severity, code, message, 1, 0, 0, path))


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Return time, size and inode; a file that is written again differs in one of them."""
    return status.st_mtime_ns, status.st_size, status.st_ino


def find_notes(folders: tuple[Path, ...]) -> FoundFiles:
    """Find all notes below ``folders``, in the order of their paths.

    Links are followed. A folder or a note that is reached twice is listed once and reported, which
    also ends a loop of links.
    """
    found = FoundFiles()
    folders_seen: dict[tuple[int, int], str] = {}
    notes: dict[tuple[int, int], File] = {}
    links: list[os.DirEntry[str]] = []
    waiting = [str(folder) for folder in reversed(folders)]
    while waiting:
        folder = waiting.pop()
        try:
            status = Path(folder).stat()
            first = folders_seen.setdefault((status.st_dev, status.st_ino), folder)
            if first != folder:
                why = f"leads to {first}, which was read"
                found.add("info", "link", f"{why}; its notes are taken once", folder)
                continue
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda e: e.name, reverse=True)
        except OSError as error:
            found.add("error", "unreadable", str(error.strerror), folder)
            continue
        for entry in listed:
            if entry.is_symlink() and not _is_folder(entry):
                links.append(entry)
            elif _is_folder(entry):
                if not entry.name.startswith(".") and entry.name not in IGNORED_FOLDERS:
                    waiting.append(entry.path)
            else:
                _take(entry, found, notes)
    for entry in links:  # after the files, so that a note is known by its own path
        _take(entry, found, notes)
    found.notes.sort(key=lambda f: f.path)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a ring: reported when it is read
        return False


def _take(entry: os.DirEntry[str], found: FoundFiles, notes: dict[tuple[int, int], File]) -> None:
    name = entry.name.lower()
    if not name.endswith((".md", ".bib")):
        return
    try:
        status = entry.stat()
    except OSError as error:
        found.add("error", "unreadable", str(error.strerror), entry.path)
        return
    file = File(entry.path, stamp(status))
    if name.endswith(".bib"):
        found.bibliographies.append(file)
        return
    first = notes.setdefault((status.st_dev, status.st_ino), file)
    if first is file or not entry.is_symlink():
        found.notes.append(file)
    else:
        found.add("info", "link", f"leads to {first.path}, taken once", entry.path)
