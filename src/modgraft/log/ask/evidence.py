"""What all answers share: the log, the question taken apart, and how evidence is made of hits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from modgraft.log.ask.answer import Answer, Evidence, Kind
from modgraft.log.index.query import Hit, Query
from modgraft.log.index.times import shown

if TYPE_CHECKING:
    from modgraft.log.ask.question import Asked
    from modgraft.log.index.bibliography import Entry
    from modgraft.log.index.index import Index
    from modgraft.log.index.vectors import Vectors

SPOKEN = {
    "skim": ("skim", "skims"),
    "read": ("reading", "readings"),
    "question": ("question", "questions"),
    "lesson_learned": ("lesson", "lessons"),
    "hypothesize": ("hypothesis", "hypotheses"),
    "soliloquy": ("soliloquy", "soliloquies"),
    "critique": ("critique", "critiques"),
    "eureka": ("eureka", "eurekas"),
    "interrupt": ("interruption", "interruptions"),
    "calculate": ("calculation", "calculations"),
    "code": ("piece of code", "pieces of code"),
    "blog": ("blog post", "blog posts"),
}
_STATUS = {"full_read": "marked for full reading", "digging": "marked for digging"}


@dataclass
class Asking:
    """A question on its way to an answer."""

    log: Index
    vectors: Vectors
    asked: Asked
    kind: Kind
    remarks: list[str] = field(default_factory=list)

    @property
    def sources(self) -> dict[str, Entry]:
        """The bibliography's entries."""
        return dict(self.log.bibliography.entries)

    def query(self, **changes: object) -> Query:
        """The query that the question's parts make, changed where that is asked for."""
        asked = self.asked
        made = Query(
            actions=asked.actions,
            text=" ".join(asked.topic) or None,
            cites=asked.key,
            note=asked.note,
            since=asked.since,
            until=asked.until,
            status=asked.status,
        )
        return replace(made, **changes)  # type: ignore[arg-type]

    def answer(self, text: str, evidence: Iterable[Evidence]) -> Answer:
        """An answer with its evidence."""
        lines = tuple(dict.fromkeys(evidence))
        return Answer(self.asked.question, self.kind, text, lines, None, tuple(self.remarks))

    def refuse(self, why: str, evidence: Iterable[Evidence] = ()) -> Answer:
        """No answer, and why; the lines show what there is instead."""
        lines = tuple(dict.fromkeys(evidence))
        return Answer(self.asked.question, self.kind, why, lines, why, tuple(self.remarks))


def line_of(hit: Hit) -> Evidence:
    """The first line of a hit."""
    return Evidence(hit.note, hit.line, hit.quote, hit.when)


def lines_of(hit: Hit) -> list[Evidence]:
    """All its lines that are not empty."""
    return [
        Evidence(hit.note, number, line.rstrip("\r"), hit.when)
        for number, line in enumerate(hit.text.split("\n"), hit.line)
        if line.strip()
    ]


def place(hit: Hit) -> str:
    """Where it is: ``2023w9.md:68``."""
    return f"{hit.note}:{hit.line}"


def places(hits: Sequence[Hit], most: int = 3) -> str:
    """The first places of many, in words."""
    named = ", ".join(place(h) for h in hits[:most])
    return f"{named} and {len(hits) - most} more" if len(hits) > most else named


def dated(hit: Hit) -> str:
    """When, and where that was read if it was not from a commit."""
    known = {"git": "", "note": " (the note's date)", "name": " (from the note's name)"}
    return shown(hit.when) + known.get(hit.when_from, " (the file's time; it is in no commit)")


def things(actions: Sequence[str], count: int, status: str | None = None) -> str:
    """``7 skims marked for full reading``, ``1 open question``."""
    names = [SPOKEN.get(a, (f"{a} event", f"{a} events"))[count > 1] for a in actions]
    what = " or ".join(names) or ("events" if count > 1 else "event")
    number = "no" if count == 0 else str(count)
    if status in ("open", "answered"):
        return f"{number} {status} {what}"
    return f"{number} {what} {_STATUS[status]}" if status in _STATUS else f"{number} {what}"


def counted(count: int, what: str) -> str:
    """``1 line``, ``2 lines``."""
    return f"{count} {what}{'s' * (count != 1)}"


def named(key: str, sources: dict[str, Entry]) -> str:
    """A key with its title where it has one."""
    entry = sources.get(key)
    return f"@{key} ({entry.title}, {entry.short})" if entry else f"@{key}"
