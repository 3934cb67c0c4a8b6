"""Questions about one source: where it is cited, what was said of it, how far it got."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from modgraft.log.ask import refusals
from modgraft.log.ask.answer import Answer, Evidence
from modgraft.log.ask.evidence import Asking, counted, dated, line_of, lines_of, named, place
from modgraft.log.index.query import Hit
from modgraft.log.index.select import notes_named

MOST = 40
"""Lines that an answer shows of what was said."""

_QUOTED = re.compile(r"^\s*(?:[-*+]|\d+[.)])?\s*(?:[\"“].*[\"”][\s.]*$|>)")
_FIELD = re.compile(r"\s*(?:title|author|date|year|url)\s*=")
_FIGURE = re.compile(r"^\s*(?:[-*+]|\d+[.)])?\s*!\[[^\]]*\]\([^)]*\)\s*$")


def cites(asking: Asking) -> Answer:
    """Every line that cites the source."""
    key = asking.asked.key
    if key is None:
        return refusals.unknown_source(asking)
    every = asking.log.backlinks(key)
    if not every:
        return refusals.never_cited(asking, key)
    hits = _within(asking, every)
    if not hits:
        return _elsewhere(asking, f"no line{_where(asking)} cites @{key}", every)
    notes = counted(len({h.note for h in hits}), "note")
    times = "once" if len(hits) == 1 else f"{len(hits)} times"
    text = f"{named(key, asking.sources)} is cited {times} in {notes}"
    return asking.answer(f"{text}{_where(asking)}.", map(line_of, hits))


def said(asking: Asking) -> Answer:
    """What was written about the source: under its events, and wherever else it is cited."""
    key = asking.asked.key
    if key is None:
        return refusals.unknown_source(asking)
    every = asking.log.backlinks(key)
    if not every:
        return refusals.never_cited(asking, key)
    own = [h for h in asking.log.query(cites=key) if h.is_about(key)]
    found = [line for h in _within(asking, own) for line in _comments(h)]
    heads = {place(h) for h in own}
    found += [line_of(h) for h in _within(asking, every) if place(h) not in heads]
    lines = _once(found)
    if not lines:
        before = [e for h in own for e in _comments(h)]
        before += [line_of(h) for h in every if place(h) not in heads]
        if before and _where(asking):
            return _elsewhere(asking, f"nothing is said about @{key}{_where(asking)}", every)
        return refusals.no_comment(asking, key)
    shown = _fitting(lines, asking.asked.topic)[:MOST]
    many = counted(len(lines), "line")
    part = f", {len(shown)} of them here" if len(shown) < len(lines) else ""
    mine = any(not _QUOTED.match(line.quote) for line in lines)
    only = "" if mine else "; they are quotations, with no comment"
    return asking.answer(f"{many} about {named(key, asking.sources)}{part}{only}.", shown)


def quoted(asking: Asking) -> Answer:
    """What was quoted from the source, under its events."""
    key = asking.asked.key
    if key is None:
        return refusals.unknown_source(asking)
    own = [h for h in asking.log.query(cites=key) if h.is_about(key)]
    if not own and not asking.log.backlinks(key):
        return refusals.never_cited(asking, key)
    lines = _once(e for h in _within(asking, own) for e in lines_of(h) if _QUOTED.match(e.quote))
    if not lines:
        at = "; ".join(f"{h.action} at {place(h)}" for h in own) or "it is only cited"
        return asking.refuse(f"no quotation from @{key} is recorded ({at})", map(line_of, own))
    many = counted(len(lines), "quotation")
    return asking.answer(f"{many} from {named(key, asking.sources)}.", lines[:MOST])


def status(asking: Asking) -> Answer:
    """How far the source got: skimmed, digging, to be read in full, read."""
    key = asking.asked.key
    if key is None:
        return refusals.unknown_source(asking)
    every = asking.log.query(cites=key, actions=("skim", "read"))
    hits = [h for h in every if h.is_about(key)]
    if not hits:
        lines = asking.log.backlinks(key)
        if not lines:
            return refusals.never_cited(asking, key)
        at = ", ".join(map(place, lines))
        reason = f"@{key} is cited at {at}, but was neither skimmed nor read"
        return asking.refuse(reason, map(line_of, lines))
    order = ("skimmed", "digging", "full_read", "read")
    best = max(hits, key=lambda h: order.index(h.status))
    wants = re.search(r"\b(read|skim\w*)\b", asking.asked.question, re.IGNORECASE)
    yes = "" if wants is None else "No: it was " if _short(wants[1], best) else "Yes: it was "
    spoken = {
        "skimmed": "skimmed, and nothing more was decided",
        "digging": "skimmed and marked for digging deeper",
        "full_read": "skimmed and marked for full reading",
        "read": "read",
    }[best.status]
    text = f"{yes}{spoken}, at {place(best)}, {dated(best)}."
    return asking.answer(text, map(line_of, hits))


def entry(asking: Asking) -> Answer:
    """What the bibliography says of the source."""
    key = asking.asked.key
    if key is None:
        return refusals.unknown_source(asking)
    found = asking.sources.get(key)
    if found is None:
        reason = f"@{key} is cited, but is not in the bibliography"
        return asking.refuse(reason, map(line_of, asking.log.backlinks(key)))
    file = Path(found.file)
    lines = file.read_bytes().splitlines() if file.is_file() else []
    shown = []
    for number, raw in enumerate(lines[found.line - 1 :], found.line):
        line = raw.decode("utf-8", "replace")
        if number > found.line and line.startswith("@"):
            break
        if number == found.line or _FIELD.match(line):
            shown.append(Evidence(asking.log.name(file), number, line, found.year))
    text = f"{found.title}. {', '.join(found.authors) or 'No author'}. {found.year}. {found.url}"
    return asking.answer(text.strip(), shown)


def unresolved(asking: Asking) -> Answer:
    """Citations of what no bibliography has."""
    log, known = asking.log, asking.sources
    keys = [
        k for (k,) in log.store.rows("SELECT DISTINCT key FROM cites WHERE marked ORDER BY key")
    ]
    missing = [k for k in keys if k not in known]
    hits = _within(asking, [h for k in missing for h in log.backlinks(k)])
    if not hits:
        return asking.answer("Every citation is in the bibliography.", ())
    names = ", ".join(f"@{k}" for k in missing)
    text = f"{len(missing)} of {len(keys)} keys are in no bibliography: {names}."
    return asking.answer(text, map(line_of, hits))


def _short(wanted: str, best: Hit) -> bool:
    """Whether it was asked if it was read, and it was not."""
    return wanted.lower() == "read" and best.status != "read"


def _comments(hit: Hit) -> list[Evidence]:
    """What hangs under an event and what follows it on its line; a figure alone says nothing."""
    lines = [e for e in lines_of(hit)[1:] if not _FIGURE.match(e.quote)]
    rest = hit.quote.rpartition("]")[2].strip(" :.,")
    return [line_of(hit), *lines] if rest else lines


def _within(asking: Asking, hits: Iterable[Hit]) -> list[Hit]:
    """Those in the note and the time that were asked for."""
    asked = asking.asked
    names = None
    if asked.note is not None:
        ids = notes_named(asking.log.store, asked.note)
        marks = ", ".join("?" * len(ids))
        found = asking.log.store.rows(f"SELECT note FROM files WHERE id IN ({marks})", *ids)  # noqa: S608
        names = {name for (name,) in found}
    return [
        h
        for h in hits
        if (names is None or h.note in names)
        and (asked.since is None or h.when >= asked.since)
        and (asked.until is None or h.when <= asked.until)
    ]


def _where(asking: Asking) -> str:
    asked = asking.asked
    note = f" in {asked.note}" if asked.note else ""
    return f"{note} {asked.moment.words.strip()}" if asked.moment else note


def _elsewhere(asking: Asking, reason: str, every: Sequence[Hit]) -> Answer:
    first = min(every, key=lambda h: (h.when, h.note, h.line))
    return asking.refuse(
        f"{reason}; it first comes up at {place(first)}, {dated(first)}", [line_of(first)]
    )


def _once(lines: Iterable[Evidence]) -> list[Evidence]:
    """Each text once: a draft and its note share lines."""
    kept: dict[str, Evidence] = {}
    for line in lines:
        kept.setdefault(line.quote.strip(), line)
    return list(kept.values())


def _fitting(lines: list[Evidence], topic: Sequence[str]) -> list[Evidence]:
    """Those that mention what was asked first, where any does."""
    words = [w.lower()[:6] for w in topic]
    return sorted(lines, key=lambda e: -sum(w in e.quote.lower() for w in words))
