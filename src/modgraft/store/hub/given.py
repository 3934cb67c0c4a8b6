"""What names on a hub were given to, so that a number is given once and a tag means one version.

    HUB/.versions/NAME/3       the hash of the module whose number that is; it stays for good
    HUB/.versions/NAME/paper   3, the version of which ``paper`` is a tag; it goes with it

Each is created once and never written again. Whoever creates a number's file has the number: that
keeps two pushes apart, at a URL too, where nobody can hold others off.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from modgraft.core.errors import ModgraftError
from modgraft.core.files import write_text
from modgraft.store.hub.index import GIVEN, WORD, short
from modgraft.store.hub.remote import protocols

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

EXCLUSIVE = frozenset({"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
"""The protocols at which one alone creates a file, of several who try at the same moment."""


class Given:
    """The files of a hub that say it.

    Args:
        system: the hub's file system.
        root: its folder.
        local: whether that is on this machine; who creates something then holds its lock.
    """

    def __init__(self, system: AbstractFileSystem, root: str, local: bool) -> None:
        self._system, self._root, self._local = system, f"{root}/{GIVEN}", local
        self.exclusive = local or bool(protocols(system) & EXCLUSIVE)

    def number(self, name: str, least: int, sha: str) -> str:
        """Take a number that nobody has taken, ``least`` or the next one that is free."""
        while not self.create(name, str(least), sha):
            least += 1
        return str(least)

    def create(self, name: str, word: str, text: str) -> bool:
        """Give a number or a tag of a module; return False, and do nothing, where it is given."""
        path = f"{self._root}/{name}/{word}"
        if self._local:
            if Path(path).exists():
                return False
            write_text(path, text)
            return True
        self._system.makedirs(f"{self._root}/{name}", exist_ok=True)
        try:
            self._system.pipe_file(path, text.encode(), mode="create")
        except FileExistsError:
            return False
        return True

    def drop(self, name: str, word: str) -> None:
        """Take a tag back."""
        self._system.rm_file(f"{self._root}/{name}/{word}")

    def texts(self, name: str) -> dict[str, str]:
        """Return what each number and tag of a module was given to."""
        if not self._system.exists(f"{self._root}/{name}"):
            return {}
        paths = [path for path in self._system.find(f"{self._root}/{name}") if not _is_part(path)]
        return {PurePosixPath(path).name: short(self._system, path) for path in paths}

    def clean(self) -> None:
        """Remove what was half-written by who was killed, while nobody else writes."""
        for left in Path(self._root).glob("*/.*.part") if self._local else ():
            left.unlink()


def _is_part(path: str) -> bool:
    return PurePosixPath(path).name.startswith(".")


def checked(word: str, what: str) -> str:
    """Refuse a name or a tag that cannot be one, such as a path."""
    if not isinstance(word, str) or not WORD.fullmatch(word):
        raise ModgraftError(
            f"{word!r:.80} cannot be a module's {what} on a hub: letters, digits and '_.+-', a "
            f"letter or digit first"
        )
    return word


def check_case(known: Iterable[str], word: str) -> None:
    """Refuse a name that another one is where a file system makes no difference of case."""
    for other in known:
        if other != word and other.casefold() == word.casefold():
            raise ModgraftError(
                f"{word!r} is {other!r} on the hub but for its case, which not every file system "
                f"tells apart; write it so, or choose another name"
            )
