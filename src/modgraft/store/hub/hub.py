"""A hub of modules: a folder, here or at any address that fsspec knows, with versions and an index.

    HUB/NAME/VERSION/module.safetensors   and beside it what is written from it for people
    HUB/.index.json                       the cards, so that a search opens no files

A version is there when its file is there, and never changes. The index holds what was read of the
files: whoever finds a file that it lacks, or another one, reads that, so that it may be deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from modgraft.core.errors import CheckpointError, ModgraftError, UnknownNameError
from modgraft.core.files import locked, whole, write_text
from modgraft.store import former
from modgraft.store.card import CARD_FILE, Card
from modgraft.store.file import read_json
from modgraft.store.folder import FILE, README, write_derived
from modgraft.store.hub.remote import card_there, check_file, filesystem, identity, reached
from modgraft.store.hub.search import Listed, search

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

INDEX = ".index.json"
WHERE = "MODGRAFT_HUB"
"""The environment variable that says where the hub is; without it, ~/.local/share/modgraft/hub."""

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,95}")


class Hub:
    """The modules in one place.

    Args:
        address: a folder, or a URL of fsspec (``s3://bucket/modules``, ``memory://hub``); None:
            what ``MODGRAFT_HUB`` says, or a folder in the home.

    Raises:
        ModgraftError: for an address that cannot be opened.
    """

    def __init__(self, address: str | Path | None = None) -> None:
        home = Path("~/.local/share/modgraft/hub").expanduser()
        self.address = str(address or os.environ.get(WHERE) or home)
        if self.address.startswith(("hf:", "hub:")):
            raise ModgraftError(
                f"{self.address} is the address of a module; a hub is a folder or a URL of one, "
                f"such as s3://bucket/modules"
            )
        self._system, self._root = filesystem(self.address)
        protocol = self._system.protocol
        local = "file" in ([protocol] if isinstance(protocol, str) else protocol)
        self.folder = Path(self._root) if local else None

    # -- looking ----------------------------------------------------------------------------------

    def listed(self) -> list[Listed]:
        """Return every version of every module, by name and age.

        Raises:
            ModgraftError: where the hub cannot be reached.
        """
        return self._scan()[0]

    def _scan(self) -> tuple[list[Listed], dict[str, str]]:
        """Return the versions, and what is wrong with those whose files cannot be read."""
        with reached(self.address):
            self._system.invalidate_cache()
            if not self._system.exists(self._root):
                return [], {}
            files: Any = self._system.find(self._root, maxdepth=3, detail=True)
            known = self._index()
            rows, broken, index = [], {}, {}
            for path, info in files.items():
                if (place := self._place(path)) is None:
                    continue
                key, stamp = "@".join(place), _stamp(info)
                try:
                    if info["type"] != "file":  # a pipe would be waited for
                        raise CheckpointError(f"{path} is no plain file; remove it")
                    if key not in known or known[key]["stamp"] != stamp:
                        text = card_there(self._system, path, info["size"])
                        known[key] = {"stamp": stamp, "card": text}
                    card = Card.from_text(known[key]["card"], path)
                    rows.append(Listed(*place, info["size"], card))
                    index[key] = known[key]
                except CheckpointError as error:
                    broken[f"hub:{key}"] = str(error)
            if index != self._index():
                self._write_index(index)
        return sorted(rows, key=lambda row: row.order), broken

    def _place(self, path: str) -> tuple[str, str] | None:
        """Return the name and version that a file is of, None if it is no module's."""
        parts = path.removeprefix(self._root).strip("/").split("/")
        if len(parts) != 3 or parts[2] != FILE or not all(map(_WORD.fullmatch, parts[:2])):
            return None
        return parts[0], parts[1]

    def _index(self) -> dict[str, dict[str, str]]:
        try:
            said = read_json(self._system.cat_file(f"{self._root}/{INDEX}"))
        except (OSError, ValueError):  # none, or a damaged one: it is made anew from the files
            return {}
        fits = isinstance(said, dict) and all(
            isinstance(row, dict)
            and row.keys() == {"stamp", "card"}
            and isinstance(row["card"], str)
            for row in said.values()
        )
        return said if fits else {}

    def _write_index(self, index: dict[str, dict[str, str]]) -> None:
        text = json.dumps(index, ensure_ascii=False, indent=1)
        try:
            if self.folder is not None:
                write_text(self.folder / INDEX, text)
            else:
                self._system.pipe_file(f"{self._root}/{INDEX}", text.encode())
        except (OSError, NotImplementedError):  # not ours to write: everyone reads the files
            return

    def find(self, name: str) -> Listed:
        """Return a module by ``NAME``, the newest version, or ``NAME@VERSION``.

        The newest is that with the highest number; where there are only tags, the one made last.

        Raises:
            UnknownNameError: with what there is.
        """
        name = name.removeprefix("hub:")
        rows, broken = self._scan()
        if why := broken.get(f"hub:{name}"):
            raise CheckpointError(why)
        if name and (found := [row for row in rows if _is(row.address, name)]):
            return found[-1]
        name, _, version = name.partition("@")
        if have := [row.version for row in rows if row.name == name]:
            raise UnknownNameError(
                f"{name!r} has no version {version!r} on the hub {self.address}; there are "
                f"{', '.join(have)}"
            )
        names = {row.name for row in rows}
        raise UnknownNameError.among(f"module on the hub {self.address}", name, names)

    def search(self, text: str = "", **conditions: Any) -> list[Listed]:
        """Return the versions that some conditions hold for: `modgraft.store.hub.search`."""
        return search(self.listed(), text, **conditions)

    def place(self, row: Listed) -> str:
        """Return the path of a version's folder in the hub's file system."""
        return f"{self._root}/{row.name}/{row.version}"

    def opened(self, row: Listed) -> tuple[AbstractFileSystem, str]:
        """Return the hub's file system, and a version's folder in it."""
        return self._system, self.place(row)

    def verify(self, name: str = "") -> dict[str, str]:
        """Read versions to the last bit: of all modules, of ``NAME``, or ``NAME@VERSION``.

        Returns:
            For each of them what is wrong with it, or "".
        """
        rows, broken = self._scan()
        name = name.removeprefix("hub:")
        found = {row.address: self._why_broken(row) for row in rows if _is(row.address, name)}
        found |= {address: why for address, why in broken.items() if _is(address, name)}
        if name and not found:
            self.find(name)
        return found

    def _why_broken(self, row: Listed) -> str:
        try:
            with TemporaryDirectory() as scratch, reached(self.address):
                if (path := self.folder) is not None:
                    path = path / row.name / row.version / FILE
                else:
                    path = Path(scratch, FILE)
                    self._system.get_file(f"{self.place(row)}/{FILE}", str(path))
                check_file(path, row.card.sha256, row.address)
        except CheckpointError as error:
            return str(error)
        return ""

    # -- changing ---------------------------------------------------------------------------------

    def push(
        self, folder: Path, name: str = "", version: str = "", *, dry_run: bool = False
    ) -> Listed:
        """Add the module in a folder as a version of ``name``.

        Args:
            folder: the module's.
            name: what to call it here; "": as the module is called.
            version: a tag; "": the next number, or the version that has the same hash already.
            dry_run: whether to write nothing, and only to return what would be there.

        Raises:
            CheckpointError: for a folder whose module is damaged, or of another tool.
            ModgraftError: for a name or tag that cannot be one, or a tag that is another module's.
        """
        sha, card = identity(folder)
        if card is None:
            raise CheckpointError(
                f"{folder} is another tool's, and has no card that a hub could list; host.load it "
                f"and host.save it, or push it to hf:USER/REPO as it is"
            )
        check_file(folder / FILE, sha, str(folder))
        if not name and len(card.names) > 1:
            raise ModgraftError(
                f"{folder} holds {', '.join(card.names)}; say what they are called together"
            )
        name = checked(name or card.names[-1], "name")
        if version and checked(version, "tag").isdecimal():
            raise ModgraftError(
                f"the tag {version!r} is a number, which the hub gives: leave it out"
            )
        if dry_run:
            return self._add(folder, card, name, version, dry_run)
        with self._alone():  # nobody else gives a number now
            return self._add(folder, card, name, version, dry_run)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until nobody else changes the hub, where that can be known, and say what fails."""
        one = nullcontext() if self.folder is None else locked(self.folder, INDEX, wait=True)
        with reached(self.address), one:
            yield

    def _add(self, folder: Path, card: Card, name: str, version: str, dry_run: bool) -> Listed:
        rows, broken = self._scan()
        versions = [row for row in rows if row.name == name]
        same = [row for row in versions if version in ("", row.version)]
        if there := [row for row in same if row.card.sha256 == card.sha256]:
            if dry_run or not self._why_broken(there[-1]):
                return there[-1]
            version, same = there[-1].version, []  # it is written again, whole
        if version and (same or f"hub:{name}@{version}" in broken):
            raise ModgraftError(
                f"{name}@{version} is on the hub with another hash, and a version never changes: "
                f"choose another tag, or remove that one"
            )
        all_of_it = [row.address for row in versions] + [a for a in broken if _is(a, name)]
        numbers = [int(v) for a in all_of_it if (v := a.rpartition("@")[2]).isdecimal()]
        version = version or str(max(numbers, default=0) + 1)
        if dry_run:
            return Listed(name, version, (folder / FILE).stat().st_size, card)
        if self.folder is not None:
            put(folder / FILE, self.folder / name / version, card)
        else:
            place = f"{self._root}/{name}/{version}"
            with TemporaryDirectory() as scratch:
                write_derived(card, Path(scratch))
                self._system.makedirs(place, exist_ok=True)
                for each in (Path(scratch, CARD_FILE), Path(scratch, README), folder / FILE):
                    self._system.put_file(str(each), f"{place}/{each.name}")  # the last is all
        return self.find(f"{name}@{version}")

    def versions(self, name: str) -> list[str]:
        """Return the addresses that ``NAME`` or ``NAME@VERSION`` means, those that are broken too.

        Raises:
            UnknownNameError: if there is none.
        """
        rows, broken = self._scan()
        found = [*(row.address for row in rows), *broken]
        found = [address for address in found if name and _is(address, name.removeprefix("hub:"))]
        return found or [self.find(name).address]

    def remove(self, name: str) -> list[str]:
        """Remove ``NAME@VERSION``, or every version of ``NAME``, and return their addresses."""
        gone = self.versions(name)
        with self._alone():
            for address in gone:
                path = f"{self._root}/{address.removeprefix('hub:').replace('@', '/')}"
                self._system.rm_file(f"{path}/{FILE}")  # without it, it is no version
                if self._system.exists(path):
                    self._system.rm(path, recursive=True)
            left = f"{self._root}/{name.removeprefix('hub:').partition('@')[0]}"
            if self._system.exists(left) and not self._system.find(left):
                self._system.rm(left, recursive=True)
        self.listed()
        return gone

    def rename(self, name: str, new: str) -> None:
        """Give a module with all its versions another name.

        Raises:
            ModgraftError: for a name that is in use, or cannot be one.
        """
        if "@" in name:
            raise ModgraftError(
                f"{name!r}: a name is changed for all versions; write {name.partition('@')[0]!r}"
            )
        old = self.find(name).name
        checked(new, "name")
        with self._alone():
            if self._system.exists(f"{self._root}/{new}"):
                raise ModgraftError(f"{new!r} is on the hub already; choose another name")
            self._system.mv(f"{self._root}/{old}", f"{self._root}/{new}", recursive=True)
        self.listed()


def checked(word: str, what: str) -> str:
    """Refuse a name or a tag that cannot be one, such as a path."""
    if not _WORD.fullmatch(word):
        raise ModgraftError(
            f"{word!r:.80} cannot be a module's {what} on a hub: letters, digits and '_.+-', a "
            f"letter or digit first"
        )
    return word


def _is(address: str, name: str) -> bool:
    """Return whether a version is meant by ``NAME``, ``NAME@VERSION``, or "", which is all."""
    return not name or f"{address}@".startswith(f"hub:{name}@")


def _stamp(info: dict[str, Any]) -> str:
    """Return what tells whether a file is the one that was read, in any file system's words."""
    from fsspec.utils import tokenize

    return tokenize({key: value for key, value in info.items() if key != "atime"})


def put(file: Path, folder: Path, card: Card) -> None:
    """Copy a module's file into a folder, whole or not at all, and write what is derived of it.

    Raises:
        CheckpointError: for a file that is not, to the last bit, the one that has this card.
    """
    with locked(folder, FILE, CARD_FILE, README):
        with whole(folder / FILE) as part:
            shutil.copyfile(file, part)
            check_file(part, card.sha256, str(file))
        write_derived(card, folder)
        (folder / former.HOST_FILE).unlink(missing_ok=True)
