"""Parse a question: its period, note, source, actions and form, and the words that are left."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

from modgraft.core.errors import ModgraftError
from modgraft.log.ask.lexicon import ACTION_WORDS, content_words
from modgraft.log.index.times import month_end, span

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
class Period:
    """A period of time, open where a bound is None, and the words of the question that name it."""

    since: str | None
    until: str | None
    words: str


@dataclass(frozen=True, slots=True)
class Question:
    """A parsed question.

    ``topic`` are the words that no other part of the question accounts for. ``since`` and ``until``
    are the bounds of its period, ``period`` the words that name it, or empty. ``by_title`` says
    that the source is named by its title or author and not by its key.
    """

    text: str
    topic: tuple[str, ...]
    since: str | None
    until: str | None
    period: str
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
    def scope(self) -> str:
        """The note and the period in words: `` in gpt.md since March 2023``; empty without."""
        note = f" in {self.note}" if self.note else ""
        return f"{note} {self.period.strip()}" if self.period else note


def parse_question(text: str, names: Names, today: date, actions: Iterable[str] = ()) -> Question:
    """Parse a question about a log whose notes and sources have these names.

    Args:
        text: In plain English.
        names: The names of the log's notes and sources.
        today: What "last week" is counted from.
        actions: The project's own actions, beside those in the lexicon.
    """
    note, rest = names.find_note(" ".join(text.split()))
    period = find_period(rest, today) or Period(None, None, "")
    if period.words:
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
        text, tuple(content_words(plain)), period.since, period.until, period.words, note, key,
        unknown, found, status, counts, newest, oldest, by_title and key is not None,
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


# -- periods: "since March 2023", "last week", "between 2023w9 and 2023w10" ----------------------

_MONTHS = "january february march april may june july august september october november december"
MONTHS = {name: i for i, name in enumerate(_MONTHS.split(), 1)}
MONTHS |= {name[:3]: i for name, i in list(MONTHS.items())}
_MONTH = "|".join(sorted(MONTHS, key=len, reverse=True))
_YEAR = r"(?:19|20)\d{2}"

DATE = (
    rf"(?:{_YEAR}-\d{{1,2}}-\d{{1,2}}(?:[T ]\d{{2}}:\d{{2}}(?::\d{{2}})?)?|{_YEAR}-\d{{2}}|"
    rf"{_YEAR}-?w\d{{1,2}}|week \d{{1,2}} of {_YEAR}|"
    rf"(?:{_MONTH})\.? \d{{1,2}}(?:st|nd|rd|th)?,? {_YEAR}|"
    rf"\d{{1,2}}(?:st|nd|rd|th)? (?:of )?(?:{_MONTH})\.?,? {_YEAR}|(?:{_MONTH})\.? {_YEAR}|"
    rf"{_YEAR}|today|yesterday|(?:{_MONTH}))\b"
)

#: pattern of a time → its meaning; the pattern's dates are the groups a and b
FORMS: tuple[tuple[str, str], ...] = (
    (rf"\b(?:between|from) (?P<a>{DATE}) (?:and|to|until|till) (?P<b>{DATE})", "between"),
    (rf"\b(?:since|starting(?: from)?|from) (?P<a>{DATE})", "since"),
    (rf"\b(?:after|later than) (?P<a>{DATE})", "after"),
    (rf"\b(?:before|earlier than|prior to) (?P<a>{DATE})", "before"),
    (rf"\b(?:until|till|up to|by) (?P<a>{DATE})", "until"),
    (rf"\b(?:in|on|during|of|at|for) (?P<a>{DATE})", "within"),
    (
        r"\b(?:in |during |over )?the (?:last|past) (?P<n>\d+) (?P<unit>day|week|month|year)s?",
        "ago",
    ),
    (r"\b(?P<n>\d+) (?P<unit>day|week|month|year)s? ago\b", "back"),
    (r"\b(?P<which>this|last|past) (?P<unit>week|month|year)\b", "unit"),
    (r"\b(?P<a>today|yesterday)\b", "within"),
)
_COMPILED = tuple((re.compile(pattern, re.IGNORECASE), meaning) for pattern, meaning in FORMS)


def find_period(question: str, today: date) -> Period | None:
    """Find the first period that a question names."""
    for pattern, meaning in _COMPILED:
        match = pattern.search(question)
        if match is None:
            continue
        try:
            since, until = _bounds(match.groupdict(), meaning, today)
        except (ModgraftError, ValueError, OverflowError):  # a number that is no date: 2023-99
            continue
        return Period(since, until, match[0])
    return None


def _bounds(
    said: dict[str, str | None], meaning: str, today: date
) -> tuple[str | None, str | None]:
    if said.get("unit"):
        first, last = _units(said, meaning, today)
        return first.isoformat(), span(last)[1]
    start, end = parse_date(said["a"] or "", today)
    if meaning == "between":
        return start, parse_date(said["b"] or "", today)[1]
    if meaning == "since":
        return start, None
    if meaning == "after":
        return (date.fromisoformat(end[:10]) + timedelta(days=1)).isoformat(), None
    if meaning == "before":
        return None, span(date.fromisoformat(start[:10]) - timedelta(days=1))[1]
    return (None, end) if meaning == "until" else (start, end)


def _units(said: dict[str, str | None], meaning: str, today: date) -> tuple[date, date]:
    unit, which = said["unit"] or "", (said.get("which") or "").lower()
    if meaning == "ago":
        days = {"day": 1, "week": 7, "month": 30, "year": 365}[unit.lower()]
        return today - timedelta(days=days * int(said["n"] or 1)), today
    back = int(said["n"] or 1) if meaning == "back" else int(which != "this")
    if unit.lower() == "day":
        day = today - timedelta(days=back)
        return day, day
    if unit.lower() == "week":
        monday = today - timedelta(days=today.weekday() + 7 * back)
        return monday, monday + timedelta(days=6)
    if unit.lower() == "month":
        first = today.replace(day=1)
        for _ in range(back):
            first = (first - timedelta(days=1)).replace(day=1)
        return first, month_end(first)
    return date(today.year - back, 1, 1), date(today.year - back, 12, 31)


def parse_date(text: str, today: date) -> tuple[str, str]:
    """Return the first and last moment of a date in words or digits.

    Raises:
        ModgraftError: if the text is no date.
        ValueError: if there is no such day.
    """
    said = text.lower().strip()
    if said in ("today", "yesterday"):
        return span(today - timedelta(days=int(said == "yesterday")))
    if match := re.fullmatch(rf"week (\d+) of ({_YEAR})", said):
        return span(f"{match[2]}w{match[1]}")
    month = re.search(rf"\b({_MONTH})\b", said)
    if month is None:
        return span(text)
    numbers = re.findall(r"\d+", said)
    number = MONTHS[month[1]]  # without a year: the last such month
    this = today.year - int(number > today.month)
    year = int(next((n for n in numbers if len(n) == 4), this))
    days = [int(n) for n in numbers if len(n) < 4]
    if days:
        return span(date(year, number, days[0]))
    first = date(year, number, 1)
    return first.isoformat(), span(month_end(first))[1]
