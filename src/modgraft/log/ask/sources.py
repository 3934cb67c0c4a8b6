"""Answer questions about one source: where it is cited, what was said, whether it was read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from modgraft.log.ask import refusals
from modgraft.log.ask.answer import (
    Answer,
    Evidence,
    Lookup,
    all_lines,
    count_noun,
    date_of,
    first_line,
    source_name,
)
from modgraft.log.index.query import Hit
from modgraft.log.index.select import READING_STATUSES, find_note_ids

MOST = 40
"""Lines that an answer shows of what was said about a source."""

_QUOTED = re.compile(r"^\s*(?:[-*+]|\d+[.)])?\s*(?:[\"“].*[\"”][\s.]*$|>)")
_FIELD = re.compile(r"\s*(?:title|author|date|year|url)\s*=")
_FIGURE = re.compile(r"^\s*(?:[-*+]|\d+[.)])?\s*!\[[^\]]*\]\([^)]*\)\s*$")


def cites(lookup: Lookup) -> Answer:
    """List every line that cites the source."""
    key = lookup.key
    every = lookup.index.backlinks(key)
    if not every:
        return refusals.never_cited(lookup, key)
    hits = _within(lookup, every)
    if not hits:
        return _elsewhere(lookup, f"no line{lookup.question.scope} cites @{key}", every)
    notes = count_noun(len({h.note for h in hits}), "note")
    times = "once" if len(hits) == 1 else f"{len(hits)} times"
    text = f"{source_name(key, lookup.sources)} is cited {times} in {notes}"
    return lookup.answer(f"{text}{lookup.question.scope}.", map(first_line, hits))


def comments(lookup: Lookup) -> Answer:
    """Show what was written about the source: under its events and wherever else it is cited."""
    key = lookup.key
    every = lookup.index.backlinks(key)
    if not every:
        return refusals.never_cited(lookup, key)
    own = lookup.about(key)
    found = [line for h in _within(lookup, own) for line in _comments(h)]
    heads = {h.place for h in own}
    found += [first_line(h) for h in _within(lookup, every) if h.place not in heads]
    lines = _once(found)
    if not lines:
        before = [e for h in own for e in _comments(h)]
        before += [first_line(h) for h in every if h.place not in heads]
        if before and lookup.question.scope:
            return _elsewhere(lookup, f"nothing is said about @{key}{lookup.question.scope}", every)
        return refusals.no_comment(lookup, key)
    shown = _by_topic(lines, lookup.question.topic)[:MOST]
    many = count_noun(len(lines), "line")
    part = f", {len(shown)} of them here" if len(shown) < len(lines) else ""
    mine = any(not _QUOTED.match(line.quote) for line in lines)
    only = "" if mine else "; they are quotations, with no comment"
    return lookup.answer(f"{many} about {source_name(key, lookup.sources)}{part}{only}.", shown)


def quotations(lookup: Lookup) -> Answer:
    """Show the quotations from the source that stand under its events."""
    key = lookup.key
    own = lookup.about(key)
    if not own and not lookup.index.backlinks(key):
        return refusals.never_cited(lookup, key)
    lines = _once(e for h in _within(lookup, own) for e in all_lines(h) if _QUOTED.match(e.quote))
    if not lines:
        at = "; ".join(f"{h.action} at {h.place}" for h in own) or "it is only cited"
        return lookup.refuse(f"no quotation from @{key} is recorded ({at})", map(first_line, own))
    many = count_noun(len(lines), "quotation")
    return lookup.answer(f"{many} from {source_name(key, lookup.sources)}.", lines[:MOST])


def status(lookup: Lookup) -> Answer:
    """Say how far the source was read: skimmed, to dig into, to read in full, read."""
    key = lookup.key
    hits = lookup.about(key, "skim", "read")
    if not hits:
        lines = lookup.index.backlinks(key)
        if not lines:
            return refusals.never_cited(lookup, key)
        at = ", ".join(h.place for h in lines)
        reason = f"@{key} is cited at {at}, but was neither skimmed nor read"
        return lookup.refuse(reason, map(first_line, lines))
    best = max(hits, key=lambda h: READING_STATUSES.index(h.status))
    wants = re.search(r"\b(read|skim\w*)\b", lookup.question.text, re.IGNORECASE)
    unread = wants is not None and wants[1].lower() == "read" and best.status != "read"
    yes = "" if wants is None else "No: it was " if unread else "Yes: it was "
    spoken = {
        "skimmed": "skimmed, and nothing more was decided",
        "digging": "skimmed and marked for digging deeper",
        "full_read": "skimmed and marked for full reading",
        "read": "read",
    }[best.status]
    text = f"{yes}{spoken}, at {best.place}, {date_of(best)}."
    return lookup.answer(text, map(first_line, hits))


def entry(lookup: Lookup) -> Answer:
    """Show the source's entry in the bibliography."""
    key = lookup.key
    found = lookup.sources.get(key)
    if found is None:
        reason = f"@{key} is cited, but is not in the bibliography"
        return lookup.refuse(reason, map(first_line, lookup.index.backlinks(key)))
    file = Path(found.file)
    lines = file.read_bytes().splitlines() if file.is_file() else []
    shown = []
    for number, raw in enumerate(lines[found.line - 1 :], found.line):
        line = raw.decode("utf-8", "replace")
        if number > found.line and line.startswith("@"):
            break
        if number == found.line or _FIELD.match(line):
            shown.append(Evidence(lookup.index.name(file), number, line, found.year))
    text = f"{found.title}. {', '.join(found.authors) or 'No author'}. {found.year}. {found.url}"
    return lookup.answer(text.strip(), shown)


def unresolved(lookup: Lookup) -> Answer:
    """List the citations whose key is not in the bibliography."""
    index, known = lookup.index, lookup.sources
    keys = index.database.rows("SELECT DISTINCT key FROM cites WHERE marked ORDER BY key")
    missing = [key for (key,) in keys if key not in known]
    hits = _within(lookup, [h for k in missing for h in index.backlinks(k)])
    if not hits:
        return lookup.answer("Every citation is in the bibliography.", ())
    names = ", ".join(f"@{k}" for k in missing)
    text = f"{len(missing)} of {len(keys)} keys are in no bibliography: {names}."
    return lookup.answer(text, map(first_line, hits))


def _comments(hit: Hit) -> list[Evidence]:
    """Return the lines under an event, and its own where words follow it; figures are left out."""
    lines = [e for e in all_lines(hit)[1:] if not _FIGURE.match(e.quote)]
    rest = hit.quote.rpartition("]")[2].strip(" :.,")
    return [first_line(hit), *lines] if rest else lines


def _within(lookup: Lookup, hits: Iterable[Hit]) -> list[Hit]:
    """Keep the hits in the note and the period of the question."""
    question = lookup.question
    names = None
    if question.note is not None:
        ids = find_note_ids(lookup.index.database, question.note)
        marks = ", ".join("?" * len(ids))
        found = lookup.index.database.rows(f"SELECT note FROM files WHERE id IN ({marks})", *ids)  # noqa: S608
        names = {name for (name,) in found}
    return [
        h
        for h in hits
        if (names is None or h.note in names)
        and (question.since is None or h.when >= question.since)
        and (question.until is None or h.when <= question.until)
    ]


def _elsewhere(lookup: Lookup, reason: str, every: Sequence[Hit]) -> Answer:
    first = min(every, key=lambda h: (h.when, h.note, h.line))
    return lookup.refuse(
        f"{reason}; it first comes up at {first.place}, {date_of(first)}", [first_line(first)]
    )


def _once(lines: Iterable[Evidence]) -> list[Evidence]:
    """Keep each text once: a draft and its note share lines."""
    kept: dict[str, Evidence] = {}
    for line in lines:
        kept.setdefault(line.quote.strip(), line)
    return list(kept.values())


def _by_topic(lines: list[Evidence], topic: Sequence[str]) -> list[Evidence]:
    """Sort lines that hold words of the question to the front."""
    words = [w.lower()[:6] for w in topic]
    return sorted(lines, key=lambda e: -sum(w in e.quote.lower() for w in words))
