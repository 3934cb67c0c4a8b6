"""Parse a note's lines into blocks, an outline by their indentation, in one pass.

This is not CommonMark, which would drop `- [critique]: agreed` as a link definition and flatten a
list under a quote. Nothing here recurses or looks back.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from modgraft.log.syntax.note import Block, BlockKind, Section

SECTIONS = ("tl;dr", "Context", "Done", "Learned", "Next?", "Log")

_BREAK = re.compile(rb"\r\n?|\n")
_LINE = re.compile(
    rb"(?P<indent>[ \t]*)"
    rb"(?:(?P<heading>#{1,6})(?=[ \t\r\n]|\Z)|(?P<item>[-*+]|\d{1,9}[.)])(?=[ \t\r\n]|\Z)"
    rb"|(?P<quote>>)|(?P<fence>`{3,}(?=[^`\r\n]*(?:[\r\n]|\Z))|~{3,})"
    rb"|(?P<image>!\[[^\]\r\n]{0,500}\]\([^)\r\n]{0,2000}\)[ \t]*(?=[\r\n]|\Z)))?[ \t]*"
)
_SECTION = re.compile(
    rb"##[ \t]+(?:" + b"|".join(re.escape(one.encode()) for one in SECTIONS) + rb")[ \t]*[\r\n]"
)
_KINDS: dict[str | None, BlockKind] = {  # the last group of _LINE that matched → the block's kind
    "heading": "heading", "item": "item", "quote": "quote",
    "fence": "fence", "image": "image", "indent": "para",
}  # fmt: skip
_FRONT_MATTER = re.compile(
    rb"---[ \t]*(?:\r\n?|\n)"
    rb"[A-Za-z_][\w-]*[ \t]*:[^\r\n]*(?:\r\n?|\n)"
    rb"(?:(?:[A-Za-z_][\w-]*[ \t]*:|[ \t]|- )[^\r\n]*(?:\r\n?|\n))*+"
    rb"---[ \t]*(?:\r\n?|\n|\Z)"
)
BOM = b"\xef\xbb\xbf"


def line_starts(data: bytes) -> list[int]:
    """Return where each line starts; `\\n`, `\\r\\n` and a lone `\\r` end a line."""
    starts = [0, *(found.end() for found in _BREAK.finditer(data))]
    if starts[-1] == len(data):
        starts.pop()
    return starts


@dataclass(slots=True)
class Outline:
    """The blocks and sections of a note, and the positions of block markers."""

    blocks: list[Block] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    markers: list[tuple[int, int]] = field(default_factory=list)  # indent, bullet, #, >
    contents: list[int] = field(default_factory=list)  # per block: where its text starts
    unclosed: set[int] = field(default_factory=set)  # indexes of fence blocks without an end

    def below(self) -> list[int]:
        """Return, per block, the end of the last block below it."""
        ends = [block.end for block in self.blocks]
        for index in range(len(ends) - 1, -1, -1):
            parent = self.blocks[index].parent
            if parent is not None and ends[index] > ends[parent]:
                ends[parent] = ends[index]
        return ends


def _read(data: bytes, at: int) -> re.Match[bytes]:
    return next(_LINE.finditer(data, at))  # every part of it is optional: it matches here


def _width(indent: bytes) -> int:
    return len(indent.expandtabs(4)) if b"\t" in indent else len(indent)


class _Fences:
    """Finds the ends of code fences; the closing lines are searched only once."""

    def __init__(self, data: bytes, starts: Sequence[int]) -> None:
        self.data, self.starts = data, starts
        #: per mark: the length of the longest closing mark from each line on
        self._longest: dict[bytes, list[int]] = {}

    def _close(self, line: int, mark: bytes) -> int:
        """Return the length of the closing fence mark on `line`, or 0."""
        found = _read(self.data, self.starts[line])
        fence = found["fence"]
        if not fence or fence[:1] != mark:
            return 0
        return len(fence) if self.data[found.end() : found.end() + 1] in b"\r\n" else 0

    def end(self, line: int, mark: bytes, indent: int) -> tuple[int, bool]:
        """Return the first line after the fence that opens on `line`, and whether it is closed.

        An unclosed fence ends with its indentation if it is indented, and always before the next
        of the six sections, so that it does not swallow the note.
        """
        char = mark[:1]
        if char not in self._longest:
            longest = [0] * (len(self.starts) + 1)
            for at in range(len(self.starts) - 1, -1, -1):
                longest[at] = max(longest[at + 1], self._close(at, char))
            self._longest[char] = longest
        if self._longest[char][line + 1] >= len(mark):
            at = line + 1
            while self._close(at, char) < len(mark):
                at += 1
            return at + 1, True
        for at in range(line + 1, len(self.starts)):
            start = self.starts[at]
            found = _read(self.data, start)
            blank = self.data[found.end() : found.end() + 1] in b"\r\n"
            dedented = not blank and _width(found["indent"]) < indent
            if dedented or _SECTION.match(self.data, start):
                return at, False
        return len(self.starts), False


def outline(data: bytes, starts: Sequence[int]) -> Outline:
    """Parse `data`, whose lines start at `starts`, into blocks."""
    out = Outline()
    fences = _Fences(data, starts)
    stack: list[tuple[int, int]] = []  # (indent, index) of the blocks above
    fresh = True  # there is no block to continue: at the top, after a blank line or a heading
    section: str | None = None
    line, ends = _front_matter(data, starts, out), [*starts[1:], len(data)]
    while line < len(starts):
        start, after = starts[line], ends[line]
        at = start or _bom(data)
        found = _read(data, at)
        kind, words = _KINDS[found.lastgroup], found.end()
        if kind == "para" and data[words : words + 1] in b"\r\n":
            fresh, line = True, line + 1
            continue
        indent = _width(found["indent"])
        last = out.blocks[-1] if out.blocks and not fresh else None
        if last is not None and _continues(last, kind, indent, stack[-1][0] if stack else 0):
            out.blocks[-1] = _extended(last, after)
            if kind == "quote":
                out.markers.append((at, words))
            line += 1
            continue
        while stack and (stack[-1][0] >= indent or kind == "heading"):
            stack.pop()
        index, depth, parent = len(out.blocks), len(stack), stack[-1][1] if stack else None
        if kind == "heading":
            _section(out, data, found, line, start, after)
            section = out.sections[-1].title if out.sections else None
        else:
            stack.append((indent, index))
        next_line = line + 1
        if kind == "fence":
            next_line, closed = fences.end(line, found["fence"], indent)
            after = ends[next_line - 1]
            if not closed:
                out.unclosed.add(index)
        if kind in ("fence", "image"):
            words = found.start(kind)
        if words > at:
            out.markers.append((at, words))
        out.blocks.append(Block(kind, start, after, line + 1, depth, parent, section))
        out.contents.append(words)
        fresh, line = kind in ("heading", "fence", "image"), next_line
    _close_sections(out, len(starts), len(data))
    return out


def _bom(data: bytes) -> int:
    return len(BOM) if data.startswith(BOM) else 0


def _front_matter(data: bytes, starts: Sequence[int], out: Outline) -> int:
    """Add YAML front matter as code (its `tags: [read]` is no event); return the next line."""
    at = _bom(data)
    found = _FRONT_MATTER.match(data, at)
    if found is None:
        return 0
    out.blocks.append(Block("fence", 0, found.end(), 1, 0, None, None))
    out.contents.append(at)
    return bisect_left(starts, found.end())


def _continues(last: Block, kind: BlockKind, indent: int, above: int) -> bool:
    """Return whether a line continues the block before it: a wrapped line, or the next of a
    quote."""
    if kind == "quote":
        return last.kind == "quote" and indent == above
    if kind != "para":
        return False
    return (last.kind == "para" and indent == above) or (last.kind == "item" and indent > above)


def _extended(block: Block, end: int) -> Block:
    return Block(block.kind, block.start, end, block.line, block.depth, block.parent, block.section)


def _section(
    out: Outline, data: bytes, found: re.Match[bytes], line: int, start: int, after: int
) -> None:
    level = len(found["heading"])
    if level > 2:
        return
    title = data[found.end() : after].decode("utf-8", "replace").strip()
    title = re.sub(r"\s+#+$", "", title)
    out.sections.append(Section(title, level, line + 1, 0, start, 0))


def _close_sections(out: Outline, lines: int, size: int) -> None:
    if not out.sections:
        return
    following = [(one.line - 1, one.start) for one in out.sections[1:]] + [(lines, size)]
    out.sections = [
        Section(one.title, one.level, one.line, end_line, one.start, end)
        for one, (end_line, end) in zip(out.sections, following, strict=True)
    ]
