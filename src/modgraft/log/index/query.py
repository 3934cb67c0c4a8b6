"""The query for events and blocks, and its results."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, slots=True)
class Query:
    """Conditions on events and blocks; all that are given must hold.

    Args:
        actions: Events with one of these actions (``"skim"``, ``("question", "eureka")``), in any
            spelling. Without it and without ``text``: every event.
        text: Words that must all be there; ``"gated fusion"`` in quotes is a phrase. With
            ``actions`` they are looked for in whole events, else in every block of the notes.
        cites: A citation key, with or without ``@``.
        note: A note's path in the log, its name, or a pattern: ``2023w9``, ``runs/*``.
        section: The section that it stands in: ``Log``, ``Learned``.
        since: From then on: ``2023``, ``2023-03``, ``2023w9``, ``2023-03-02``.
        until: Up to the end of it.
        status: Of a source ``skimmed``, ``digging``, ``full_read``, ``read``; of a question
            ``open``, ``answered``.
        limit: At most so many; None: all.
        offset: Leave out so many first.
        newest: The newest first. Otherwise the oldest, or with ``text`` what fits best.
    """

    actions: tuple[str, ...] | str = ()
    text: str | None = None
    cites: str | None = None
    note: str | None = None
    section: str | None = None
    since: str | date | None = None
    until: str | date | None = None
    status: str | None = None
    limit: int | None = None
    offset: int = 0
    newest: bool = False


@dataclass(frozen=True, slots=True)
class Hit:
    """An event or a block that a query found, with its place and its text.

    ``line`` to ``end_line`` are 1-based; ``text`` is those lines, read again from the file.
    A block that is no event has the ``action``, ``arguments``, ``result`` and ``status`` of the
    event that it hangs under, or empty ones; ``event_line`` is the line of that event. ``when`` is
    ISO text, ``when_from`` its source: ``git``, ``note``, ``name`` or ``file``. ``keys`` are the
    citations, of which the first ``about`` are arguments of the event. A larger ``score`` is
    better; it is 0 where nothing was ranked.
    """

    note: str
    line: int
    end_line: int
    action: str
    arguments: str | None
    result: str | None
    status: str
    text: str
    when: str
    when_from: str
    keys: tuple[str, ...] = ()
    about: int = 0
    score: float = 0.0
    section: str = ""
    event_line: int | None = None

    @property
    def place(self) -> str:
        """The file and the line: ``2023w9.md:68``."""
        return f"{self.note}:{self.line}"

    @property
    def is_event(self) -> bool:
        """Whether its first line is an event."""
        return self.event_line == self.line

    def is_about(self, key: str) -> bool:
        """Return whether the source ``key`` is an argument of the event, whatever its case."""
        return key.casefold() in map(str.casefold, self.keys[: self.about])

    @property
    def quote(self) -> str:
        """The first line, as it stands in the file."""
        return self.text.split("\n", 1)[0].rstrip("\r")

    @property
    def body(self) -> str:
        """The lines after the first."""
        return self.text.split("\n", 1)[1] if "\n" in self.text else ""


@dataclass(frozen=True, slots=True)
class Owed:
    """A source in the reading queue: how far it was read, and what is still to be done."""

    key: str
    status: str
    owed: str
    title: str
    note: str
    line: int
    when: str
