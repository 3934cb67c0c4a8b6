"""Why there is no answer: the true reason, found by asking for less."""

from __future__ import annotations

from modgraft.log.ask.answer import Answer
from modgraft.log.ask.evidence import Asking, counted, dated, line_of, named, place, places, things


def nothing(asking: Asking) -> Answer:
    """Refuse a question about events or lines: which of its conditions leaves nothing over?

    They are taken off one by one, the time first, until something is found.
    """
    log, asked = asking.log, asking.asked
    if asked.unknown_key:
        return unknown_source(asking)
    conditions = {
        "time": f" {asked.moment.words.strip()}" if asked.moment else "",
        "text": f" mentioning {' '.join(asked.topic)!r}" if asked.topic else "",
        "note": f" in {asked.note}" if asked.note else "",
        "cites": f" about @{asked.key}" if asked.key else "",
        "status": " of that status" if asked.status else "",
    }
    kept = {name: said for name, said in conditions.items() if said}
    what = _what(asking, 0, asked.status)
    reason = what + "".join(kept[n] for n in ("text", "note", "cites", "time") if n in kept)
    less: dict[str, object] = {}
    for part in list(kept):
        del kept[part]
        less |= {"since": None, "until": None} if part == "time" else {part: None}
        hits = log.query(asking.query(**less))
        if hits:
            left = _what(asking, len(hits), asked.status if "status" in kept else None)
            left += "".join(kept.get(n, "") for n in ("text", "note", "cites"))
            if part != "time":
                there = f"the log has {left} without that, such as {places(hits)}"
                return asking.refuse(f"{reason}; {there}", [line_of(h) for h in hits[:3]])
            first, last = min(hits, key=lambda h: h.when), max(hits, key=lambda h: h.when)
            times = dict.fromkeys((dated(first), dated(last)))
            there = f"the log has {left}, {' to '.join(times)}"
            return asking.refuse(f"{reason}; {there}", [line_of(first), line_of(last)])
    total = len(log.notes())
    asked_for = what if asked.actions else "nothing of that"
    return asking.refuse(f"{asked_for} is recorded in any of the {total} notes")


def _what(asking: Asking, count: int, status: str | None) -> str:
    """Events of the actions that were asked for; lines where only words were."""
    if not asking.asked.actions and asking.asked.topic:
        return counted(count, "line") if count else "no line"
    return things(asking.asked.actions, count, status)


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
    seen = [h for h in hits if h.is_about(key)]
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
