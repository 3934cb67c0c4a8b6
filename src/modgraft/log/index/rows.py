"""Turn a parsed note into rows of the index."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from modgraft.log.index.times import leading_date

if TYPE_CHECKING:
    from modgraft.log.index.bibliography import Entry
    from modgraft.log.syntax.note import Note

LONGEST = 1_000_000
"""Characters of a block that can be searched."""
LONGEST_EVENT = 20_000
"""Characters below an event that can be searched with it."""
INHERITED = 400
"""Characters of a block's parents that are searched with it."""

_LETTERS = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af])")
_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")

Timestamp = tuple[str, str]
"""A time and its source: git, note, name or file."""


@dataclass
class Rows:
    """The rows of one note; ids of blocks and events count from 0 within it."""

    blocks: list[tuple[Any, ...]] = field(default_factory=list)
    block_words: list[tuple[str, str]] = field(default_factory=list)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    event_words: list[str] = field(default_factory=list)
    cites: list[tuple[Any, ...]] = field(default_factory=list)


def searchable(text: str) -> str:
    """Prepare text for the full-text index: split scripts without spaces into characters."""
    return text if text.isascii() else _LETTERS.sub(r" \1 ", text)


def words_of_key(key: str) -> str:
    """Split a citation key: ``huangComposerCreative2023`` → ``huang Composer Creative 2023``."""
    return " ".join(_PARTS.findall(key))


def rows(note: Note, at: Callable[[int], Timestamp], sources: Mapping[str, Entry]) -> Rows:
    """Build all rows of a note; ``at`` returns when a line was written."""
    made = Rows()
    texts = [note.data[b.start : b.end].decode("utf-8", "replace") for b in note.blocks]
    starts = [b.start for b in note.blocks]
    cited: dict[int, list[str]] = {}
    for citation in (*note.citations, *note.mentions):
        block = bisect_left(starts, citation.start + 1) - 1
        cited.setdefault(max(block, 0), []).append(citation.key)
    own, above = _events_of_blocks(note)
    dates = _dates(note, texts, at)
    _add_blocks(made, note, texts, cited, (own, above), dates, sources)
    _add_events(made, note, dates, sources)
    _add_citations(made, note, starts)
    return made


def _add_blocks(
    made: Rows,
    note: Note,
    texts: Sequence[str],
    cited: Mapping[int, list[str]],
    events: tuple[dict[int, int], list[int | None]],
    dates: Sequence[Timestamp],
    sources: Mapping[str, Entry],
) -> None:
    own, above = events
    inherited: list[str] = []
    name = re.sub(r"[/_.-]", " ", (note.name or "").removesuffix(".md"))
    for index, (block, text) in enumerate(zip(note.blocks, texts, strict=True)):
        parent = "" if block.parent is None else inherited[block.parent]
        titles = " ".join(_titles(cited.get(index, ()), sources))
        inherited.append(f"{titles} {parent}"[:INHERITED])
        over = "" if block.parent is None else texts[block.parent][:INHERITED]
        context = f"{name} {block.section or ''} {titles} {parent} {over}"
        digest = blake2b(text.encode(), digest_size=16).digest()
        lines = note.data[block.start : block.end].rstrip(b"\r\n").splitlines()
        end_line = block.line + max(len(lines), 1) - 1
        event = own.get(index, above[index])
        made.blocks.append(
            (block.line, end_line, block.kind, block.depth, block.section, event, *dates[index],
             text, digest)
        )  # fmt: skip
        made.block_words.append((searchable(text[:LONGEST]), searchable(context)))


def _add_events(
    made: Rows, note: Note, dates: Sequence[Timestamp], sources: Mapping[str, Entry]
) -> None:
    for event in note.events:
        when = dates[event.block]
        keys = list(dict.fromkeys(event.keys))
        other = dict.fromkeys(c.key for c in event.citations if c.key not in keys)
        all_keys = " ".join([*keys, *other])
        said = int(event.has_body or bool((event.result or "").strip()))
        made.events.append(
            (event.line, event.end_line, event.action, event.written, event.arguments,
             event.result, event.status, event.section, event.depth, *when, all_keys,
             len(keys), said)
        )  # fmt: skip
        below = note.data[event.below[0] : min(event.below[1], event.below[0] + LONGEST_EVENT)]
        head = note.data[event.start : event.rest[1]]
        titles = " ".join(_titles(keys, sources))
        text = (head + b"\n" + below).decode("utf-8", "replace")
        made.event_words.append(searchable(f"{event.action} {text} {titles}"))


def _add_citations(made: Rows, note: Note, starts: list[int]) -> None:
    found = sorted((*note.citations, *note.mentions), key=lambda c: c.start)
    spans = _spans((i, e.start, e.rest[1], e.below) for i, e in enumerate(note.events))
    arguments = {(i, key) for i, event in enumerate(note.events) for key in event.keys}
    innermost = _innermost(spans, [c.start for c in found])
    for citation, event in zip(found, innermost, strict=True):
        block = max(bisect_left(starts, citation.start + 1) - 1, 0)
        argument = int(event is not None and (event, citation.key) in arguments)
        marked = int(citation.written_with_at)
        made.cites.append((citation.line, citation.key, event, block, argument, marked))


def _titles(keys: Iterable[str], sources: Mapping[str, Entry]) -> Iterator[str]:
    for key in keys:
        yield words_of_key(key)
        if key in sources:
            yield f"{sources[key].title} {sources[key].short}"


def _dates(note: Note, texts: Sequence[str], at: Callable[[int], Timestamp]) -> list[Timestamp]:
    """Date each block: by its commit, else by its own date or that of a block above it."""
    dates: list[Timestamp] = []
    heading: str | None = None
    stated: list[str | None] = []
    for block, text in zip(note.blocks, texts, strict=True):
        said = leading_date(text[:600])
        if block.kind == "heading":
            heading = said
        if said is None:
            said = heading if block.parent is None else stated[block.parent] or heading
        stated.append(said)
        found = at(block.line)
        dates.append((said, "note") if said is not None and found[1] != "git" else found)
    return dates


# -- which event a place belongs to ------------------------------------------------------------

_Span = tuple[int, int, int]


def _spans(events: Iterable[tuple[int, int, int, tuple[int, int]]]) -> list[_Span]:
    """Return the ranges of events, outer ones first: each event itself, and what hangs below it.

    What hangs below a line with two events belongs to the first.
    """
    spans = []
    for index, start, end, below in events:
        spans.append((start, end, index))
        if below[1] > below[0]:
            spans.append((*below, index))
    return sorted(spans, key=lambda s: (s[0], -s[1], -s[2]))


def _innermost(spans: Sequence[_Span], places: Sequence[int]) -> list[int | None]:
    """Return the innermost span around each of ``places``, which are in order."""
    found: list[int | None] = []
    stack: list[_Span] = []
    at = 0
    for place in places:
        while at < len(spans) and spans[at][0] <= place:
            while stack and stack[-1][1] <= spans[at][0]:
                stack.pop()
            stack.append(spans[at])
            at += 1
        while stack and stack[-1][1] <= place:
            stack.pop()
        found.append(stack[-1][2] if stack else None)
    return found


def _events_of_blocks(note: Note) -> tuple[dict[int, int], list[int | None]]:
    """Return the first event in each block, and the innermost event above each block."""
    own: dict[int, int] = {}
    for index, event in enumerate(note.events):
        own.setdefault(event.block, index)
    below = [(i, 0, 0, e.below) for i, e in enumerate(note.events)]
    spans = [s for s in _spans(below) if s[1] > s[0]]
    return own, _innermost(spans, [b.start for b in note.blocks])
