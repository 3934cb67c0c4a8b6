"""The parts of a parsed note.

Positions are byte offsets into `Note.data`, and lines count from 1. Text is decoded when it is
used, and nested parts (an event's body, the citations in it) are ranges of the file and not copies,
so that a note of any size and nesting is kept in memory once.
"""

from __future__ import annotations

import re
import textwrap
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

Severity = Literal["error", "warning", "info"]
BlockKind = Literal["heading", "item", "quote", "fence", "image", "para"]

_STATUS = re.compile(r"[_<*\s]*(full[ _-]?read|digging)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the file; all spans of a note together are the file."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Block:
    """A heading, item, quote, fence, image or paragraph, without the blocks below it.

    `depth` is the number of blocks above it in the outline, `parent` the index of the nearest.
    """

    kind: BlockKind
    start: int
    end: int
    line: int
    depth: int
    parent: int | None
    section: str | None


@dataclass(frozen=True, slots=True)
class Section:
    """A heading of the first or second level, and everything up to the next one."""

    title: str
    level: int
    line: int
    end_line: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Citation:
    """`@key`, or a key written without `@` (then `written_with_at` is false)."""

    key: str
    line: int
    start: int
    end: int
    written_with_at: bool


@dataclass(frozen=True, slots=True)
class Link:
    """`[text](target)`, `<target>`, `[[target]]` or a bare address."""

    text: str
    target: str
    line: int
    start: int
    end: int
    kind: Literal["inline", "auto", "wiki"]


@dataclass(frozen=True, slots=True)
class Figure:
    """`![alt](target)`."""

    alt: str
    target: str
    line: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Quote:
    """A `>` quote, or an item that is in quotation marks from end to end."""

    text: str
    line: int
    end_line: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Code:
    """A code fence; `text` is the code between its two lines."""

    language: str
    text: str
    line: int
    end_line: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Fix:
    """Replace bytes `start` to `end` by `replacement`; `what` describes it in words."""

    start: int
    end: int
    replacement: bytes
    what: str


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """A problem at one position; as `str`, one line: note:line: severity code message."""

    severity: Severity
    code: str
    message: str
    line: int
    start: int
    end: int
    note: str | None = None
    fix: Fix | None = None
    digest: bytes = field(default=b"", repr=False, compare=False)  # of the file it was found in

    def __str__(self) -> str:
        return f"{self.note or 'note'}:{self.line}: {self.severity} {self.code} {self.message}"


_Placed = TypeVar("_Placed", Citation, Link)


@dataclass(slots=True)
class Source:
    """The bytes of a note with its citations and links, which its events refer to."""

    data: bytes
    citations: tuple[Citation, ...] = ()  # with @ and without, in order
    links: tuple[Link, ...] = ()

    def text(self, start: int, end: int) -> str:
        """Decode the bytes from `start` to `end`; invalid UTF-8 becomes U+FFFD."""
        return self.data[start:end].decode("utf-8", "replace")


def _within(found: tuple[_Placed, ...], start: int, end: int) -> tuple[_Placed, ...]:
    first = bisect_left(found, start, key=lambda one: one.start)
    return found[first : bisect_left(found, end, key=lambda one: one.start)]


@dataclass(frozen=True, slots=True)
class Event:
    """`[name(arguments) -> result]` and the text about it.

    `action` is the name in the table of actions ("skim"), `written` the name in the file
    ("Skim"). `arguments` is None without brackets; `result` is None without an arrow and "" where
    nothing follows the arrow. `closed` is false where the closing bracket is missing. The body is
    the rest of the block up to the next event in it, and all blocks below that block.
    """

    action: str
    written: str
    arguments: str | None
    result: str | None
    line: int
    end_line: int
    closed: bool
    section: str | None
    depth: int
    start: int
    end: int
    block: int
    inside: tuple[int, int] | None = field(repr=False)
    rest: tuple[int, int] = field(repr=False)
    below: tuple[int, int] = field(repr=False)
    source: Source = field(repr=False, compare=False)

    @property
    def body(self) -> str:
        """The rest of the block and the blocks below it, as text without the common indent."""
        rest = self.source.text(*self.rest).strip()
        if not re.search(r"\w", rest):  # the comma between two annotations is no body
            rest = ""
        below = textwrap.dedent(self.source.text(*self.below)).strip("\r\n")
        return "\n".join(part for part in (rest, below) if part)

    @property
    def has_body(self) -> bool:
        """Whether there is a body, without reading it: it may be most of the file."""
        return self.below[0] < self.below[1] or bool(self.body)

    @property
    def citations(self) -> tuple[Citation, ...]:
        """The citations in the arguments, the result and the body, with `@` and without."""
        found = self.source.citations
        return _within(found, self.start, self.rest[1]) + _within(found, *self.below)

    @property
    def links(self) -> tuple[Link, ...]:
        """The links in the arguments, the result and the body."""
        found = self.source.links
        return _within(found, self.start, self.rest[1]) + _within(found, *self.below)

    @property
    def keys(self) -> tuple[str, ...]:
        """The citation keys among the arguments, in order."""
        found = () if self.inside is None else _within(self.source.citations, *self.inside)
        return tuple(one.key for one in found)

    @property
    def status(self) -> str:
        """How far a source was read, or whether a question has an answer below it; else empty."""
        if self.action == "read":
            return "read"
        if self.action == "question":
            told = self.source.data[self.end - 1 : self.end] == b":" and self.source.text(
                *self.rest
            )
            return "answered" if told or self.below[0] < self.below[1] else "open"
        if self.action != "skim":
            return ""
        said = _STATUS.match(self.result or "")
        if said is None:
            return "skimmed"
        return "digging" if said[1].casefold() == "digging" else "full_read"


@dataclass(frozen=True, slots=True)
class Note:
    """A parsed note; whatever its bytes are, the `spans` joined give them back.

    `citations` are the keys written with `@`, `mentions` those without. `degraded` says that part
    of the file could not be read as text; `diagnostics` says which part and why.
    """

    name: str | None
    data: bytes = field(repr=False)
    line_starts: tuple[int, ...] = field(repr=False)
    marks: tuple[Span, ...] = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)
    sections: tuple[Section, ...]
    events: tuple[Event, ...]
    citations: tuple[Citation, ...]
    mentions: tuple[Citation, ...]
    links: tuple[Link, ...]
    figures: tuple[Figure, ...]
    quotes: tuple[Quote, ...]
    codes: tuple[Code, ...]
    diagnostics: tuple[Diagnostic, ...]
    degraded: bool

    @property
    def text(self) -> str:
        """The whole file as text; invalid UTF-8 becomes U+FFFD."""
        return self.data.decode("utf-8", "replace")

    @property
    def spans(self) -> tuple[Span, ...]:
        """The file in pieces without gaps: marks by their kind, the rest as text."""
        return tuple(self._tiles())

    def _tiles(self) -> Iterator[Span]:
        at = 0
        for mark in self.marks:
            if mark.start > at:
                yield Span("text", at, mark.start)
            yield mark
            at = mark.end
        if at < len(self.data):
            yield Span("text", at, len(self.data))

    @property
    def lines(self) -> int:
        """The number of lines; a line break at the end of the file starts no line."""
        return len(self.line_starts)

    def line(self, number: int) -> str:
        """Return line `number`, counted from 1, as text without its line break.

        Raises:
            IndexError: the note has no such line.
        """
        start, end = self.line_range(number)
        return self.data[start:end].decode("utf-8", "replace").rstrip("\r\n")

    def line_range(self, number: int) -> tuple[int, int]:
        """Return where line `number` starts and where the next one does.

        Raises:
            IndexError: the note has no such line.
        """
        if not 1 <= number <= len(self.line_starts):
            has = f"{len(self.line_starts)} lines"
            raise IndexError(f"{self.name or 'the note'} has {has}, and no line {number}")
        last = number == len(self.line_starts)
        return self.line_starts[number - 1], len(self.data) if last else self.line_starts[number]

    def outline(self, width: int = 100) -> str:
        """List the blocks, one a line: the line number, then the first words indented by depth."""
        rows = []
        for block in self.blocks:
            words = self.data[block.start : min(block.end, block.start + 4 * width)]
            shown = " ".join(words.decode("utf-8", "replace").split("\n")[0].split())
            if len(shown) > width:
                shown = shown[: width - 1] + "…"
            rows.append(f"{block.line:>5}  {'  ' * min(block.depth, 40)}{shown}")
        return "\n".join(rows)
