"""Answer questions about events, notes, runs and dates, which a query answers exactly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from modgraft.log.ask import refusals
from modgraft.log.ask.answer import (
    Answer,
    Lookup,
    all_lines,
    count_events,
    count_noun,
    date_of,
    first_line,
    places,
)
from modgraft.log.ask.free import free
from modgraft.log.ask.lexicon import GENERIC
from modgraft.log.index.query import Hit

_AGAIN = re.compile(r"\b(?:more than once|twice|repeatedly|several times)\b", re.IGNORECASE)
_RUN = re.compile(
    r"\b(?:last|latest|newest|most recent) ([\w.-]+) run\b|\brun of ([\w.-]*\w)", re.IGNORECASE
)

SECTIONS: tuple[tuple[str, str], ...] = (
    (r"\btl;?dr\b|\bsummary\b|\bsum(?:med)? up\b|\bconclu\w+\b", "tl;dr"),
    (r"\bcontext\b|\bbackground\b", "Context"),
    (r"\bnext\b", "Next?"),
    (r"\bdone\b", "Done"),
    (r"\blearn\w*\b", "Learned"),
    ("", "tl;dr"),
)
"""Words of a question → the section of a note that they ask for; the last row takes the rest."""

_ASKS = re.compile(r"\b(?:cit|mention|refer|come up|came up|appear)\w*", re.IGNORECASE)
_WRITES = re.compile(
    r"cit(?:e[sd]?|ing)|appear(?:ed)?|c[oa]me|up|start(?:ed)?|begin", re.IGNORECASE
)
MOST = 60
"""Lines shown of what was written in a period."""

FEW = 8
"""Up to this many events are shown whole; of more, only the first lines."""


def events(lookup: Lookup) -> Answer:
    """List the events of the actions that are named, under all conditions of the question."""
    again = _AGAIN.search(lookup.question.text)
    ignored = GENERIC | set(again[0].lower().split() if again else ())
    topic = tuple(w for w in lookup.question.topic if w.lower() not in ignored)
    question = lookup.question = replace(lookup.question, topic=topic)
    hits = lookup.index.query(lookup.query())
    if not hits and topic and "lesson_learned" in question.actions:
        lookup.kind = "free"
        lookup.remarks.append("no lesson is recorded about it; these are other lines")
        return free(lookup)
    if not hits:
        return refusals.no_match(lookup)
    if again:
        return _repeated(lookup, hits)
    if question.newest or question.oldest:
        hit, which = (hits[-1], "last") if question.newest else (hits[0], "first")
        what = count_events(question.actions, 1).partition(" ")[2]
        return lookup.answer(f"The {which} {what}: {hit.place}, {date_of(hit)}.", all_lines(hit))
    if question.period:
        lookup.kind = "temporal"
    few = len(hits) <= FEW and not question.counts
    lines = [e for h in hits for e in (all_lines(h) if few else [first_line(h)])]
    return lookup.answer(_summary(lookup, hits), lines)


def _repeated(lookup: Lookup, hits: Sequence[Hit]) -> Answer:
    """List the events whose arguments occur more than once."""
    times = Counter(h.arguments for h in hits)
    again = [h for h in hits if h.arguments and times[h.arguments] > 1]
    many = len({h.arguments for h in again})
    return lookup.answer(f"{many} of them more than once.", map(first_line, again))


def _summary(lookup: Lookup, hits: Sequence[Hit]) -> str:
    """Count events in one sentence that repeats the question's conditions."""
    question = lookup.question
    parts = [count_events(question.actions, len(hits), question.status)]
    if question.topic:
        parts.append(f" about {' '.join(question.topic)!r}")
    parts.append(question.scope)
    if question.actions == ("question",) and not question.status:
        opened = sum(h.status == "open" for h in hits)
        parts.append(f", {opened} open and {len(hits) - opened} answered")
    distinct = {(h.arguments or "", h.result or "", h.body) for h in hits}
    if len(distinct) < len(hits):
        parts.append(f", {len(distinct)} of them distinct")
    return "".join(parts) + "."


def queue(lookup: Lookup) -> Answer:
    """List the sources that are still to be read, from the reading queue."""
    owed = [o for o in lookup.index.reading_queue() if o.owed]
    if not owed:
        return lookup.refuse("nothing is owed: no source is marked for reading or digging")
    hits = {(h.note, h.line): h for h in lookup.index.query(actions="skim")}
    full = sum(o.status == "full_read" for o in owed)
    text = f"{full} to read in full, {len(owed) - full} to dig deeper."
    return lookup.answer(text, [first_line(hits[o.note, o.line]) for o in owed])


def section(lookup: Lookup) -> Answer:
    """Show one section of a note."""
    note = lookup.question.note or ""
    title = next(t for p, t in SECTIONS if re.search(p, lookup.question.text, re.IGNORECASE))
    lines = [e for h in lookup.index.section(note, title) for e in all_lines(h)]
    if not lines:
        return lookup.refuse(f"the section {title!r} of {note} is empty, or it has none")
    return lookup.answer(f"{title} of {note}, {count_noun(len(lines), 'line')}.", lines)


def notes(lookup: Lookup) -> Answer:
    """List the notes."""
    names = lookup.index.notes()
    return lookup.answer(f"{len(names)} notes: {', '.join(names)}.", ())


def tally(lookup: Lookup) -> Answer:
    """Count notes, events, citations and sources."""
    rows = lookup.index.database.rows
    keys = [k for (k,) in rows("SELECT key FROM cites WHERE marked")]
    sources, distinct = lookup.sources, set(keys)
    known = sum(k in sources for k in distinct)
    (count,) = rows("SELECT count(*) FROM events")[0]
    text = (
        f"{len(lookup.index.notes())} notes, {count} events, {len(keys)} citations of "
        f"{len(distinct)} distinct keys, {known} of which are in the bibliography of "
        f"{len(sources)} sources."
    )
    return lookup.answer(text, ())


def mentions(lookup: Lookup) -> Answer:
    """List every line that holds all the words."""
    words = " ".join(lookup.question.topic)
    anywhere = lookup.query(actions=(), status=None, cites=None)
    hits = lookup.index.query(anywhere)
    if not hits:
        if lookup.index.query(replace(anywhere, note=None, since=None, until=None)):
            return refusals.no_match(lookup)
        return lookup.refuse(f"no line of the {len(lookup.index.notes())} notes mentions {words!r}")
    hits.sort(key=lambda h: (h.note, h.line))
    names = list(dict.fromkeys(h.note for h in hits))
    where = f"{count_noun(len(names), 'note')} ({', '.join(names)})"
    text = f"{words!r} is in {count_noun(len(hits), 'block')} of {where}."
    return lookup.answer(text, map(first_line, hits))


def last_run(lookup: Lookup) -> Answer:
    """Report the result of the newest run, from the note that it wrote."""
    index, start = lookup.index, _newest_start(lookup)
    if isinstance(start, Answer):
        return start
    ends = index.query(actions=("return", "interrupt"), note=start.note, section=start.section)
    end = next((h for h in reversed(ends) if h.line > start.line), None)
    if end is None:
        where = f"{start.place}, {date_of(start)}"
        reason = f"the run of {start.arguments} was started ({where}), and has not ended"
        return lookup.refuse(reason, [first_line(start)])
    where = f"{end.place}, {date_of(end)}"
    if end.action == "interrupt":
        reason = f"the run of {start.arguments} broke off ({where}): {end.quote.strip(' -')}"
        return lookup.refuse(reason, all_lines(end))
    reached = [*index.section(end.note, "Learned"), *index.section(end.note, "Done")]
    lines = [line for hit in reached for line in all_lines(hit)]
    return lookup.answer(f"{end.result or 'It ended'} ({where}).", [first_line(end), *lines])


def _newest_start(lookup: Lookup) -> Hit | Answer:
    """Return the start of the newest run that the question means, or the refusal if none is."""
    match = _RUN.search(lookup.question.text)
    name = (match[1] or match[2]).lower() if match else ""
    started = lookup.index.query(actions="start")
    runs = [h for h in started if not name or name == (h.arguments or "").lower()]
    runs = runs or [h for h in started if name in f"{h.arguments} {h.note}".lower()]
    if runs:
        return max(runs, key=lambda h: (h.when, h.note, h.line))
    which = f"no run of {name!r} is recorded" if name else "no run is recorded"
    there = ", ".join(dict.fromkeys(h.arguments or "" for h in started))
    what = f"there are runs of: {there}" if there else "there is none of anything"
    return lookup.refuse(f"{which}; {what}")


# -- time --------------------------------------------------------------------------------------


def when(lookup: Lookup) -> Answer:
    """Say when something was done or written for the first or the last time."""
    question, index = lookup.question, lookup.index
    if question.unknown_key:
        return refusals.unknown_source(lookup)
    topic = [w for w in question.topic if w.lower() not in GENERIC and not _WRITES.fullmatch(w)]
    if question.key is not None:
        hits = _of_source(lookup, question.key)
        if isinstance(hits, Answer):
            return hits
    else:
        if not question.actions and not topic:
            return lookup.refuse("the question names nothing whose time could be looked up")
        text = " ".join(topic) or None
        hits = index.query(
            actions=question.actions, text=text, note=question.note, status=question.status
        )
        if not hits and question.actions and topic:
            return refusals.no_match(lookup)
        if not hits:
            what = f"no line mentions {text!r}" if text else count_events(question.actions, 0)
            return lookup.refuse(f"{what} in any of the {len(index.notes())} notes")
    hits = sorted(hits, key=lambda h: (h.when, h.note, h.line))
    hit = hits[-1] if question.newest else hits[0]
    which = "the last time" if question.newest else "the first time"
    count = f", {which} of {len(hits)}" if len(hits) > 1 else ""
    return lookup.answer(f"{date_of(hit)}, at {hit.place}{count}.", [first_line(hit)])


def _of_source(lookup: Lookup, key: str) -> list[Hit] | Answer:
    """Return what was done with a source, or the refusal that says why nothing was."""
    index, question = lookup.index, lookup.question
    every = index.backlinks(key)
    if not every:
        return refusals.never_cited(lookup, key)
    wants = [a for a in ("read", "skim") if re.search(rf"\b{a}", question.text, re.IGNORECASE)]
    if _ASKS.search(question.text) or not wants:
        return every
    done = lookup.about(key, wants[0])
    if done:
        return done
    other = lookup.about(key, "skim", "read")
    did = {"read": "never read", "skim": "never skimmed"}[wants[0]]
    if other:
        seen = {"skim": "skimmed", "read": "read"}[other[0].action]
        reason = f"@{key} was {seen} at {places(other)}, and {did}"
        return lookup.refuse(reason, map(first_line, other))
    return lookup.refuse(
        f"@{key} is cited at {places(every)}, and was {did}", map(first_line, every)
    )


def changed(lookup: Lookup) -> Answer:
    """Say what was written in a period, note by note."""
    question, index = lookup.question, lookup.index
    hits = index.changed(question.since or "0001", question.until and question.until[:10])
    if question.note is not None:
        hits = [h for h in hits if h.note == question.note]
    hits = [h for h in hits if h.text.strip() and not h.text.lstrip().startswith("## ")]
    words = question.period.strip()
    if not hits:
        every = index.database.rows("SELECT min(at), max(at) FROM blocks")[0]
        there = f"the log goes from {every[0]} to {every[1]}" if every[0] else "the log is empty"
        return lookup.refuse(f"nothing was written {words}; {there}")
    count = Counter(h.note for h in hits)
    did = Counter(h.note for h in hits if h.is_event)
    notes = [
        f"{note}: {blocks} blocks, {did[note]} of them events" for note, blocks in count.items()
    ]
    firsts = {h.note: h for h in reversed(hits)}
    shown = [h for h in hits if h.is_event or firsts[h.note] is h][:MOST]
    return lookup.answer(f"Written {words}: {'; '.join(notes)}.", map(first_line, shown))
