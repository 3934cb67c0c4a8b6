"""Choose the note to write to: the one that is named, or the one that was used last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from modgraft.core.errors import MissingFileError, ModgraftError, listed
from modgraft.log.settings import FOLDERS, VARIABLE, read_table

if TYPE_CHECKING:
    from modgraft.log.settings import Settings

POINTER = "current"
"""The file beside the index that names the note used last."""


def home(*folders: str | Path) -> Path:
    """Return the folder for new notes: the first that is given or configured, else ``log``."""
    named = os.environ.get(VARIABLE)
    if folders:
        return Path(folders[0])
    if named:
        return Path(named.split(os.pathsep)[0])
    project, table = read_table(Path.cwd())
    base = project.parent if project else Path()
    return base / (table.get("folders") or FOLDERS)[0]


def find(name: str, settings: Settings) -> Path:
    """Find a note by name: a file, or a note in the log's folders, with or without ``.md``.

    Raises:
        MissingFileError: there is no such note; the error lists those that exist.
    """
    for path in (Path(name), *(folder / name for folder in settings.folders)):
        for there in (path, path.with_name(f"{path.name}.md"), path / "note.md"):
            if there.is_file():
                return there
    raise MissingFileError(
        f"no note is named {name!r}; {_existing(settings)}", file=settings.folders[0],
        remedy="Start it with modgraft log new NAME",
    )  # fmt: skip


def remember(note: Path, settings: Settings) -> None:
    """Store a note as the one used last, for commands that name none."""
    from modgraft.core.files import write_text

    beside = settings.index.parent
    beside.mkdir(parents=True, exist_ok=True)
    if not (beside / ".gitignore").exists():
        write_text(beside / ".gitignore", "*\n")
    write_text(beside / POINTER, f"{os.path.relpath(note, settings.root)}\n")


def current(settings: Settings) -> Path:
    """Return the note used last or, if none was, the only note.

    Raises:
        ModgraftError: there are several notes, or none, or the last one was deleted.
    """
    try:
        said = (settings.index.parent / POINTER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        notes = _notes(settings)
        if len(notes) == 1:
            return next(iter(notes.values()))
        raise ModgraftError(
            f"no note is being worked on: say which with --note NAME; {_existing(settings)}"
        ) from None
    path = settings.root / said
    if not path.is_file():
        raise MissingFileError(
            "the note that was worked on last is gone", file=path,
            remedy=f"Say which with --note NAME; {_existing(settings)}",
        )  # fmt: skip
    return path


def _notes(settings: Settings) -> dict[str, Path]:
    """Return name → path of the notes that lie directly in the log's folders."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in settings.folders
        for path in sorted(folder.glob("*.md"))
    }


def _existing(settings: Settings) -> str:
    names = list(_notes(settings))
    return f"there are: {listed(names, 8)}" if names else "there is none yet"
