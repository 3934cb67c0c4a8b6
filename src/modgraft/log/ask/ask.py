"""Asking the log: take the question apart, find who answers it, verify, and perhaps phrase it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING

from modgraft.core.errors import ModgraftError
from modgraft.log.ask import dates, free, sources, structured
from modgraft.log.ask.answer import Answer
from modgraft.log.ask.evidence import Asking
from modgraft.log.ask.names import names_of
from modgraft.log.ask.question import take_apart
from modgraft.log.ask.routes import route
from modgraft.log.ask.verify import verified

if TYPE_CHECKING:
    from modgraft.log.index.index import Index
    from modgraft.log.index.vectors import Vectors

HANDLERS: dict[str, Callable[[Asking], Answer]] = {
    "run": structured.run,
    "queue": structured.queue,
    "unresolved": sources.unresolved,
    "when": dates.when,
    "cites": sources.cites,
    "quoted": sources.quoted,
    "status": sources.status,
    "entry": sources.entry,
    "said": sources.said,
    "section": structured.section,
    "tally": structured.tally,
    "notes": structured.notes,
    "mentions": structured.mentions,
    "events": structured.events,
    "changed": dates.changed,
    "free": free.free,
}


def ask(index: Index, vectors: Vectors, question: str, today: date) -> Answer:
    """The answer to a question; see `Log.ask`."""
    if not any(c.isalnum() for c in question):
        raise ModgraftError(
            f"{question!r} is no question; ask, for example: what are my open questions?"
        )
    names = names_of(index)
    asked = take_apart(question, names, today, index.settings.actions)
    row = route(asked)
    asking = Asking(index, vectors, asked, row.kind)
    if asked.titled and asked.key not in names.cited and row.name != "free":
        # The bibliography alone has it as a title: the notes may speak of it without citing it.
        answer = free.free(Asking(index, vectors, replace(asked, key=None), "free"))
        answer = HANDLERS[row.name](asking) if answer.refused else answer
    else:
        answer = HANDLERS[row.name](asking)
    answer = verified(index, answer)
    if index.settings.endpoint and answer.refused is None and answer.evidence:
        from modgraft.log.ask.phrase import phrased

        answer = verified(index, phrased(answer, index.settings.endpoint, index.settings.model))
    return answer
