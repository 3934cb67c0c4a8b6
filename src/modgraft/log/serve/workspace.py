"""The log as an editor needs it: sources, their citations, and the places to rename.

The protocol of the language server is in `lsp`. Texts that are open in the editor take precedence
over their files.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from modgraft.core.errors import MissingFileError, ModgraftError
from modgraft.log.check import roots
from modgraft.log.index.bibliography import Bibliography
from modgraft.log.index.find_notes import find_notes, stamp
from modgraft.log.settings import Settings, settings
from modgraft.log.syntax.actions import ACTIONS, Actions
from modgraft.log.syntax.blocks import BOM, line_starts
from modgraft.log.syntax.note import Citation, Note
from modgraft.log.syntax.parse import parse

_KEY = re.compile(rb"[^\s,{}()\"=#%~\\@]+")


@dataclass(frozen=True, slots=True)
class Place:
    """A range of a file's bytes."""

    path: Path
    start: int
    end: int


@dataclass(slots=True)
class Text:
    """A file's text in an editor's coordinates: lines from 0, columns in the editor's units.

    `units` counts the units of a text (usually of UTF-16, where an emoji has two).
    """

    data: bytes
    units: Callable[[str], int]
    starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = line_starts(self.data) or [0]
        if self.data[-1:] in (b"\n", b"\r"):
            self.starts.append(len(self.data))  # an editor's last, empty line

    def position(self, at: int) -> tuple[int, int]:
        """Return the line and column of a byte."""
        line = max(0, bisect_right(self.starts, at) - 1)
        return line, self.units(_decoded(self.data[self.starts[line] : at]))

    def offset(self, line: int, column: int) -> int:
        """Return the byte at a line and column; columns beyond the line's end are its end."""
        if line >= len(self.starts):
            return len(self.data)
        start = self.starts[line]
        end = self.starts[line + 1] if line + 1 < len(self.starts) else len(self.data)
        text = _decoded(self.data[start:end]).rstrip("\r\n")
        taken = index = 0
        while index < len(text) and taken < column:
            taken += self.units(text[index])
            index += 1
        return start + len(text[:index].encode("utf-8", "surrogateescape"))

    def before(self, at: int) -> bytes:
        """Return the text of the line before a byte."""
        line, _ = self.position(at)
        return self.data[self.starts[line] : at]


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")  # one character for each invalid byte


class Workspace:
    """The folders of a log, read on demand; `opened` maps files to their unsaved texts."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.opened: dict[Path, bytes] = {}
        try:
            self.settings: Settings = settings(start=root)
        except MissingFileError:
            self.settings = settings(root)  # no log is configured: the opened folder is the log
        self.actions: Actions = ACTIONS.extended(self.settings.actions)
        self.roots = roots(self.settings)
        self._stamps: tuple[object, ...] | None = None
        self._bibliography = Bibliography()
        self._files: list[Path] | None = None

    def data(self, path: Path) -> bytes:
        """Return the text in the editor, else that of the file; empty if there is none."""
        if path in self.opened:
            return self.opened[path]
        try:
            return path.read_bytes().removeprefix(BOM)  # editors do not count it
        except OSError:
            return b""  # deleted since it was listed

    def note(self, path: Path) -> Note:
        """Parse a note as it is in the editor, else as in its file."""
        return parse(self.data(path), str(path), self.actions)

    # -- sources -----------------------------------------------------------------------------------

    def forget_files(self) -> None:
        """Forget the list of .bib files, since something was opened or saved."""
        self._files = None

    def bibliographies(self) -> list[Path]:
        """List the .bib files of the log."""
        if self._files is None:
            named = self.settings.bibliography
            found = find_notes(self.settings.folders).bibliographies if named is None else ()
            self._files = [*(named or ()), *(Path(one.path) for one in found)]
        return self._files

    @property
    def bibliography(self) -> Bibliography:
        """The sources as they are on disk, read again only if a file changed."""
        paths = [path for path in self.bibliographies() if path.is_file()]
        stamps = tuple((path, stamp(path.stat())) for path in paths)
        if stamps != self._stamps:
            self._bibliography, self._stamps = Bibliography.read(paths), stamps
        return self._bibliography

    def declarations(self, key: str) -> list[Place]:
        """Find where .bib files define `key`."""
        pattern = re.compile(rb"@\s*\w+\s*[{(]\s*(" + re.escape(key.encode()) + rb")\s*(?=[,})])")
        return self._in_bibliographies(pattern)

    def _in_bibliographies(self, *patterns: re.Pattern[bytes]) -> list[Place]:
        return [
            Place(path, *found.span(1))
            for path in self.bibliographies()
            for pattern in patterns
            for found in pattern.finditer(self.data(path))
        ]

    # -- citations ---------------------------------------------------------------------------------

    def citations(self, key: str) -> Iterator[tuple[Path, Citation]]:
        """Find all citations of `key`, with `@` or without."""
        found = find_notes(self.settings.folders)
        paths = dict.fromkeys([Path(one.path) for one in found.notes])
        paths.update(dict.fromkeys(path for path in self.opened if path.suffix == ".md"))
        wanted = key.encode()
        for path in paths:
            if wanted in self.data(path):  # so that most notes are not parsed
                note = self.note(path)
                both = sorted((*note.citations, *note.mentions), key=lambda one: one.start)
                yield from ((path, one) for one in both if one.key == key)

    def key_at(self, path: Path, at: int) -> tuple[str, Place] | None:
        """Return the key at byte `at` of a note or a .bib file, and its place."""
        if path.suffix == ".bib":
            data = self.data(path)
            line = data.rfind(b"\n", 0, at) + 1
            for word in _KEY.finditer(data, line, at + 200):
                if word.start() <= at <= word.end():
                    key = _decoded(word[0])
                    if any(one.path == path and one.start <= at <= one.end
                           for one in self.declarations(key)):  # fmt: skip
                        return key, Place(path, *word.span())
            return None
        note = self.note(path)
        for one in (*note.citations, *note.mentions):
            if one.start <= at <= one.end:
                return one.key, Place(path, one.start + one.written_with_at, one.end)
        return None

    def rename(self, key: str, new: str) -> list[Place]:
        """Find all places to replace when `key` is renamed to `new`, in notes and .bib files.

        Raises:
            ModgraftError: `new` is not a valid key, or is the key of another source.
        """
        if [one.key for one in parse(f"@{new}".encode(errors="replace")).citations] != [new]:
            raise ModgraftError(
                f"{new!r} cannot be cited: a key is Latin letters and digits, with : . + / - inside"
            )
        if new != key and self.declarations(new):
            other = self.declarations(new)[0].path.name
            raise ModgraftError(f"@{new} is another source's key already, in {other}")
        named = re.escape(key.encode())
        crossing = re.compile(rb"\b(?:crossref|xref)\s*=\s*[{\"]\s*(" + named + rb")\s*[}\"]", re.I)
        cited = [
            Place(path, one.start + one.written_with_at, one.end)
            for path, one in self.citations(key)
        ]
        return [*cited, *self.declarations(key), *self._in_bibliographies(crossing)]
