"""Why there is no answer: the true reason, found by asking for less."""

from __future__ import annotations

from modgraft.trajectory.answer import Answer
from modgraft.trajectory.asking import Asking, dated, line_of, named, place, places, things


def nothing(asking: Asking) -> Answer:
    """Refuse a question about events or lines: which of its parts leaves nothing over?

    The parts are taken off one by one, the time first, then the words, the note, the source and
    the status; the last that was taken off before something was found is the reason.
    """
    log, asked = asking.log, asking.asked
    what = things(asked.actions, 0, asked.status)
    if asked.unknown_key:
        return unknown_source(asking)
    less: dict[str, object] = {}
    spoken: list[str] = []
    for part, said in (
        ("time", f" {asked.moment.words.strip()}" if asked.moment else ""),
        ("text", f" that mentions {' '.join(asked.topic)!r}" if asked.topic else ""),
        ("note", f" in {asked.note}" if asked.note else ""),
        ("cites", f" about @{asked.key}" if asked.key else ""),
        ("status", " of that status" if asked.status else ""),
    ):
        if not said:
            continue
        less |= {"since": None, "until": None} if part == "time" else {part: None}
        spoken.append("" if part == "status" else said)
        hits = log.query(asking.query(**less))
        if hits:
            left = things(asked.actions, len(hits), None if "status" in less else asked.status)
            reason = f"{what}{''.join(reversed(spoken))}"
            if part == "time":
                first, last = min(hits, key=lambda h: h.when), max(hits, key=lambda h: h.when)
                times = dict.fromkeys((dated(first), dated(last)))
                there = f"the log has {left}, {' to '.join(times)}"
                return asking.refuse(f"{reason}; {there}", [line_of(first), line_of(last)])
            there = f"the log has {left} without that, such as {places(hits)}"
            return asking.refuse(f"{reason}; {there}", [line_of(h) for h in hits[:3]])
    total = len(log.notes())
    asked_for = what if asked.actions else "nothing of that"
    return asking.refuse(f"{asked_for} is recorded in any of the {total} notes")


def unknown_source(asking: Asking) -> Answer:
    """Refuse a key that is in no bibliography and no note."""
    key = asking.asked.unknown_key or ""
    close = asking.log.bibliography.nearest(key)
    cited = [k for (k,) in asking.log.store.rows("SELECT DISTINCT key FROM cites")]
    near = ", ".join(f"@{k}" for k in dict.fromkeys([*close, *_like(key, cited)]))
    hint = f"; did you mean {near}?" if near else ""
    return asking.refuse(f"@{key} is neither in the bibliography nor cited in any note{hint}")


def never_cited(asking: Asking, key: str) -> Answer:
    """Refuse a source that is in the bibliography alone."""
    entry = asking.sources.get(key)
    if entry is None:
        return asking.refuse(f"@{key} is neither in the bibliography nor cited in any note")
    where = f"{entry.file.rpartition('/')[2]}:{entry.line}"
    return asking.refuse(
        f"{named(key, asking.sources)} is in the bibliography ({where}), but no note cites it"
    )


def no_comment(asking: Asking, key: str) -> Answer:
    """Refuse what was skimmed, read or cited without a word about it."""
    hits = asking.log.query(cites=key, actions=("skim", "read"))
    seen = [h for h in hits if key in (h.arguments or "")]
    if not seen:
        lines = asking.log.backlinks(key)
        where = places(lines)
        return asking.refuse(
            f"@{key} is cited at {where}, nothing is said about it", map(line_of, lines)
        )
    did = ", ".join(
        f"{'read' if h.action == 'read' else 'skimmed'} at line {h.line} of {h.note}" for h in seen
    )
    lines = [h for h in asking.log.backlinks(key) if not any(_at(h, s) for s in seen)]
    other = f"; it is also cited at {places(lines)}" if lines else ""
    return asking.refuse(f"@{key} was {did}, no comment recorded{other}", map(line_of, seen))


def _at(one: object, other: object) -> bool:
    return place(one) == place(other)  # type: ignore[arg-type]


def _like(key: str, known: list[str]) -> list[str]:
    from difflib import get_close_matches

    lower = {k.lower(): k for k in known}
    return [lower[k] for k in get_close_matches(key.lower(), lower, 2, cutoff=0.75)]
