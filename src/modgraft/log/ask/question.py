"""What a question asks for: its time, note, source, actions, form, and the words that are left."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from modgraft.log.ask import times_asked
from modgraft.log.ask.lexicon import WORDS, content_words

if TYPE_CHECKING:
    from modgraft.log.ask.names import Names

# An underscore is no letter here: "_digging" is digging.
_WORDS = tuple(
    (re.compile(rf"(?<![^\W_])(?:{w})(?![^\W_])", re.IGNORECASE), a, s) for w, a, s in WORDS
)
_ABOUT = re.compile(r"\b(?:about|regarding|concerning)\b", re.IGNORECASE)
_COUNTS = re.compile(r"\bhow many\b|\bnumber of\b|\bcount\b", re.IGNORECASE)
_NEWEST = re.compile(r"\b(?:last|latest|newest|most recent(?:ly)?)\b", re.IGNORECASE)
_OLDEST = re.compile(r"\b(?:first|earliest|oldest)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, taken apart. ``topic`` are the words that nothing else explains.

    ``titled`` says that the source was named by its title or author, and not by its key.
    """

    question: str
    topic: tuple[str, ...]
    moment: times_asked.Moment | None
    note: str | None
    key: str | None
    unknown_key: str | None
    actions: tuple[str, ...]
    status: str | None
    counts: bool
    newest: bool
    oldest: bool
    titled: bool = False

    @property
    def since(self) -> str | None:
        """From when on."""
        return self.moment.since if self.moment else None

    @property
    def until(self) -> str | None:
        """Until when."""
        return self.moment.until if self.moment else None


def take_apart(question: str, names: Names, today: date, actions: Iterable[str] = ()) -> Asked:
    """What ``question`` asks for, of a log with these names of notes and sources.

    Args:
        question: In plain English.
        names: The names of the log's notes and sources.
        today: What "last week" is counted from.
        actions: The project's own, beyond the words of the lexicon.
    """
    note, rest = names.note(" ".join(question.split()))
    moment = times_asked.find(rest, today)
    if moment is not None:
        rest = rest.replace(moment.words, " ")
    key, unknown, rest = names.key(rest)
    forms = [pattern.search(rest) is not None for pattern in (_COUNTS, _NEWEST, _OLDEST)]
    found, status, plain = _actions(rest, actions)
    titled = key is None and unknown is None
    if titled:
        key, plain = names.source(plain, question)
    for pattern, said in zip((_COUNTS, _NEWEST, _OLDEST), forms, strict=True):
        plain = pattern.sub(" ", plain) if said else plain
    counts, newest, oldest = forms
    return Asked(
        question, tuple(content_words(plain)), moment, note, key, unknown, found, status,
        counts, newest, oldest, titled and key is not None,
    )  # fmt: skip


def _actions(question: str, own: Iterable[str]) -> tuple[tuple[str, ...], str | None, str]:
    """The actions that are named, a status, and the question without their words."""
    about = _ABOUT.search(question)
    if about is not None:  # "what did I learn about skimming" asks for lessons
        found_before, said, plain = _actions(question[: about.start()], own)
        if found_before:
            return found_before, said, plain + question[about.start() :]
        question = question[: about.start()] + question[about.end() :]
    found: dict[str, None] = {}
    status = ""
    custom = tuple((re.compile(rf"\b{re.escape(n)}s?\b", re.IGNORECASE), n, "") for n in own)
    for pattern, action, said in (*_WORDS, *custom):
        if pattern.search(question):
            found[action] = None
            status = status or said
            question = pattern.sub(" ", question)
    return tuple(found), status or None, question
