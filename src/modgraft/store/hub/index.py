"""What there is on a hub: versions, their tags, and which numbers were ever given.

    HUB/NAME/3/module.safetensors   a version
    HUB/.versions/NAME/3            the hash of what was given the number 3; it stays for good
    HUB/.versions/NAME/paper        3, the version of which ``paper`` is a tag
    HUB/.index.json                 what was read of these files, so that a look opens none of them

The index may be deleted: whoever finds a file that it lacks, or another one, reads that.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.store.card import Card
from modgraft.store.file import read_json, unreadable
from modgraft.store.folder import FILE
from modgraft.store.hub.remote import card_there, protocols
from modgraft.store.hub.search import Listed

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

INDEX = ".index.json"
GIVEN = ".versions"

WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,95}")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")


@dataclass
class Contents:
    """What there is.

    Attributes:
        rows: the versions, by name and number.
        broken: of those that cannot be read, what is wrong, by address.
        tags: the number that a tag stands for, by name and tag.
        given: the hashes of the modules that numbers were ever given to, by name and number.
        read: what the index is to hold: of each file a stamp and a text, by ``NAME@VERSION``.
    """

    rows: list[Listed] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    tags: dict[tuple[str, str], str] = field(default_factory=dict)
    given: dict[str, dict[int, str]] = field(default_factory=dict)
    read: dict[str, dict[str, str]] = field(default_factory=dict)

    def names(self) -> set[str]:
        """Return the names of modules."""
        return {row.name for row in self.rows} | {_split(each)[0] for each in self.broken}

    def meant(self, name: str) -> list[str]:
        """Return the addresses of ``NAME@VERSION``, of a tag's version, or of all of ``NAME``.

        They are in order, the newest last, and with them are those that are broken.
        """
        module, at, version = name.removeprefix("hub:").partition("@")
        found = [_split(each) for each in (*(row.address for row in self.rows), *self.broken)]
        version = self.tags.get((module, version), version)
        mine = [v for n, v in found if n == module and (not at or v == version)]
        return [f"hub:{module}@{v}" for v in sorted(mine, key=_age)]

    def tags_of(self, name: str, version: str) -> tuple[str, ...]:
        """Return the tags of a version."""
        return tuple(sorted(t for (n, t), v in self.tags.items() if (n, v) == (name, version)))

    def lost(self, name: str, sha: str) -> str:
        """Return the broken version of a module that has been what has this hash; "": none."""
        numbers = [n for n, given in self.given.get(name, {}).items() if given == sha]
        return next((str(n) for n in numbers if f"hub:{name}@{n}" in self.broken), "")

    def next_number(self, name: str) -> int:
        """Return a number that no version of a module has had."""
        return 1 + max(self.given.get(name, {}), default=0)


def contents(system: AbstractFileSystem, root: str, known: dict[str, dict[str, str]]) -> Contents:
    """Look at a hub's files, and read those that are not known.

    Args:
        system: the hub's file system.
        root: its folder.
        known: what the index holds.

    Raises:
        ModgraftError: for a hub that is a file.
    """
    look = _Look(system, root, known)
    if not system.exists(root):
        return look.found
    files: Any = system.find(root, maxdepth=3, detail=True)
    if root in files:
        raise ModgraftError(f"{root} is a file; a hub is a folder, or a URL of one")
    modules = []
    for path, info in files.items():
        folder, name, last, *more = (*path.removeprefix(root).strip("/").split("/"), "", "")
        if more != ["", ""] or not WORD.fullmatch(name):
            continue
        if folder == GIVEN:
            look.at_given(name, last, path, info)
        elif last == FILE and WORD.fullmatch(folder):
            modules.append((folder, name, path, info))
    for each in modules:  # when it is known what was given to whom
        look.at_version(*each)
    if "file" in protocols(system):
        look.at_closed_folders()
    look.found.rows.sort(key=lambda row: (row.name, _age(row.version)))
    return look.found


@dataclass
class _Look:
    """One look at a hub's files."""

    system: AbstractFileSystem
    root: str
    known: dict[str, dict[str, str]]
    found: Contents = field(default_factory=Contents)

    def _text(self, key: str, info: dict[str, Any], read: Callable[[], str]) -> str:
        stamp = _stamp(info)
        if self.known.get(key, {}).get("stamp") != stamp:
            self.known[key] = {"stamp": stamp, "text": read()}
        self.found.read[key] = self.known[key]
        return self.known[key]["text"]

    def at_given(self, name: str, word: str, path: str, info: dict[str, Any]) -> None:
        """Read what a number was given to, or which number a tag stands for."""
        read = partial(short, self.system, path)
        with suppress(FileNotFoundError):  # removed since it was listed
            if _NUMBER.fullmatch(word):
                sha = self._text(f"{name}@{word} given", info, read)
                self.found.given.setdefault(name, {})[int(word)] = sha
            elif WORD.fullmatch(word):
                self.found.tags[name, word] = self._text(f"{name}@{word}", info, read)

    def at_version(self, name: str, version: str, path: str, info: dict[str, Any]) -> None:
        """Read the card of a version, or find out what is wrong with it."""
        try:
            card = self._card(name, version, path, info)
        except FileNotFoundError:  # removed since it was listed
            return
        except (CheckpointError, PermissionError) as error:
            why = unreadable(path, error) if isinstance(error, OSError) else error
            self.found.read.pop(f"{name}@{version}", None)
            self.found.broken[f"hub:{name}@{version}"] = str(why)
            return
        tags = self.found.tags_of(name, version)
        self.found.rows.append(Listed(name, version, info["size"], card, tags))

    def _card(self, name: str, version: str, path: str, info: dict[str, Any]) -> Card:
        if not _NUMBER.fullmatch(version):
            raise CheckpointError(
                f"{path} is in no version's folder, which a number names; push it as {name}, with "
                f"{version} for its tag, and remove it here"
            )
        sha = self.found.given.setdefault(name, {}).setdefault(int(version), "")
        if info["type"] != "file":  # a pipe would be waited for
            raise CheckpointError(f"{path} is no plain file; remove it")
        read = partial(card_there, self.system, path, info["size"])
        card = Card.from_text(self._text(f"{name}@{version}", info, read), path)
        if sha not in ("", card.sha256):
            raise CheckpointError(
                f"{path} is the module with hash {card.sha256[:12]}, and this number was given to "
                f"{sha[:12]}, which it means for good: push that again, or remove this"
            )
        return card

    def at_closed_folders(self) -> None:
        """Find the versions in folders that may not be looked into.

        Raises:
            OSError: where that is the hub itself, or what says what was given.
        """
        for error in _closed(self.root):
            name, *version = str(error.filename).removeprefix(self.root).strip("/").split("/")
            if name == GIVEN or not name:
                raise error
            if WORD.fullmatch(name):
                for each in version or self.found.given.get(name) or ["?"]:
                    why = str(unreadable(error.filename, error))
                    self.found.broken[f"hub:{name}@{each}"] = why


def _closed(root: str) -> list[OSError]:
    """Return why folders of a hub may not be looked into, which fsspec passes over."""
    found = list[OSError]()
    for path, folders, _ in os.walk(root, onerror=found.append):
        if path.removeprefix(root).count(os.sep) == 2:
            folders.clear()
    return [error for error in found if not isinstance(error, FileNotFoundError)]


def short(system: AbstractFileSystem, path: str) -> str:
    """Read a file of a word or a hash."""
    with system.open(path, "rb") as file:
        return bytes(file.read(100)).decode(errors="replace").strip()  # type: ignore[arg-type]


def read_index(text: str | bytes) -> dict[str, dict[str, str]]:
    """Read an index; a damaged one is empty."""
    try:
        said = read_json(text)
    except ValueError:
        return {}
    fits = isinstance(said, dict) and all(
        isinstance(row, dict)
        and row.keys() == {"stamp", "text"}
        and all(isinstance(each, str) for each in row.values())
        for row in said.values()
    )
    return said if fits else {}


def index_text(read: dict[str, dict[str, str]]) -> str:
    """Write an index."""
    return json.dumps(read, ensure_ascii=False, indent=1)


def _split(address: str) -> tuple[str, str]:
    name, _, version = address.removeprefix("hub:").partition("@")
    return name, version


def _age(version: str) -> tuple[int, str]:
    """Return what versions are sorted by; what is no number comes first."""
    return (int(version) if _NUMBER.fullmatch(version) else 0), version


def _stamp(info: dict[str, Any]) -> str:
    """Return what tells whether a file is the one that was read, in any file system's words."""
    from fsspec.utils import tokenize

    return tokenize({key: value for key, value in info.items() if key != "atime"})
