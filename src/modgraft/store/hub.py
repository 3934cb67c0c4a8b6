"""A hub of modules: a folder, here or at any address that fsspec knows, with versions and an index.

    HUB/NAME/1/module.safetensors   and beside it what is written from it
    HUB/index.json                  the cards, so that a search opens no files

A version never changes, and is there when its file is there. The index is what was read from the
files: whoever finds one that it lacks reads that, and so it is never older than they are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from modgraft.core.errors import CheckpointError, MissingFileError, ModgraftError, UnknownNameError
from modgraft.core.files import locked, sync, whole, write_text
from modgraft.store.card import Card
from modgraft.store.file import CARD, Header, TensorFile, broken, read_json
from modgraft.store.folder import FILE, stored, verify, write_derived

INDEX = "index.json"
WHERE = "MODGRAFT_HUB"
"""The environment variable that says where the hub is; without it, ~/.local/share/modgraft/hub."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class Listed:
    """One version of a module on a hub.

    Attributes:
        name: its name there.
        version: 1, 2, …
        size: bytes of its file.
        card: its card.
    """

    name: str
    version: int
    size: int
    card: Card

    @property
    def address(self) -> str:
        """``NAME@VERSION``."""
        return f"{self.name}@{self.version}"


class Hub:
    """The modules at one address.

    Args:
        address: a folder, or a URL of fsspec (``s3://bucket/modules``, ``memory://hub``); None:
            what ``MODGRAFT_HUB`` says, or a folder in the home.

    Raises:
        ModgraftError: for an address that cannot be opened.
    """

    def __init__(self, address: str | Path | None = None) -> None:
        home = Path("~/.local/share/modgraft/hub").expanduser()
        self.address = str(address or os.environ.get(WHERE) or home)
        with _network(self.address):
            self._fs, self._root = url_to_fs(self.address)

    @property
    def folder(self) -> Path | None:
        """The hub's folder, if it is on this machine."""
        return Path(self._root) if isinstance(self._fs, fsspec.get_filesystem_class("file")) else None

    def listed(self) -> list[Listed]:
        """Return every version of every module, by name and number.

        Raises:
            ModgraftError: where the hub cannot be reached.
        """
        with _network(self.address):
            if not self._fs.exists(self._root):
                return []
            self._fs.invalidate_cache()
            found = self._fs.find(self._root, detail=True)
            known = self._index()
            rows, cards = [], {}
            for path, info in sorted(found.items()):
                place = self._place(path)
                if place is None:
                    continue
                key = f"{place[0]}@{place[1]}"
                if known.get(key, {}).get("size") != info["size"]:
                    known[key] = {"size": info["size"], "card": self._header(path, info["size"])}
                cards[key] = known[key]
                card = Card.from_text(cards[key]["card"], path)
                rows.append(Listed(*place, info["size"], card))
            if cards != self._index():
                self._write_index(cards)
        return sorted(rows, key=lambda row: (row.name, row.version))

    def _place(self, path: str) -> tuple[str, int] | None:
        """Return the name and version that a file in the hub is of, None if it is no module's."""
        parts = path.removeprefix(self._root.rstrip("/")).strip("/").split("/")
        if len(parts) != 3 or parts[2] != FILE or not parts[1].isdecimal():
            return None
        return parts[0], int(parts[1])

    def _index(self) -> dict[str, Any]:
        try:
            said = read_json(self._fs.cat_file(f"{self._root}/{INDEX}"))
        except (OSError, ValueError):  # it is made anew from the files
            return {}
        fits = isinstance(said, dict) and all(
            isinstance(row, dict) and isinstance(row.get("card"), str) for row in said.values()
        )
        return said if fits else {}

    def _write_index(self, cards: dict[str, Any]) -> None:
        text = json.dumps(cards, ensure_ascii=False, indent=1)
        try:
            if self.folder is not None:
                write_text(self.folder / INDEX, text)
            else:
                self._fs.pipe_file(f"{self._root}/{INDEX}", text.encode())
        except (PermissionError, NotImplementedError, OSError):
            return  # somebody else's hub: the next reader reads the files again

    def _header(self, path: str, size: int) -> str:
        with self._fs.open(path, "rb") as file:
            first = file.read(8)
            rest = file.read(Header.length(first, size, path) - 8)
        return Header(first + rest, size, path).metadata.get(CARD, "")

    def find(self, name: str) -> Listed:
        """Return a module by ``NAME``, its latest version, or ``NAME@VERSION``.

        Raises:
            UnknownNameError: with the nearest names.
        """
        name, _, version = name.partition("@")
        rows = self.listed()
        versions = [row for row in rows if row.name == name]
        if not versions:
            raise UnknownNameError.among("module on this hub", name, {row.name for row in rows})
        if not version:
            return versions[-1]
        found = next((row for row in versions if str(row.version) == version), None)
        if found is None:
            have = ", ".join(str(row.version) for row in versions)
            raise UnknownNameError(f"{name!r} has no version {version!r} here; there are {have}")
        return found

    def push(self, folder: Path, name: str | None = None) -> Listed:
        """Add the module in a folder as the next version of ``name``; an equal one is not added.

        Raises:
            CheckpointError: for a folder whose module is damaged.
            ModgraftError: for a name that cannot be one.
        """
        if reason := verify(folder):
            raise CheckpointError(f"{folder} is not pushed: {reason}")
        file = TensorFile(folder / FILE)
        card = Card.from_text(file.metadata[CARD], file.path)
        name = _checked(name or card.names[-1])
        versions = [row for row in self.listed() if row.name == name]
        if versions and versions[-1].card.sha256 == card.sha256:
            return versions[-1]
        number = versions[-1].version + 1 if versions else 1
        if self.folder is not None:
            with locked(self.folder, INDEX):  # nobody else counts versions now
                while (place := self.folder / name / str(number)).exists():
                    number += 1
                _copy(folder / FILE, place / FILE)
                write_derived(card, place)
        else:
            with _network(self.address):
                place = f"{self._root}/{name}/{number}"
                self._fs.makedirs(place, exist_ok=True)
                for each in ("module.json", "README.md", FILE):  # the last makes it a version
                    if (folder / each).is_file():
                        self._fs.put_file(str(folder / each), f"{place}/{each}")
        return self.find(f"{name}@{number}")

    def pull(self, name: str, to: Path) -> Listed:
        """Fetch a module into a folder, whole or not at all, and verify it there.

        Args:
            name: ``NAME`` or ``NAME@VERSION``.
            to: the folder; a module that is there is replaced.

        Raises:
            UnknownNameError: for a name that is not on the hub.
            CheckpointError: for a file that is damaged, here or there; what was in the folder
                stays.
        """
        row = self.find(name)
        source = f"{self._root}/{row.name}/{row.version}/{FILE}"
        with locked(to, FILE):
            with whole(to / FILE) as part, _network(self.address):
                self._fs.get_file(source, str(part))
                _check(part, row)
            write_derived(row.card, to)
        return row

    def remove(self, name: str) -> list[Listed]:
        """Remove ``NAME@VERSION``, or every version of ``NAME``; return what is gone."""
        row = self.find(name)
        gone = [each for each in self.listed() if each.name == row.name]
        gone = [each for each in gone if "@" not in name or each.version == row.version]
        with _network(self.address):
            for each in gone:
                path = f"{self._root}/{each.name}/{each.version}"
                self._fs.rm_file(f"{path}/{FILE}")  # without it, it is no version
                self._fs.rm(path, recursive=True)
            if len(gone) == len([each for each in self.listed() if each.name == row.name]) == 0:
                self._fs.rm(f"{self._root}/{row.name}", recursive=True)
        self.listed()
        return gone

    def rename(self, name: str, new: str) -> None:
        """Give a module with all its versions another name.

        Raises:
            ModgraftError: for a name that is in use, or cannot be one.
        """
        old, new = self.find(name).name, _checked(new)
        if any(row.name == new for row in self.listed()):
            raise ModgraftError(f"{new!r} is on this hub already; choose another name")
        with _network(self.address):
            self._fs.mv(f"{self._root}/{old}", f"{self._root}/{new}", recursive=True)
        self.listed()

    def verify(self, name: str | None = None) -> dict[str, str]:
        """Read versions wholly, and say what is wrong with those that are damaged, by address."""
        rows = self.listed() if name is None else [self.find(name)]
        wrong = {}
        for row in rows:
            with _local(self, row) as file:
                try:
                    _check(file, row)
                except CheckpointError as error:
                    wrong[row.address] = str(error)
        return wrong


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as part:
        shutil.copyfile(source, part)
    sync(target.parent.parent)


def _check(path: Path, row: Listed) -> None:
    """Refuse a file that is not, to the last bit, the module that the hub lists."""
    file = TensorFile(path)
    card = Card.from_text(file.metadata.get(CARD, ""), path)
    if card.sha256 != row.card.sha256 or file.digest() != card.tensors:
        raise CheckpointError(
            f"{row.address}: the file is not what the hub lists (its hash is another one); it was "
            f"changed or cut on its way: pull it again, or push it anew"
        )


@contextmanager
def _local(hub: Hub, row: Listed) -> Iterator[Path]:
    """Give a version's file on this machine."""
    path = f"{hub._root}/{row.name}/{row.version}/{FILE}"
    if hub.folder is not None:
        yield Path(path)
        return
    with fsspec.open_local(f"filecache::{hub._fs.unstrip_protocol(path)}") as _:
        yield Path(path)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ModgraftError(
            f"{name!r:.80} cannot be a module's name on a hub: letters, digits, '_', '-' and '.', "
            f"a letter or digit first"
        )
    return name


@contextmanager
def _network(address: str) -> Iterator[None]:
    """Say where something could not be reached, instead of what a library says."""
    try:
        yield
    except ModgraftError:
        raise
    except ImportError as error:  # fsspec's, of a protocol's package
        raise ModgraftError(f"{address}: {error}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise MissingFileError("there is no such file", file=str(error)) from error
        raise ModgraftError(
            f"{address} cannot be used ({type(error).__name__}: {str(error)[:200]}); see the "
            f"address, the network and what you may write there"
        ) from error
