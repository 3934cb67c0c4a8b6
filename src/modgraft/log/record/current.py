"""Which note is meant: by its name, or the one that was worked on last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from modgraft.core.errors import MissingFileError, ModgraftError
from modgraft.log.settings import FOLDERS, VARIABLE, read_table

if TYPE_CHECKING:
    from modgraft.log.settings import Settings

POINTER = "current"
"""The file beside the index that says which note was worked on last."""


def home(*folders: str | Path) -> Path:
    """Where a new note goes: the first folder that is given or configured, else ``log``."""
    named = os.environ.get(VARIABLE)
    if folders:
        return Path(folders[0])
    if named:
        return Path(named.split(os.pathsep)[0])
    project, table = read_table(Path.cwd())
    base = project.parent if project else Path()
    return base / (table.get("folders") or FOLDERS)[0]


def find(name: str, settings: Settings) -> Path:
    """The note of that name: a file, or one in the log's folders, with or without ``.md``.

    Raises:
        MissingFileError: there is none; what there is is named.
    """
    for path in (Path(name), *(folder / name for folder in settings.folders)):
        for there in (path, path.with_name(f"{path.name}.md"), path / "note.md"):
            if there.is_file():
                return there
    raise MissingFileError(
        f"no note is named {name!r}; {_there(settings)}", file=settings.folders[0],
        remedy="Start it with modgraft log new NAME",
    )  # fmt: skip


def remember(note: Path, settings: Settings) -> None:
    """Make it the one that is meant where none is named."""
    from modgraft.core.files import write_text

    beside = settings.index.parent
    beside.mkdir(parents=True, exist_ok=True)
    if not (beside / ".gitignore").exists():
        write_text(beside / ".gitignore", "*\n")
    write_text(beside / POINTER, f"{os.path.relpath(note, settings.root)}\n")


def current(settings: Settings) -> Path:
    """The note that was worked on last; where none was yet, the only one there is.

    Raises:
        ModgraftError: there are several, or none, or the last one is gone.
    """
    try:
        said = (settings.index.parent / POINTER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        notes = _notes(settings)
        if len(notes) == 1:
            return next(iter(notes.values()))
        raise ModgraftError(
            f"no note is being worked on: say which with --note NAME; {_there(settings)}"
        ) from None
    path = settings.root / said
    if not path.is_file():
        raise MissingFileError(
            "the note that was worked on last is gone", file=path,
            remedy=f"Say which with --note NAME; {_there(settings)}",
        )  # fmt: skip
    return path


def _notes(settings: Settings) -> dict[str, Path]:
    """What people wrote: the notes that lie in the folders themselves, by their names."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in settings.folders
        for path in sorted(folder.glob("*.md"))
    }


def _there(settings: Settings, most: int = 8) -> str:
    names = list(_notes(settings))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"there are: {', '.join(names[:most])}{more}" if names else "there is none yet"
