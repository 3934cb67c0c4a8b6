"""Times as the index keeps them: ISO text in the writer's local time, compared as text.

A time is as precise as its source: ``2023-03-02T10:15:00`` from a commit,
``2023-03-02`` from a line, ``2023-02-27`` from a note called ``2023w9`` (that week's Monday).
"""

from __future__ import annotations

import re
from datetime import date, datetime, timedelta

from modgraft.core.errors import ModgraftError

_WEEK = r"(?P<year>\d{4})-?[wW](?P<week>\d{1,2})"
_DAY = r"(?P<y>\d{4})-(?P<m>\d{1,2})-(?P<d>\d{1,2})"
_NAME = re.compile(rf"(?<!\d)(?:{_WEEK}|{_DAY}|(?P<my>\d{{4}})-(?P<mm>\d{{2}}))(?!\d)")
_LEADING = re.compile(
    r"\s*(?:>\s*)*(?:#{1,6}|[-*+]|\d+[.)])?\s*(?:\[[^\n]{0,500}?\]:?\s*)?(?:date:\s*)?[*_`(\[]*"
    r"(\d{4}-\d{2}-\d{2})(?:[T ](\d{2}:\d{2}(?::\d{2})?))?(?!\d)",
    re.IGNORECASE,
)


def span(text: str | date) -> tuple[str, str]:
    """Return the first and last moment of a year, month (``2023-03``), week (``2023w9``) or day.

    Raises:
        ModgraftError: if it is none of these, or there is no such day.
    """
    if isinstance(text, datetime):
        moment = text.replace(tzinfo=None).isoformat(timespec="seconds")
        return moment, moment
    if isinstance(text, date):
        return _days(text, text)
    try:
        return _span(text.strip())
    except ValueError as error:
        raise ModgraftError(
            f"{text!r} is no time: {error}; write 2023, 2023-03, 2023w9, 2023-03-02 or "
            "2023-03-02T10:15"
        ) from error


def _span(text: str) -> tuple[str, str]:
    if re.fullmatch(r"\d{4}", text):
        return _days(date(int(text), 1, 1), date(int(text), 12, 31))
    if match := re.fullmatch(r"(\d{4})-(\d{1,2})", text):
        first = date(int(match[1]), int(match[2]), 1)
        return _days(first, month_end(first))
    if match := re.fullmatch(_WEEK, text):
        monday = date.fromisocalendar(int(match["year"]), int(match["week"]), 1)
        return _days(monday, monday + timedelta(days=6))
    if match := re.fullmatch(_DAY, text):
        day = date(int(match["y"]), int(match["m"]), int(match["d"]))
        return _days(day, day)
    moment = datetime.fromisoformat(text).replace(tzinfo=None).isoformat(timespec="seconds")
    return moment, moment


def month_end(day: date) -> date:
    """Return the last day of a day's month."""
    return (day.replace(day=28) + timedelta(days=4)).replace(day=1) - timedelta(days=1)


def _days(first: date, last: date) -> tuple[str, str]:
    return first.isoformat(), f"{last.isoformat()}T23:59:59"


def date_in_name(name: str) -> str | None:
    """Read the date in a note's name: ``2023w9`` → ``2023-02-27``; None without one."""
    for match in _NAME.finditer(name):
        text = f"{match['my']}-{match['mm']}" if match["my"] else match[0]
        try:
            return _span(text)[0]
        except ValueError:  # 2023-99 is a number, no month
            continue
    return None


def leading_date(line: str) -> str | None:
    """Read the date at the start of a line, after its bullet and event; None without one."""
    match = _LEADING.match(line.lstrip())  # its own \s* would be tried at every depth of indent
    if match is None:
        return None
    try:
        day = date.fromisoformat(match[1]).isoformat()
        return f"{day}T{match[2]}" if match[2] else day
    except ValueError:
        return None


def file_time(mtime: float) -> str:
    """Format a file's modification time, to the second."""
    return datetime.fromtimestamp(mtime).isoformat(timespec="seconds")


def readable(when: str) -> str:
    """Format a time for reading: the day, and the minute where it is known."""
    return when[:16].replace("T", " ")
