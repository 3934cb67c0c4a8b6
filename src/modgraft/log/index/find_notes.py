"""Which files are notes: every ``*.md`` in the folders, whatever lies in the way."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

#: folders that hold no notes of one's own; hidden ones are not entered either
PASSED_OVER = frozenset({"node_modules", "__pycache__"})


@dataclass(frozen=True, slots=True)
class File:
    """A file, and by what it is seen to have changed."""

    path: str
    stamp: tuple[int, int, int]


@dataclass
class Found:
    """The notes, the bibliographies, and what was in the way, one line each."""

    notes: list[File] = field(default_factory=list)
    bibliographies: list[File] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Time, size and inode: a file that was written again differs in one of them."""
    return status.st_mtime_ns, status.st_size, status.st_ino


def walk(folders: tuple[Path, ...]) -> Found:
    """All notes below ``folders``, in the order of their paths.

    Links are followed. A folder or a note that is reached twice is taken once and reported: a loop
    of links ends there.
    """
    found = Found()
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
                found.problems.append(f"{folder}:1: info link {why}; its notes are taken once")
                continue
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda e: e.name, reverse=True)
        except OSError as error:
            found.problems.append(f"{folder}:1: error unreadable {error.strerror}")
            continue
        for entry in listed:
            if entry.is_symlink() and not _is_folder(entry):
                links.append(entry)
            elif _is_folder(entry):
                if not entry.name.startswith(".") and entry.name not in PASSED_OVER:
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


def _take(entry: os.DirEntry[str], found: Found, notes: dict[tuple[int, int], File]) -> None:
    name = entry.name.lower()
    if not name.endswith((".md", ".bib")):
        return
    try:
        status = entry.stat()
    except OSError as error:
        found.problems.append(f"{entry.path}:1: error unreadable {error.strerror}")
        return
    file = File(entry.path, stamp(status))
    if name.endswith(".bib"):
        found.bibliographies.append(file)
        return
    first = notes.setdefault((status.st_dev, status.st_ino), file)
    if first is file or not entry.is_symlink():
        found.notes.append(file)
    else:
        found.problems.append(f"{entry.path}:1: info link leads to {first.path}, taken once")
