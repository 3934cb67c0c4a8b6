"""Questions about time: when something was written, and what was written when."""

from __future__ import annotations

import re
from collections import Counter

from modgraft.log.ask import refusals
from modgraft.log.ask.answer import Answer
from modgraft.log.ask.evidence import Asking, dated, line_of, place, places, things
from modgraft.log.ask.lexicon import GENERIC
from modgraft.log.index.query import Hit

_ASKS = re.compile(r"\b(?:cit|mention|refer|come up|came up|appear)\w*", re.IGNORECASE)
_WRITES = re.compile(
    r"cit(?:e[sd]?|ing)|appear(?:ed)?|c[oa]me|up|start(?:ed)?|begin", re.IGNORECASE
)
MOST = 60


def when(asking: Asking) -> Answer:
    """The first or the last time that something was done or written."""
    asked, log = asking.asked, asking.log
    if asked.unknown_key:
        return refusals.unknown_source(asking)
    topic = [w for w in asked.topic if w.lower() not in GENERIC and not _WRITES.fullmatch(w)]
    if asked.key is not None:
        hits = _of_source(asking, asked.key)
        if isinstance(hits, Answer):
            return hits
    else:
        if not asked.actions and not topic:
            return asking.refuse("the question names nothing whose time could be looked up")
        text = " ".join(topic) or None
        hits = log.query(actions=asked.actions, text=text, note=asked.note, status=asked.status)
        if not hits and asked.actions and topic:
            return refusals.nothing(asking)
        if not hits:
            what = f"no line mentions {text!r}" if text else things(asked.actions, 0)
            return asking.refuse(f"{what} in any of the {len(log.notes())} notes")
    hits = sorted(hits, key=lambda h: (h.when, h.note, h.line))
    hit = hits[-1] if asked.newest else hits[0]
    which = "the last time" if asked.newest else "the first time"
    count = f", {which} of {len(hits)}" if len(hits) > 1 else ""
    return asking.answer(f"{dated(hit)}, at {place(hit)}{count}.", [line_of(hit)])


def _of_source(asking: Asking, key: str) -> list[Hit] | Answer:
    """What was done with a source; or the reason why nothing was."""
    log, asked = asking.log, asking.asked
    every = log.backlinks(key)
    if not every:
        return refusals.never_cited(asking, key)
    wants = [a for a in ("read", "skim") if re.search(rf"\b{a}", asked.question, re.IGNORECASE)]
    if _ASKS.search(asked.question) or not wants:
        return every
    done = [h for h in log.query(cites=key, actions=wants[0]) if h.is_about(key)]
    if done:
        return done
    other = [h for h in log.query(cites=key, actions=("skim", "read")) if h.is_about(key)]
    did = {"read": "never read", "skim": "never skimmed"}[wants[0]]
    if other:
        seen = {"skim": "skimmed", "read": "read"}[other[0].action]
        reason = f"@{key} was {seen} at {places(other)}, and {did}"
        return asking.refuse(reason, map(line_of, other))
    return asking.refuse(f"@{key} is cited at {places(every)}, and was {did}", map(line_of, every))


def changed(asking: Asking) -> Answer:
    """What was written in a stretch of time, note by note."""
    asked, log = asking.asked, asking.log
    hits = log.changed(asked.since or "0001", asked.until and asked.until[:10])
    if asked.note is not None:
        hits = [h for h in hits if h.note == asked.note]
    hits = [h for h in hits if h.text.strip() and not h.text.lstrip().startswith("## ")]
    words = asked.moment.words.strip() if asked.moment else ""
    if not hits:
        every = log.store.rows("SELECT min(at), max(at) FROM blocks")[0]
        there = f"the log goes from {every[0]} to {every[1]}" if every[0] else "the log is empty"
        return asking.refuse(f"nothing was written {words}; {there}")
    count = Counter(h.note for h in hits)
    did = Counter(h.note for h in hits if h.is_event)
    notes = [
        f"{note}: {blocks} blocks, {did[note]} of them events" for note, blocks in count.items()
    ]
    firsts = {h.note: h for h in reversed(hits)}
    shown = [h for h in hits if h.is_event or firsts[h.note] is h][:MOST]
    return asking.answer(f"Written {words}: {'; '.join(notes)}.", map(line_of, shown))
