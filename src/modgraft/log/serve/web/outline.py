"""Render a note as HTML: its outline as nested lists, with an anchor for every line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import dedent
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from modgraft.log.serve.web.inline import View, inline, table

if TYPE_CHECKING:
    from modgraft.log.syntax.note import Block, Event, Note

DEEPEST = 24
"""Levels of the outline that are indented; deeper ones would not be readable."""

LONGEST = 20_000
"""Characters of one block that are shown; a longer one is cut and says so."""

BLOCKS_A_PAGE = 1500
"""Blocks of a note on one page."""

_MARKER = re.compile(r"\s*(?:[-*+]|(?P<number>\d{1,9})[.)])(?:[ \t]+|\s*$)")
_QUOTE = re.compile(r"^[ \t]*(?:>[ \t]?)+", re.MULTILINE)
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*(?P<language>[^\s`]*)[^\n]*(?:\n|$)")
_HEADING = re.compile(r"\s*(?P<level>#{1,6})[ \t]*")
_CLOSING = re.compile(r"[ \t]+#*[ \t]*$")
_ENDS = re.compile(r"\r\n?|\n")
_TABLE = re.compile(r"[ \t]*\|[^\n]*\n[ \t]*\|[ \t:|-]*-[ \t:|-]*(?:\n|$)")
_RULE = re.compile(r"\s*(?:-\s*){3,}$|\s*(?:\*\s*){3,}$")


@dataclass(frozen=True, slots=True)
class Outline:
    """A page of a note: its HTML, its number, how many there are, and the lines that were cut."""

    html: Markup
    page: int
    pages: int
    cut: tuple[int, ...]


def outline(
    note: Note, view: View, *, page: int = 1, lines: tuple[int, int] | None = None
) -> Outline:
    """Render a note's blocks as nested lists, `BLOCKS_A_PAGE` at a time.

    Args:
        note: The note, as it is now.
        view: Resolves citations, links and pictures.
        page: The number of the page, from 1.
        lines: The first and last line to highlight; the page is then the one with the first.
    """
    pages = max(1, -(-len(note.blocks) // BLOCKS_A_PAGE))
    if lines is not None:
        before = sum(block.line <= lines[0] for block in note.blocks)
        page = max(0, before - 1) // BLOCKS_A_PAGE + 1
    page = min(max(page, 1), pages)
    first = (page - 1) * BLOCKS_A_PAGE
    shown = range(first, min(first + BLOCKS_A_PAGE, len(note.blocks)))
    writer = _Writer(note, view, lines)
    html = Markup("").join(writer.write(shown))
    return Outline(html, page, pages, tuple(writer.cut))


class _Writer:
    """Opens and closes lists by depth; not recursive, since a note may be nested arbitrarily."""

    def __init__(self, note: Note, view: View, lines: tuple[int, int] | None) -> None:
        self.note, self.view, self.lines = note, view, lines
        self.keys = frozenset(one.key for one in (*note.citations, *note.mentions))
        self.events: dict[int, list[Event]] = {}
        for event in note.events:
            self.events.setdefault(event.block, []).append(event)
        self.cut: list[int] = []

    def write(self, shown: range) -> Iterator[Markup]:
        open_: list[tuple[int, str]] = []  # (level, "ul", "ol" or "li"), outermost first
        for index in shown:
            block = self.note.blocks[index]
            level = min(block.depth, DEEPEST)
            text = self.text(block)
            marker = _MARKER.match(text) if block.kind == "item" else None
            tag = ("ol" if marker and marker["number"] else "ul") if block.kind == "item" else ""
            # An item continues the list of its level; anything else ends it.
            while open_ and open_[-1][0] >= level and open_[-1] != (level, tag):
                yield Markup("</{}>").format(open_.pop()[1])
            if tag:
                if not open_ or open_[-1] != (level, tag):
                    open_.append((level, tag))
                    yield Markup("<{}>").format(tag)
                open_.append((level, "li"))
                numbered = marker["number"] if marker else None
                value = Markup(' value="{}"').format(numbered) if numbered else ""
                yield Markup("<li{}>").format(value)
            yield self.block(index, text, marker.end() if marker else 0)
        while open_:
            yield Markup("</{}>").format(open_.pop()[1])

    def text(self, block: Block) -> str:
        text = self.note.data[block.start : block.end].decode("utf-8", "replace").rstrip("\r\n")
        if len(text) > LONGEST:
            self.cut.append(block.line)
            return text[:LONGEST]
        return text

    def block(self, index: int, text: str, after: int) -> Markup:
        """Render one block after its line number, with a remark if it was cut."""
        block = self.note.blocks[index]
        rows = len(_ENDS.findall(text)) + 1
        hit = self.lines and block.line <= self.lines[1] and block.line + rows > self.lines[0]
        anchors = Markup("").join(
            Markup('<span id="L{}"></span>').format(block.line + row) for row in range(1, rows)
        )
        number = Markup('<a class="line" href="#L{0}" aria-label="line {0}">{0}</a>')
        tag, body = self.body(index, text, after)
        more = Markup(' <em class="none">… cut here; all of it is in the file</em>')
        return Markup('<{0} class="block {1}{2}" id="L{3}">{4}{5}{6}{7}</{0}>').format(
            tag, block.kind, " hit" if hit else "", block.line,
            number.format(block.line), body, anchors, more if block.line in self.cut else "",
        )  # fmt: skip

    def body(self, index: int, text: str, after: int) -> tuple[str, Markup]:
        """Return the name of a block's element and its content."""
        block = self.note.blocks[index]
        lines = _ENDS.sub("\n", text)
        if block.kind == "fence":
            return "div", _code(lines)
        if block.kind == "quote":
            parts = re.split(r"\n[ \t]*\n", _QUOTE.sub("", lines))
            shown = (inline(part, self.view, self.keys) for part in parts if part.strip())
            return "blockquote", Markup("").join(map(Markup("<p>{}</p>").format, shown))
        if block.kind == "heading":
            found = _HEADING.match(text)
            level, after = (min(len(found["level"]) + (len(found["level"]) < 2), 6),
                            found.end()) if found else (2, 0)  # fmt: skip
            title = inline(_CLOSING.sub("", text[after:]), self.view, self.keys)
            return f"h{level}", title
        if block.kind == "para" and _TABLE.match(lines):
            return "div", Markup('<div class="scroll" tabindex="0">{}</div>').format(
                table(dedent(lines), self.view)
            )
        if block.kind == "para" and _RULE.match(text):
            return "div", Markup("<hr>")
        return "div", inline(text[after:], self.view, self.keys, self.positions(index, after))

    def positions(self, index: int, after: int) -> dict[int, tuple[Event, int]]:
        """Return where the events of a block start and end, in characters from `after` on."""
        start, data = self.note.blocks[index].start, self.note.data
        return {
            at - after: (event, at - after + len(_decoded(data, event.start, event.end)))
            for event in self.events.get(index, ())
            if (at := len(_decoded(data, start, event.start))) >= after
        }


def _decoded(data: bytes, start: int, end: int) -> str:
    return data[start:end].decode("utf-8", "replace")


def _code(text: str) -> Markup:
    """Render a code block, without its fence."""
    found = _FENCE.match(text)
    lines = text[found.end() :].splitlines() if found else text.splitlines()
    if found and lines and re.fullmatch(rf"\s*{re.escape(found[1])}+\s*", lines[-1]):
        lines.pop()
    language = found["language"] if found else ""
    label = Markup('<span class="language">{}</span>').format(language) if language else ""
    code = escape(dedent("\n".join(lines)))
    return Markup('<div class="code">{}<pre tabindex="0"><code>{}</code></pre></div>').format(
        label, code
    )
