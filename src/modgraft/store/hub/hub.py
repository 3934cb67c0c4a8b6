"""A hub of modules: a folder, here or at any address that fsspec knows, with versions and an index.

    HUB/NAME/3/module.safetensors   and beside it what is written from it for people

A version is there when its file is there, and never changes. Its number is given once, also where
two push at the same time; a tag is another name of a version. `modgraft.store.hub.index` has the
files that say so.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from modgraft.core.errors import CheckpointError, ModgraftError, UnknownNameError
from modgraft.core.files import folder_path, locked, whole, write_text
from modgraft.store import former
from modgraft.store.card import CARD_FILE, Card
from modgraft.store.folder import FILE, README, write_derived
from modgraft.store.hub.given import Given, check_case, checked
from modgraft.store.hub.index import INDEX, Contents, contents, index_text, read_index
from modgraft.store.hub.remote import (
    bar,
    check_file,
    filesystem,
    identity,
    protocols,
    reached,
    tell,
)
from modgraft.store.hub.search import Listed, search

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

WHERE = "MODGRAFT_HUB"
"""The environment variable that says where the hub is; without it, ~/.local/share/modgraft/hub."""


class Hub:
    """The modules in one place.

    >>> hub = mg.Hub()
    >>> hub.push(host.save("qa", "modules/qa"))
    >>> host.load("hub:qa")

    Args:
        address: a folder, or a URL of fsspec (``s3://bucket/modules``, ``memory://hub``); None:
            your hub, where ``MODGRAFT_HUB`` says, or a folder in the home.

    Attributes:
        address: where it is.
        yours: whether it is your hub, and not one that was named.
        folder: the folder, None for a hub at a URL.

    Raises:
        ModgraftError: for an address that cannot be opened, or a file.
    """

    def __init__(self, address: str | Path | None = None) -> None:
        self.yours = address is None
        if address is None:
            address = os.environ.get(WHERE) or Path("~/.local/share/modgraft/hub").expanduser()
        self.address = address if isinstance(address, str) else str(folder_path(address, "Hub"))
        if not self.address:
            raise ModgraftError('a hub is a folder or a URL of one, and "" is none')
        if self.address.startswith(("hf:", "hub:")):
            raise ModgraftError(
                f"{self.address} is the address of a module; a hub is a folder or a URL of one, "
                f"such as s3://bucket/modules"
            )
        self._system, self._root = filesystem(self.address)
        local = "file" in protocols(self._system)
        self.folder = folder_path(self._root, f"the hub {self.address}") if local else None
        self._given = Given(self._system, self._root, local)

    # -- looking ----------------------------------------------------------------------------------

    def listed(self, name: str = "") -> list[Listed]:
        """Return the versions of all modules by name and number, or those that ``name`` means.

        Args:
            name: ``NAME``, ``NAME@VERSION`` or ``NAME@TAG``; "": all there are.

        Raises:
            UnknownNameError: where there is none of that name.
            ModgraftError: where the hub cannot be reached.
        """
        there = self._contents()
        meant = self._meant(there, name) if name else []
        return [row for row in there.rows if not name or row.address in meant]

    def _contents(self) -> Contents:
        """Look at the files, and keep what was read of them in the index."""
        with reached(self.address):
            self._system.invalidate_cache()
            try:
                known = read_index(self._system.cat_file(f"{self._root}/{INDEX}"))
            except OSError:  # none: it is made from the files
                known = {}
            before = dict(known)
            there = contents(self._system, self._root, known)
            if there.read != before:
                self._write_index(index_text(there.read))
        return there

    def _write_index(self, text: str) -> None:
        try:
            if self.folder is not None:
                write_text(self.folder / INDEX, text)
            else:
                self._system.pipe_file(f"{self._root}/{INDEX}", text.encode())
        except (OSError, NotImplementedError):  # not ours to write: everyone reads the files
            return

    def _meant(self, there: Contents, name: str) -> list[str]:
        """Return the addresses that a name means, with those that are broken.

        Raises:
            UnknownNameError: if there is none.
        """
        if found := there.meant(name):
            return found
        module, _, version = name.removeprefix("hub:").partition("@")
        if not (have := there.meant(module)):
            raise UnknownNameError.among(f"module on the hub {self.address}", module, there.names())
        once = version in map(str, there.given.get(module, ()))
        tags = [tag for name, tag in sorted(there.tags) if name == module]
        raise UnknownNameError(
            f"{module!r} has no version {version!r} on the hub {self.address}"
            f"{' any more: it was removed' * once}; there are "
            f"{', '.join([*(each.partition('@')[2] for each in have), *tags])}"
        )

    def find(self, name: str) -> Listed:
        """Return a version by ``NAME@VERSION`` or ``NAME@TAG``; by ``NAME``, the newest.

        The newest is the one that was pushed last, which has the highest number.

        Raises:
            UnknownNameError: with what there is.
            CheckpointError: for one that is broken.
        """
        there = self._contents()
        address = self._meant(there, name)[-1]
        if why := there.broken.get(address):
            raise CheckpointError(f"{address}: {why}")
        return next(row for row in there.rows if row.address == address)

    def broken(self) -> dict[str, str]:
        """Return the versions that cannot be read, and why: by address."""
        return self._contents().broken

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
        """Read versions to the last bit: of all modules, or those that ``name`` means.

        Returns:
            For each of them what is wrong with it, or "".
        """
        there = self._contents()
        found = {row.address: row for row in there.rows}
        meant = self._meant(there, name) if name else [*found, *there.broken]
        return {each: there.broken.get(each) or self._why_broken(found[each]) for each in meant}

    def _why_broken(self, row: Listed) -> str:
        try:
            with TemporaryDirectory() as scratch, reached(self.address):
                if (path := self.folder) is not None:
                    path = path / row.name / row.version / FILE
                else:
                    path = Path(scratch, FILE)
                    tell(row.address, {FILE: row.size})
                    self._system.get_file(
                        f"{self.place(row)}/{FILE}", str(path), callback=bar(FILE)
                    )
                check_file(path, row.card.sha256, row.address)
        except ModgraftError as error:
            return str(error)
        return ""

    # -- changing ---------------------------------------------------------------------------------

    def push(
        self,
        folder: str | Path,
        name: str | None = None,
        tag: str | None = None,
        *,
        dry_run: bool = False,
    ) -> Listed:
        """Add the module in a folder as a version of ``name``, unless its hash is there already.

        Args:
            folder: the module's.
            name: what to call it here; None or "": as the module is called.
            tag: what else to call this version; None or "": nothing.
            dry_run: whether to write nothing, and only to return what would be there.

        Raises:
            CheckpointError: for a folder whose module is damaged, or of another tool.
            ModgraftError: for a name or tag that cannot be one, or a tag of another version.
        """
        folder = folder_path(folder, "hub.push")
        sha, card = identity(folder)
        if card is None:
            raise CheckpointError(
                f"{folder} is another tool's, and has no card that a hub could list; `modgraft "
                f"convert` writes it as ours, or push it to hf:USER/REPO as it is"
            )
        check_file(folder / FILE, sha, str(folder))
        if not name and len(card.names) > 1:
            raise ModgraftError(
                f"{folder} holds {', '.join(card.names)}; say what they are called together: "
                f"hub.push({str(folder)!r}, 'NAME'), modgraft hub push {folder} NAME"
            )
        name, tag = checked(name or card.names[-1], "name"), tag or ""
        if tag and checked(tag, "tag").isdecimal():
            raise ModgraftError(f"the tag {tag!r} is a number, which the hub gives: leave it out")
        size = (folder / FILE).stat().st_size
        if dry_run:
            return self._planned(self._contents(), Listed(name, "", size, card), tag)
        with self._alone():
            there = self._contents()
            row = self._planned(there, Listed(name, "", size, card), tag)
            if row.address not in there.meant(name):
                row = replace(row, version=self._given.number(name, int(row.version), sha))
                self._put(folder / FILE, row)
            elif self._why_broken(row):
                self._put(folder / FILE, row)  # again, whole
            if tag and tag not in row.tags:
                self._tag(row, tag)
            rows = self._contents().rows
        found = next((each for each in rows if each.address == row.address), None)
        if found is None or found.card.sha256 != sha:
            raise ModgraftError(
                f"somebody else pushed {row.address} at the same moment, and {self.address} cannot "
                f"hold one of two off: push again"
            )
        return found

    def _planned(self, there: Contents, new: Listed, tag: str) -> Listed:
        """Return the version that has the hash of a new one, or the new one with its number."""
        check_case(there.names(), new.name)
        check_case({other for name, other in there.tags if name == new.name}, tag)
        same = [row for row in there.rows if row.name == new.name]
        same = [row for row in same if row.card.sha256 == new.card.sha256]
        if tag and (named := there.meant(f"{new.name}@{tag}")):
            same = [row for row in same if row.address in named]
            if not same:
                raise ModgraftError(
                    f"{new.name}@{tag} is on the hub with another hash, as {named[0]}: "
                    f"choose another tag, or move this one: hub.remove('{new.name}@{tag}') or "
                    f"`modgraft hub remove {new.name}@{tag}` takes the tag alone away; then push "
                    f"again"
                )
        if same:
            return same[-1]
        lost = there.lost(new.name, new.card.sha256)
        return replace(new, version=lost or str(there.next_number(new.name)))

    def _put(self, file: Path, row: Listed) -> None:
        """Write a version's folder."""
        if self.folder is not None:
            put(file, self.folder / row.name / row.version, row.card)
            return
        if not self._given.exclusive:
            print(
                f"{self.address}: of two pushes at the same moment, this protocol cannot hold one "
                f"off; let one push at a time",
                file=sys.stderr,
            )
        with TemporaryDirectory() as scratch:
            write_derived(row.card, Path(scratch))
            self._system.makedirs(self.place(row), exist_ok=True)
            tell(f"{row.address} on {self.address}", {FILE: row.size}, "sending")
            for each in (Path(scratch, CARD_FILE), Path(scratch, README), file):
                target = f"{self.place(row)}/{each.name}"
                self._system.put_file(str(each), target, callback=bar(each.name))  # the last is all

    def _tag(self, row: Listed, tag: str) -> None:
        """Give a version a tag, which another version that is there does not have."""
        if self._given.create(row.name, tag, row.version):
            return
        there = self._contents()
        if row.address in (named := there.meant(f"{row.name}@{tag}")):
            return
        if named:
            raise ModgraftError(
                f"{row.address} is there, but not as {tag}: somebody else gave that tag at the "
                f"same moment, to {named[0]}; push again with another tag"
            )
        self._given.drop(row.name, tag)  # of a version that was removed by who was killed then
        self._given.create(row.name, tag, row.version)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until nobody else changes the hub, where that can be known, and say what fails."""
        one = nullcontext() if self.folder is None else locked(self.folder, INDEX, wait=True)
        with reached(self.address), one:
            self._given.clean()
            yield

    def versions(self, name: str) -> list[str]:
        """Return the addresses that a name means, those that are broken too.

        Raises:
            UnknownNameError: if there is none.
        """
        return self._meant(self._contents(), name)

    def remove(self, name: str, *, dry_run: bool = False) -> list[str]:
        """Remove ``NAME@VERSION``, every version of ``NAME``, or of ``NAME@TAG`` the tag alone.

        The number of a version is not given again, so that nothing that names it means another
        module. A tag that was removed may be given again, to another version: so it is moved.

        Args:
            name: what is removed.
            dry_run: whether to remove nothing.

        Returns:
            The addresses that mean nothing afterwards: of versions, or ``hub:NAME@TAG``.

        Raises:
            UnknownNameError: if there is none.
        """
        gone = self._removed(self._contents(), name)
        if dry_run:
            return gone
        with self._alone():
            there = self._contents()
            gone = self._removed(there, name)
            if self._is_tag(there, name):
                self._given.drop(*gone[0].removeprefix("hub:").split("@"))
                self._contents()
                return gone
            hashes = {row.address: row.card.sha256 for row in there.rows}
            for address in gone:
                module, _, version = address.removeprefix("hub:").partition("@")
                self._given.create(module, version, hashes.get(address, ""))
                path = f"{self._root}/{module}/{version}"
                self._system.rm_file(f"{path}/{FILE}")  # without it, it is no version
                for tag in there.tags_of(module, version):
                    self._given.drop(module, tag)
                if self._system.exists(path):
                    self._system.rm(path, recursive=True)
            left = f"{self._root}/{gone[0].removeprefix('hub:').partition('@')[0]}"
            if self._system.exists(left) and not self._system.find(left):
                self._system.rm(left, recursive=True)
            self._contents()
        return gone

    def _removed(self, there: Contents, name: str) -> list[str]:
        """Return the addresses that mean nothing once ``name`` is removed."""
        meant = self._meant(there, name)
        return [f"hub:{name.removeprefix('hub:')}"] if self._is_tag(there, name) else meant

    def _is_tag(self, there: Contents, name: str) -> bool:
        return tuple(name.removeprefix("hub:").split("@")) in there.tags

    def rename(self, name: str, new: str) -> None:
        """Give a module with all its versions another name; its numbers and tags stay.

        Raises:
            UnknownNameError: for a module that is not there.
            ModgraftError: for a name that is in use, or cannot be one, or was another module's.
        """
        if "@" in name:
            raise ModgraftError(
                f"{name!r}: a name is changed for all versions; write {name.partition('@')[0]!r}"
            )
        checked(new, "name")
        self.versions(name)
        with self._alone():
            there = self._contents()
            old = self._meant(there, name)[0].removeprefix("hub:").partition("@")[0]
            check_case(there.names() - {old}, new)
            if self._system.exists(f"{self._root}/{new}"):
                raise ModgraftError(f"{new!r} is on the hub already; choose another name")
            was, given = self._given.texts(new), self._given.texts(old)
            given |= {row.version: row.card.sha256 for row in there.rows if row.name == old}
            if twice := [word for word, of in given.items() if was.get(word, of) != of]:
                raise ModgraftError(
                    f"{new}@{twice[0]} was another module once, and a version never changes; "
                    f"choose another name"
                )
            for word, of in given.items():
                self._given.create(new, word, of)
            self._system.mv(f"{self._root}/{old}", f"{self._root}/{new}", recursive=True)
            for module, tag in there.tags:
                if module == old:
                    self._given.drop(old, tag)
            self._contents()


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
