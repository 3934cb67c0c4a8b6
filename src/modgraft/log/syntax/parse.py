"""Parse the bytes of a note, whatever they are, into a `Note`.

    note  = { "## " section , block } ;          block = item | quote | fence | image | para ;
    annot = "[" , name , [ "(" args ")" ] , [ "->" [ result ] ] , "]" , [":"] ;
    cite  = "@" key ;

There are two passes: lines to blocks, then blocks to their contents. Both take time and memory in
proportion to the file. What cannot be read as text is kept and reported, and the note is degraded.
"""

from __future__ import annotations

import re
import textwrap
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field, replace

from modgraft.log.syntax.actions import ACTIONS, Actions
from modgraft.log.syntax.annotation import Annotation, read_annotations
from modgraft.log.syntax.blocks import BOM, Outline, line_starts, outline
from modgraft.log.syntax.diagnose import DEGRADING, diagnose
from modgraft.log.syntax.inline import Inlines, scan
from modgraft.log.syntax.note import Block, Code, Diagnostic, Event, Note, Quote, Source, Span

LONGEST = 1 << 20  # bytes of one line in which events and links are looked for

_QUOTED = re.compile(r'\s*(?:"(.*)"|“(.*)”)\s*\Z', re.DOTALL)
_MARK = re.compile(r"^[ \t]*>[ ]?", re.MULTILINE)


@dataclass(slots=True)
class _Parser:
    data: bytes
    actions: Actions
    starts: list[int]
    tree: Outline
    below: list[int]
    found: Inlines = field(default_factory=Inlines)
    events: list[Event] = field(default_factory=list)
    quotes: list[Quote] = field(default_factory=list)
    codes: list[Code] = field(default_factory=list)
    problems: list[Diagnostic] = field(default_factory=list)
    source: Source = field(init=False)

    def __post_init__(self) -> None:
        self.source = Source(self.data)

    def line_of(self, at: int) -> int:
        return max(1, bisect_right(self.starts, at))

    def block(self, index: int, block: Block) -> None:
        """Parse the contents of one block."""
        words = self.tree.contents[index]
        if block.kind == "fence":
            self._code(index, block, words)
            return
        for start, end in self._pieces(block, words):
            line = block.line if start == words else self.line_of(start)
            brackets = scan(self.data, start, end, line, self.starts, self.found)
            if brackets is None or not brackets.square or block.kind == "quote":
                continue
            args = (brackets, self.actions, self.found, self.problems, self.line_of)
            self._events(read_annotations(self.data, end, *args), index, block)
        self._quote(block, words)

    def _pieces(self, block: Block, words: int) -> list[tuple[int, int]]:
        """Return the ranges to scan: the whole block, or its lines if it is very long."""
        if block.end - words <= LONGEST:
            return [(words, block.end)]
        out = []
        first = block.line - 1
        for number in range(first, bisect_left(self.starts, block.end, lo=first)):
            start = max(words, self.starts[number])
            last = number + 1 == len(self.starts)
            end = len(self.data) if last else self.starts[number + 1]
            if end - start <= LONGEST:
                out.append((start, end))
                continue
            start = self.starts[number]
            said = (
                f"a line of {end - start:,} bytes: kept and searchable, but no events or links "
                f"are looked for in more than {LONGEST:,}; break it"
            )
            self.problems.append(Diagnostic("error", "long-line", said, number + 1, start, end))
        return out

    def _events(self, found: list[Annotation], index: int, block: Block) -> None:
        """Add the events of one piece, each with the text after it and the blocks below it."""
        below = (block.end, self.below[index])
        for at, one in enumerate(found):
            ends = block.end
            for later in found[at + 1 : at + 2]:
                ends = max(one.end, later.start)
            if at and one.end <= found[at - 1].end:
                ends = one.end  # inside the event before
            last = below[1] if below[0] < below[1] else max(ends, one.end)
            self.events.append(
                Event(
                    one.action.name, one.written, one.arguments, one.result,
                    self.line_of(one.start), self.line_of(max(one.start, last - 1)),
                    one.closed, block.section, block.depth, one.start, one.end, index, one.inside,
                    (one.end, ends), below, self.source,
                )
            )  # fmt: skip

    def _quote(self, block: Block, words: int) -> None:
        if block.end - words > LONGEST:
            return
        if block.kind == "quote":
            text = _MARK.sub("", self.source.text(block.start, block.end)).strip()
        elif self.data[words : words + 1] == b'"' or self.data.startswith(b"\xe2\x80\x9c", words):
            said = _QUOTED.match(self.source.text(words, block.end))
            if said is None:
                return
            text = (said[1] or said[2] or "").strip()
        else:
            return
        end_line = self.line_of(block.end - 1)
        self.quotes.append(Quote(text, block.line, end_line, block.start, block.end))

    def _code(self, index: int, block: Block, words: int) -> None:
        self.found.marks.append(Span("fence", words, block.end))
        end_line = self.line_of(block.end - 1)
        head = self.starts[block.line] if block.line < len(self.starts) else block.end
        info = self.source.text(words, min(head, block.end)).strip().lstrip("`~").split()
        tail = block.end if index in self.tree.unclosed else self.starts[end_line - 1]
        text = self.source.text(min(head, tail), tail) if end_line > block.line else ""
        text = textwrap.dedent(text)
        language = "yaml" if self.data.startswith(b"---", words) else info[0] if info else ""
        self.codes.append(Code(language, text, block.line, end_line, block.start, block.end))


def parse(data: bytes, name: str | None = None, actions: Actions | None = None) -> Note:
    """Parse a note: its outline, events, citations, links, figures, quotes and code.

    Args:
        data: The file's bytes, whatever they are.
        name: The note's name in messages, usually its path.
        actions: The table of actions; None means the built-in one.
    """
    starts = line_starts(data)
    tree = outline(data, starts)
    parser = _Parser(data, actions or ACTIONS, starts, tree, tree.below())
    for index, block in enumerate(tree.blocks):
        parser.block(index, block)
    found = parser.found
    found.links.sort(key=lambda link: link.start)
    found.figures.sort(key=lambda figure: figure.start)
    both = sorted([*found.citations, *found.mentions], key=lambda key: key.start)
    parser.source.citations, parser.source.links = tuple(both), tuple(found.links)
    parser.problems += diagnose(data, starts, tree, parser.events)
    parser.problems.sort(key=lambda problem: problem.start)
    return Note(
        name=name,
        data=data,
        line_starts=tuple(starts),
        marks=_marks(data, found.marks, tree),
        blocks=tuple(tree.blocks),
        sections=tuple(tree.sections),
        events=tuple(parser.events),
        citations=tuple(found.citations),
        mentions=tuple(found.mentions),
        links=tuple(found.links),
        figures=tuple(found.figures),
        quotes=tuple(parser.quotes),
        codes=tuple(parser.codes),
        diagnostics=tuple(replace(problem, note=name) for problem in parser.problems),
        degraded=any(problem.code in DEGRADING for problem in parser.problems),
    )


def _marks(data: bytes, marks: list[Span], tree: Outline) -> tuple[Span, ...]:
    """Sort the marks; of two that overlap, keep the outer one."""
    every = [*marks, *(Span("marker", start, end) for start, end in tree.markers)]
    if data.startswith(BOM):
        every.append(Span("bom", 0, len(BOM)))
    every.sort(key=lambda mark: (mark.start, -mark.end))
    out: list[Span] = []
    at = 0
    for mark in every:
        if mark.start >= at and mark.end > mark.start:
            out.append(mark)
            at = mark.end
    return tuple(out)
