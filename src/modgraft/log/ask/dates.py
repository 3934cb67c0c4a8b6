"""Answer questions about time: when something was written, and what was written when."""

from __future__ import annotations

import re
from collections import Counter

from modgraft.log.ask import refusals
from modgraft.log.ask.answer import Answer, Lookup, count_events, date_of, first_line, place, places
from modgraft.log.ask.lexicon import GENERIC
from modgraft.log.index.query import Hit

_ASKS = re.compile(r"\b(?:cit|mention|refer|come up|came up|appear)\w*", re.IGNORECASE)
_WRITES = re.compile(
    r"cit(?:e[sd]?|ing)|appear(?:ed)?|c[oa]me|up|start(?:ed)?|begin", re.IGNORECASE
)
MOST = 60
"""Lines shown of what was written in a period."""


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
    return lookup.answer(f"{date_of(hit)}, at {place(hit)}{count}.", [first_line(hit)])


def _of_source(lookup: Lookup, key: str) -> list[Hit] | Answer:
    """Return what was done with a source, or the refusal that says why nothing was."""
    index, question = lookup.index, lookup.question
    every = index.backlinks(key)
    if not every:
        return refusals.never_cited(lookup, key)
    wants = [a for a in ("read", "skim") if re.search(rf"\b{a}", question.text, re.IGNORECASE)]
    if _ASKS.search(question.text) or not wants:
        return every
    done = [h for h in index.query(cites=key, actions=wants[0]) if h.is_about(key)]
    if done:
        return done
    other = [h for h in index.query(cites=key, actions=("skim", "read")) if h.is_about(key)]
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
    words = question.period.words.strip() if question.period else ""
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
