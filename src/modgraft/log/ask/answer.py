"""An answer with the lines that support it, and what all handlers need to build one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from modgraft.core.errors import ModgraftError, listed
from modgraft.log.index.query import Hit, Query
from modgraft.log.index.times import readable

if TYPE_CHECKING:
    from modgraft.log.ask.question import Question
    from modgraft.log.index.bibliography import Entry
    from modgraft.log.index.index import Index
    from modgraft.log.index.vectors import Vectors

Kind = Literal["structured", "backlink", "temporal", "free"]

NOUNS = {
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
"""Action → what one such event is called, and several; any other is "an … event"."""

_STATUS = {"full_read": "marked for full reading", "digging": "marked for digging"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """A line of a note that supports an answer; ``quote`` is the line exactly as it stands."""

    note: str
    line: int
    quote: str
    when: str


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its evidence, or a refusal with its reason.

    ``text`` says it in words; every line of ``evidence`` was verified. ``refused`` is None, or the
    reason why nothing is answered; then ``text`` is that reason too. ``remarks`` say how it was
    found: that vectors are off, which server phrased it, why a phrasing was rejected.
    """

    question: str
    kind: Kind
    text: str
    evidence: tuple[Evidence, ...] = ()
    refused: str | None = None
    remarks: tuple[str, ...] = ()


@dataclass
class Lookup:
    """A question on its way to an answer: the parsed question and the index to look it up in."""

    index: Index
    vectors: Vectors
    question: Question
    kind: Kind
    remarks: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The citation key of the source that the question names; empty without one."""
        return self.question.key or ""

    @property
    def sources(self) -> dict[str, Entry]:
        """The entries of the bibliography, by citation key."""
        return dict(self.index.bibliography.entries)

    def query(self, **changes: object) -> Query:
        """Build the query that the question's parts amount to, with ``changes`` to its fields."""
        question = self.question
        query = Query(
            actions=question.actions,
            text=" ".join(question.topic) or None,
            cites=question.key,
            note=question.note,
            since=question.since,
            until=question.until,
            status=question.status,
        )
        return replace(query, **changes)  # type: ignore[arg-type]

    def about(self, key: str, *actions: str) -> list[Hit]:
        """Find the events that have a source as an argument, of all actions or of some."""
        return [h for h in self.index.query(cites=key, actions=actions) if h.is_about(key)]

    def answer(self, text: str, evidence: Iterable[Evidence]) -> Answer:
        """Answer with ``text`` and the lines that support it."""
        lines = tuple(dict.fromkeys(evidence))
        return Answer(self.question.text, self.kind, text, lines, None, tuple(self.remarks))

    def refuse(self, reason: str, evidence: Iterable[Evidence] = ()) -> Answer:
        """Refuse to answer, with the reason and lines that show what the log has instead."""
        return replace(self.answer(reason, evidence), refused=reason)


def verify(index: Index, answer: Answer) -> Answer:
    """Keep only the evidence that still stands in its files; refuse where no line is left."""
    files: dict[str, list[bytes]] = {}
    for note in {e.note for e in answer.evidence}:
        files[note] = []
        with suppress(OSError, ModgraftError):  # a deleted file has none of its lines
            bibliography = note.lower().endswith(".bib")
            path = index.settings.root / note if bibliography else index.path(note)
            files[note] = path.read_bytes().splitlines()
    kept = tuple(e for e in answer.evidence if _stands(e, files[e.note]))
    if len(kept) == len(answer.evidence):
        return answer
    if kept:
        lost = f"{len(answer.evidence) - len(kept)} lines changed while they were read"
        return replace(answer, evidence=kept, remarks=(*answer.remarks, lost))
    reason = "the notes changed while they were read, and no line of the answer stands; ask again"
    return replace(answer, text=reason, evidence=(), refused=reason)


def _stands(evidence: Evidence, lines: list[bytes]) -> bool:
    there = lines[evidence.line - 1 : evidence.line]  # none, if the file is shorter now
    return [line.decode("utf-8", "replace") for line in there] == [evidence.quote]


# -- hits as evidence and in words -------------------------------------------------------------


def first_line(hit: Hit) -> Evidence:
    """Return the first line of a hit as evidence."""
    return Evidence(hit.note, hit.line, hit.quote, hit.when)


def all_lines(hit: Hit) -> list[Evidence]:
    """Return every line of a hit as evidence, without the blank ones."""
    return [
        Evidence(hit.note, number, line.rstrip("\r"), hit.when)
        for number, line in enumerate(hit.text.split("\n"), hit.line)
        if line.strip()
    ]


def places(hits: Sequence[Hit]) -> str:
    """List the first three files and lines, and count the rest."""
    return listed([hit.place for hit in hits], 3)


def date_of(hit: Hit) -> str:
    """Return when a hit was written and, unless a commit says so, how that is known."""
    known = {"git": "", "note": " (the note's date)", "name": " (from the note's name)"}
    return readable(hit.when) + known.get(hit.when_from, " (the file's time; it is in no commit)")


def count_events(actions: Sequence[str], count: int, status: str | None = None) -> str:
    """Count events in words: ``7 skims marked for full reading``, ``1 open question``."""
    names = [NOUNS.get(a, (f"{a} event", f"{a} events"))[count > 1] for a in actions]
    what = " or ".join(names) or ("events" if count > 1 else "event")
    number = "no" if count == 0 else str(count)
    if status in ("open", "answered"):
        return f"{number} {status} {what}"
    return f"{number} {what} {_STATUS[status]}" if status in _STATUS else f"{number} {what}"


def count_noun(count: int, noun: str) -> str:
    """Count in words: ``1 line``, ``2 lines``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def source_name(key: str, sources: dict[str, Entry]) -> str:
    """Return a citation key, with its title where the bibliography has it."""
    entry = sources.get(key)
    return f"@{key} ({entry.title}, {entry.short})" if entry else f"@{key}"
