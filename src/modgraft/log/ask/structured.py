"""Questions about events, notes and runs that a query answers exactly."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from modgraft.log.ask import refusals
from modgraft.log.ask.answer import Answer
from modgraft.log.ask.evidence import Asking, counted, dated, line_of, lines_of, place, things
from modgraft.log.ask.lexicon import GENERIC

_AGAIN = re.compile(r"\b(?:more than once|twice|repeatedly|several times)\b", re.IGNORECASE)

#: what is asked of a note → its section
SECTIONS: tuple[tuple[str, str], ...] = (
    (r"\btl;?dr\b|\bsummary\b|\bsum(?:med)? up\b|\bconclu\w+\b", "tl;dr"),
    (r"\bcontext\b|\bbackground\b", "Context"),
    (r"\bnext\b", "Next?"),
    (r"\bdone\b", "Done"),
    (r"\blearn\w*\b", "Learned"),
)


def events(asking: Asking) -> Answer:
    """The events of the actions that are named, with all else that was asked."""
    again = _AGAIN.search(asking.asked.question)
    ignored = GENERIC | set(again[0].lower().split() if again else ())
    topic = tuple(w for w in asking.asked.topic if w.lower() not in ignored)
    asking.asked = replace(asking.asked, topic=topic)
    asked = asking.asked
    hits = asking.log.query(asking.query())
    if not hits and topic and "lesson_learned" in asked.actions:
        from modgraft.log.ask.free import free

        asking.kind = "free"
        asking.remarks.append("no lesson is recorded about it; these are other lines")
        return free(asking)
    if not hits:
        return refusals.nothing(asking)
    if again:
        times = Counter(h.arguments for h in hits)
        hits = [h for h in hits if h.arguments and times[h.arguments] > 1]
        many = len({h.arguments for h in hits})
        return asking.answer(f"{many} of them more than once.", map(line_of, hits))
    if asked.newest or asked.oldest:
        hits = [hits[-1] if asked.newest else hits[0]]
        which = "last" if asked.newest else "first"
        what = things(asked.actions, 1).partition(" ")[2]
        return asking.answer(
            f"The {which} {what}: {place(hits[0])}, {dated(hits[0])}.", lines_of(hits[0])
        )
    about = f" about {' '.join(topic)!r}" if topic else ""
    where = f" in {asked.note}" if asked.note else ""
    when = f" {asked.moment.words.strip()}" if asked.moment else ""
    text = f"{things(asked.actions, len(hits), asked.status)}{about}{where}{when}."
    if asked.actions == ("question",) and not asked.status:
        opened = sum(h.status == "open" for h in hits)
        text = f"{text[:-1]}, {opened} open and {len(hits) - opened} answered."
    distinct = {(h.arguments or "", h.result or "", h.body) for h in hits}
    if len(distinct) < len(hits):
        text = f"{text[:-1]}, {len(distinct)} of them distinct."
    if asked.moment is not None:
        asking.kind = "temporal"
    few = len(hits) <= 8 and not asked.counts
    return asking.answer(text, [e for h in hits for e in (lines_of(h) if few else [line_of(h)])])


def queue(asking: Asking) -> Answer:
    """The reading queue: what is owed to which source."""
    owed = [o for o in asking.log.reading_queue() if o.owed]
    if not owed:
        return asking.refuse("nothing is owed: no source is marked for reading or digging")
    hits = {(h.note, h.line): h for h in asking.log.query(actions="skim")}
    full = sum(o.status == "full_read" for o in owed)
    text = f"{full} to read in full, {len(owed) - full} to dig deeper."
    return asking.answer(text, [line_of(hits[o.note, o.line]) for o in owed])


def section(asking: Asking) -> Answer:
    """What stands in a section of a note."""
    asked = asking.asked
    note = asked.note or ""
    title = next(t for p, t in (*SECTIONS, ("", "tl;dr")) if re.search(p, asked.question, re.I))
    hits = asking.log.section(note, title)
    lines = [e for h in hits for e in lines_of(h)]
    if not lines:
        return asking.refuse(f"the section {title!r} of {note} is empty, or it has none")
    return asking.answer(f"{title} of {note}, {counted(len(lines), 'line')}.", lines)


def notes(asking: Asking) -> Answer:
    """Which notes there are."""
    names = asking.log.notes()
    return asking.answer(f"{len(names)} notes: {', '.join(names)}.", ())


def tally(asking: Asking) -> Answer:
    """How many notes, events, citations and sources there are."""
    rows = asking.log.store.rows
    marked, distinct = rows("SELECT count(*), count(DISTINCT key) FROM cites WHERE marked")[0]
    keys = [k for (k,) in rows("SELECT DISTINCT key FROM cites WHERE marked")]
    sources = asking.sources
    known = sum(k in sources for k in keys)
    (count,) = rows("SELECT count(*) FROM events")[0]
    text = (
        f"{len(asking.log.notes())} notes, {count} events, {marked} citations of {distinct} "
        f"distinct keys, {known} of which are in the bibliography of {len(sources)} sources."
    )
    return asking.answer(text, ())


def mentions(asking: Asking) -> Answer:
    """Every line that holds all the words."""
    words = " ".join(asking.asked.topic)
    hits = asking.log.query(asking.query(actions=(), status=None, cites=None))
    if not hits:
        every = asking.log.query(asking.query(actions=(), status=None, cites=None, note=None,
                                              since=None, until=None))  # fmt: skip
        if every:
            return refusals.nothing(asking)
        return asking.refuse(f"no line of the {len(asking.log.notes())} notes mentions {words!r}")
    hits.sort(key=lambda h: (h.note, h.line))
    names = list(dict.fromkeys(h.note for h in hits))
    where = f"{counted(len(names), 'note')} ({', '.join(names)})"
    text = f"{words!r} is in {counted(len(hits), 'block')} of {where}."
    return asking.answer(text, map(line_of, hits))


def run(asking: Asking) -> Answer:
    """What the newest run reached, from the note that it wrote."""
    question = asking.asked.question
    match = re.search(
        r"\b(?:last|latest|newest|most recent) ([\w.-]+) run\b|\brun of ([\w.-]*\w)", question, re.I
    )
    name = (match[1] or match[2]).lower() if match else ""
    started = asking.log.query(actions="start")
    runs = [h for h in started if not name or name == (h.arguments or "").lower()]
    runs = runs or [h for h in started if name in f"{h.arguments} {h.note}".lower()]
    if not runs:
        there = ", ".join(dict.fromkeys(h.arguments or "" for h in started))
        which = f"no run of {name!r} is recorded" if name else "no run is recorded"
        return asking.refuse(
            f"{which}; " + (f"there are runs of: {there}" if there else "there is none of anything")
        )
    begun = max(runs, key=lambda h: (h.when, h.note, h.line))
    ends = asking.log.query(actions=("return", "interrupt"), note=begun.note, section=begun.section)
    ends = [h for h in ends if h.line > begun.line]
    if not ends:
        where = f"{place(begun)}, {dated(begun)}"
        reason = f"the run of {begun.arguments} was started ({where}), and has not ended"
        return asking.refuse(reason, [line_of(begun)])
    end = ends[-1]
    if end.action == "interrupt":
        where = f"{place(end)}, {dated(end)}"
        reason = f"the run of {begun.arguments} broke off ({where}): {end.quote.strip(' -')}"
        return asking.refuse(reason, lines_of(end))
    reached = [
        e
        for title in ("Learned", "Done")
        for h in asking.log.section(end.note, title)
        for e in lines_of(h)
    ]
    text = f"{end.result or 'It ended'} ({place(end)}, {dated(end)})."
    return asking.answer(text, [line_of(end), *reached])
