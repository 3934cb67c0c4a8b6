"""Parse the text of blocks: brackets, links, figures, citations, code and formulas.

One regular expression finds the tokens; two stacks pair the brackets. The time is linear in the
text, however the brackets nest or stay open.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field

from modgraft.log.syntax.note import Citation, Figure, Link, Span

_LETTER = rb"(?:[A-Za-z0-9_]|[\xc3-\xc9][\x80-\xbf])"  # ASCII and accented Latin
_TOKEN = re.compile(
    rb"(?P<escape>\\[!-/:-@\[-`{-~])|(?P<tick>`+)|(?P<comment><!--)|(?P<math>\$\$?)"
    rb"|(?P<url>https?://(?:[^\s<>\"()\[\]`|]|\([^\s<>\"()\[\]`|]*\))+)"
    rb"|(?P<bracket>[\[\]()])|(?P<quote>\"|\xe2\x80[\x9c\x9d])"
    rb"|(?<![A-Za-z0-9_/@.])@(?P<key>(?![0-9])" + _LETTER + rb"(?:[:.+/-]?" + _LETTER + rb")+)"
    # A key without @ is recognised by its shape: author, Title, year.
    rb"|(?<![A-Za-z0-9_/@.\x80-\xff])(?P<bare>[a-z]{2,}[A-Z][A-Za-z0-9]*)(?![A-Za-z0-9_\x80-\xff])"
)
_SPECIAL = re.compile(rb"[\[@`$\"<]|://|\xe2\x80\x9c|[a-z][A-Z]")
_YEAR = re.compile(rb"\d{4}[a-z]?\Z")
_POINTED = re.compile(rb"\s*<([^<>\r\n]*)>")
_TITLE = re.compile(rb"\s[\"'(]")
_OpenFormula = tuple[int, bytes, int, int]  # position, mark, number of tokens and keys before it
_TRAILING = b".,;:!?'*_~"


@dataclass(slots=True)
class Brackets:
    """The brackets of a piece of text: each opening position → its closing position."""

    square: dict[int, int | None] = field(default_factory=dict)
    round: dict[int, int] = field(default_factory=dict)
    quoted: list[tuple[int, int]] = field(default_factory=list)  # "…", in order
    images: set[int] = field(default_factory=set)  # square brackets that open a figure
    links: set[int] = field(default_factory=set)  # square brackets that open a link

    def is_quoted(self, start: int, end: int) -> bool:
        """Return whether `start` to `end` lies within one pair of quotation marks."""
        at = bisect_right(self.quoted, (start, 1 << 62)) - 1
        return at >= 0 and self.quoted[at][1] >= end


@dataclass(slots=True)
class Inlines:
    """The inline elements found so far, over all pieces of a note."""

    citations: list[Citation] = field(default_factory=list)
    mentions: list[Citation] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    marks: list[Span] = field(default_factory=list)


def decoded(data: bytes) -> str:
    """Decode bytes to one line: a line break and the indentation after it become a space."""
    return re.sub(r"[ \t]*[\r\n]\s*", " ", data.decode("utf-8", "replace"))


@dataclass(slots=True)
class _Scan:
    """The scan of one piece of text, `start` to `end` of `data`, whose first line is `line`."""

    data: bytes
    start: int
    end: int
    line: int
    starts: list[int]  # of all lines of the note
    found: Inlines
    tokens: list[tuple[int, bytes]] = field(default_factory=list)  # brackets and marks, in order
    keys: list[Citation] = field(default_factory=list)

    def line_of(self, at: int) -> int:
        if self.line >= len(self.starts) or at < self.starts[self.line]:
            return self.line  # most pieces are one line
        return bisect_right(self.starts, at)

    def mark(self, kind: str, start: int, end: int) -> None:
        self.found.marks.append(Span(kind, start, end))

    def tokenize(self) -> None:
        """Find the tokens outside code, formulas and comments."""
        data, skip, ticks = self.data, self.start, None
        no_comment_end = False
        math: _OpenFormula | None = None
        for token in _TOKEN.finditer(data, self.start, self.end):
            at = token.start()
            if at < skip:
                continue
            kind = token.lastgroup
            if kind == "tick":
                if ticks is None:
                    ticks = self._tick_ends()
                close = ticks.get(at)
                if close is not None:
                    self.mark("code", at, close)
                    skip = close
            elif kind == "comment" and not no_comment_end:
                close = data.find(b"-->", at, self.end)
                no_comment_end = close < 0
                if close >= 0:
                    self.mark("comment", at, close + 3)
                    skip = close + 3
            elif kind == "math":
                math = self._math(at, token["math"], math)
            elif kind == "url":
                skip = self._url(at, token["url"])
            elif kind in ("bracket", "quote"):
                self.tokens.append((at, token[0]))
            elif kind == "key":
                self._key(token["key"], at, token.end(), True)
            elif kind == "bare" and _YEAR.search(token["bare"]):
                self._key(token["bare"], at, token.end(), False)

    def _tick_ends(self) -> dict[int, int]:
        """Return, for each run of backticks, the end of the next run of the same length."""
        following: dict[int, tuple[int, int]] = {}
        ends: dict[int, int] = {}
        runs = [one.span() for one in re.finditer(rb"`+", self.data[self.start : self.end])]
        for start, end in reversed(runs):
            if end - start in following:
                ends[self.start + start] = self.start + following[end - start][1]
            following[end - start] = (start, end)
        return ends

    def _math(self, at: int, mark: bytes, before: _OpenFormula | None) -> _OpenFormula | None:
        """Open or close a formula; amounts of money and lone dollar signs do neither."""
        data, end = self.data, at + len(mark)
        if before is not None and before[1] == mark:
            closes = data[at - 1 : at].strip() and not data[end : end + 1].isdigit()
            inside = data[before[0] : at]
            if closes and b"->" not in inside and b"@" not in inside:
                del self.tokens[before[2] :], self.keys[before[3] :]
                self.mark("math", before[0], end)
                return None
        if end < self.end and data[end : end + 1].strip():
            return at, mark, len(self.tokens), len(self.keys)
        return before

    def _url(self, at: int, url: bytes) -> int:
        end = at + len(url.rstrip(_TRAILING))
        auto = self.data[at - 1 : at] == b"<" and self.data[end : end + 1] == b">"
        wide = (at - 1, end + 1) if auto else (at, end)
        if not (self.data[at - 2 : at] == b"](" or self.data[at - 3 : at] == b"](<"):
            target = decoded(self.data[at:end])
            self.found.links.append(Link(target, target, self.line_of(at), *wide, "auto"))
            self.mark("link", *wide)
        return end

    def _key(self, key: bytes, start: int, end: int, written_with_at: bool) -> None:
        text = key.decode("utf-8", "replace")
        self.keys.append(Citation(text, self.line_of(start), start, end, written_with_at))

    def pair(self) -> Brackets:
        """Pair the brackets and the quotation marks."""
        out = Brackets()
        squares: list[int] = []
        rounds: list[int] = []
        quote: int | None = None
        for at, mark in self.tokens:
            if mark == b"[":
                squares.append(at)
                out.square[at] = None
            elif mark == b"]":
                if squares:
                    out.square[squares.pop()] = at
            elif mark == b"(":
                rounds.append(at)
            elif mark == b")":
                if rounds:
                    out.round[rounds.pop()] = at
            elif quote is None:
                before = self.data[at - 1 : at] if at > self.start else b""
                if mark != b"\xe2\x80\x9d" and before in b" \t\r\n([*_>":
                    quote = at
            elif (
                mark != b"\xe2\x80\x9c"
                and not self.data[at + len(mark) : at + len(mark) + 1].isalnum()
            ):
                out.quoted.append((quote, at + len(mark)))
                quote = None
        return out

    def resolve_links(self, brackets: Brackets) -> None:
        """Find figures and links among the brackets, and the citations outside link targets.

        Inner brackets come first, for a link cannot hold a link, nor a figure a figure.
        """
        data, found = self.data, self.found
        targets: list[tuple[int, int]] = []
        last_link = last_figure = -1
        pairs = [(close, at) for at, close in brackets.square.items() if close is not None]
        for close, at in sorted(pairs):
            if brackets.square.get(at + 1) == close - 1 and last_link < at:
                target = decoded(data[at + 2 : close - 1])
                found.links.append(Link(target, target, self.line_of(at), at, close + 1, "wiki"))
                self.mark("link", at, close + 1)
                brackets.links.update((at, at + 1))
                last_link = at
                continue
            end = brackets.round.get(close + 1)
            if end is None or data.find(b"](", close + 2, end) >= 0:
                continue
            figure = at > self.start and data[at - 1 : at] == b"!"
            if at < (last_figure if figure else last_link):
                continue
            target = _target(data[close + 2 : end])
            text, line = decoded(data[at + 1 : close]), self.line_of(at)
            targets.append((close + 2, end))
            if figure:
                last_figure = at
                brackets.images.add(at)
                found.figures.append(Figure(text, target, line, at - 1, end + 1))
                self.mark("image", at - 1, end + 1)
            else:
                last_link = at
                brackets.links.add(at)
                found.links.append(Link(text, target, line, at, end + 1, "inline"))
                self.mark("link", at, end + 1)
        targets.sort()
        for key in self.keys:
            near = bisect_right(targets, (key.start, 1 << 62)) - 1
            if near >= 0 and targets[near][0] < key.start and key.end <= targets[near][1]:
                continue  # part of an address; a target that is only a key is a citation
            (found.citations if key.written_with_at else found.mentions).append(key)
            self.mark("citation", key.start, key.end)


def _target(inside: bytes) -> str:
    """Return the address in `(address "title")` or `(<address> "title")`."""
    pointed = _POINTED.match(inside)
    if pointed:
        return decoded(pointed[1])
    return decoded(_TITLE.split(inside, maxsplit=1)[0]).strip()


def scan(
    data: bytes, start: int, end: int, line: int, starts: list[int], found: Inlines
) -> Brackets | None:
    """Scan `data` from `start` to `end` into `found`; None where there is no token at all."""
    if _SPECIAL.search(data, start, end) is None:
        return None
    text = _Scan(data, start, end, line, starts, found)
    text.tokenize()
    brackets = text.pair()
    text.resolve_links(brackets)
    return brackets
