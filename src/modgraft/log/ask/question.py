"""Parse a question: its period, note, source, actions and form, and the words that are left."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

from modgraft.log.ask import times_asked
from modgraft.log.ask.lexicon import ACTION_WORDS, content_words

if TYPE_CHECKING:
    from modgraft.log.ask.names import Names

# An underscore is no letter here: "_digging" is digging.
_WORDS = tuple(
    (re.compile(rf"(?<![^\W_])(?:{w})(?![^\W_])", re.IGNORECASE), a, s) for w, a, s in ACTION_WORDS
)
_ABOUT = re.compile(r"\b(?:about|regarding|concerning)\b", re.IGNORECASE)
_COUNTS = re.compile(r"\bhow many\b|\bnumber of\b|\bcount\b", re.IGNORECASE)
_NEWEST = re.compile(r"\b(?:last|latest|newest|most recent(?:ly)?)\b", re.IGNORECASE)
_OLDEST = re.compile(r"\b(?:first|earliest|oldest)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Question:
    """A parsed question.

    ``topic`` are the words that no other part of the question accounts for. ``by_title`` says that
    the source is named by its title or author and not by its key.
    """

    text: str
    topic: tuple[str, ...]
    period: times_asked.Period | None
    note: str | None
    key: str | None
    unknown_key: str | None
    actions: tuple[str, ...]
    status: str | None
    counts: bool
    newest: bool
    oldest: bool
    by_title: bool = False

    @property
    def since(self) -> str | None:
        """The first moment of the period; None without one."""
        return self.period.since if self.period else None

    @property
    def until(self) -> str | None:
        """The last moment of the period; None without one."""
        return self.period.until if self.period else None

    @property
    def scope(self) -> str:
        """The note and the period in words: `` in gpt.md since March 2023``; empty without."""
        note = f" in {self.note}" if self.note else ""
        return f"{note} {self.period.words.strip()}" if self.period else note


def parse_question(text: str, names: Names, today: date, actions: Iterable[str] = ()) -> Question:
    """Parse a question about a log whose notes and sources have these names.

    Args:
        text: In plain English.
        names: The names of the log's notes and sources.
        today: What "last week" is counted from.
        actions: The project's own actions, beside those in the lexicon.
    """
    note, rest = names.find_note(" ".join(text.split()))
    period = times_asked.find_period(rest, today)
    if period is not None:
        rest = rest.replace(period.words, " ")
    key, unknown, rest = names.find_key(rest)
    forms = [pattern.search(rest) is not None for pattern in (_COUNTS, _NEWEST, _OLDEST)]
    found, status, plain = _find_actions(rest, actions)
    by_title = key is None and unknown is None
    if by_title:
        key, plain = names.find_source(plain, text)
    for pattern, given in zip((_COUNTS, _NEWEST, _OLDEST), forms, strict=True):
        plain = pattern.sub(" ", plain) if given else plain
    counts, newest, oldest = forms
    return Question(
        text, tuple(content_words(plain)), period, note, key, unknown, found, status,
        counts, newest, oldest, by_title and key is not None,
    )  # fmt: skip


def _find_actions(text: str, own: Iterable[str]) -> tuple[tuple[str, ...], str | None, str]:
    """Find the actions and the status that a question names; also return the text without them."""
    about = _ABOUT.search(text)
    if about is not None:  # "what did I learn about skimming" asks for lessons
        actions, status, plain = _find_actions(text[: about.start()], own)
        if actions:
            return actions, status, plain + text[about.start() :]
        text = text[: about.start()] + text[about.end() :]
    found: dict[str, None] = {}
    status = ""
    custom = tuple((re.compile(rf"\b{re.escape(n)}s?\b", re.IGNORECASE), n, "") for n in own)
    for pattern, action, said in (*_WORDS, *custom):
        if pattern.search(text):
            found[action] = None
            status = status or said
            text = pattern.sub(" ", text)
    return tuple(found), status or None, text
