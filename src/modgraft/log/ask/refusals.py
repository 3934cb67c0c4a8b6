"""Refuse to answer, with the true reason: the condition that leaves nothing to show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modgraft.log.ask.answer import (
    Answer,
    Lookup,
    count_events,
    count_noun,
    date_of,
    first_line,
    places,
    source_name,
)
from modgraft.log.index.bibliography import similar

if TYPE_CHECKING:
    from modgraft.log.ask.question import Question


def no_match(lookup: Lookup) -> Answer:
    """Refuse a question about events or lines, naming the condition that excludes everything.

    The conditions are dropped one by one, the time first, until something is found.
    """
    index, question = lookup.index, lookup.question
    if question.unknown_key:
        return unknown_source(lookup)
    kept = _conditions(question)
    what = _what(lookup, 0, question.status)
    reason = what + "".join(kept[n] for n in ("text", "note", "cites", "time") if n in kept)
    less: dict[str, object] = {}
    for part in list(kept):
        del kept[part]
        less |= {"since": None, "until": None} if part == "time" else {part: None}
        hits = index.query(lookup.query(**less))
        if hits:
            left = _what(lookup, len(hits), question.status if "status" in kept else None)
            left += "".join(kept.get(n, "") for n in ("text", "note", "cites"))
            if part != "time":
                there = f"the log has {left} without that, such as {places(hits)}"
                return lookup.refuse(f"{reason}; {there}", [first_line(h) for h in hits[:3]])
            first, last = min(hits, key=lambda h: h.when), max(hits, key=lambda h: h.when)
            times = dict.fromkeys((date_of(first), date_of(last)))
            there = f"the log has {left}, {' to '.join(times)}"
            return lookup.refuse(f"{reason}; {there}", [first_line(first), first_line(last)])
    total = len(index.notes())
    asked_for = what if question.actions else "nothing of that"
    return lookup.refuse(f"{asked_for} is recorded in any of the {total} notes")


def _conditions(question: Question) -> dict[str, str]:
    """Return the conditions of a question in words, in the order in which they are dropped."""
    conditions = {
        "time": f" {question.period.strip()}" if question.period else "",
        "text": f" mentioning {' '.join(question.topic)!r}" if question.topic else "",
        "note": f" in {question.note}" if question.note else "",
        "cites": f" about @{question.key}" if question.key else "",
        "status": " of that status" if question.status else "",
    }
    return {name: said for name, said in conditions.items() if said}


def _what(lookup: Lookup, count: int, status: str | None) -> str:
    """Count events of the actions in question; lines where the question has only words."""
    if not lookup.question.actions and lookup.question.topic:
        return count_noun(count, "line") if count else "no line"
    return count_events(lookup.question.actions, count, status)


def unknown_source(lookup: Lookup) -> Answer:
    """Refuse a key that neither the bibliography nor a note has."""
    key = lookup.question.unknown_key or ""
    close = lookup.index.bibliography.nearest(key)
    cited = [k for (k,) in lookup.index.database.rows("SELECT DISTINCT key FROM cites")]
    near = ", ".join(f"@{k}" for k in dict.fromkeys([*close, *similar(key, cited, 2)]))
    hint = f"; did you mean {near}?" if near else ""
    return lookup.refuse(f"@{key} is neither in the bibliography nor cited in any note{hint}")


def never_cited(lookup: Lookup, key: str) -> Answer:
    """Refuse a source that the bibliography has but no note cites."""
    entry = lookup.sources.get(key)
    if entry is None:
        return lookup.refuse(f"@{key} is neither in the bibliography nor cited in any note")
    where = f"{entry.file.rpartition('/')[2]}:{entry.line}"
    return lookup.refuse(
        f"{source_name(key, lookup.sources)} is in the bibliography ({where}), but no note cites it"
    )


def no_comment(lookup: Lookup, key: str) -> Answer:
    """Refuse to comment on a source that was skimmed, read or cited without a remark."""
    seen = lookup.about(key, "skim", "read")
    if not seen:
        lines = lookup.index.backlinks(key)
        where = places(lines)
        return lookup.refuse(
            f"@{key} is cited at {where}, nothing is said about it", map(first_line, lines)
        )
    did = ", ".join(
        f"{'read' if h.action == 'read' else 'skimmed'} at line {h.line} of {h.note}" for h in seen
    )
    known = {h.place for h in seen}
    lines = [h for h in lookup.index.backlinks(key) if h.place not in known]
    other = f"; it is also cited at {places(lines)}" if lines else ""
    return lookup.refuse(f"@{key} was {did}, no comment recorded{other}", map(first_line, seen))
