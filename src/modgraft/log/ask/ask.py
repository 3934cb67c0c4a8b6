"""Ask the log: parse the question, find the handler for it, verify its answer, and phrase it.

`ROUTES` lists the kinds of questions, tried from top to bottom. A row takes a question that matches
one of its patterns and names what the row needs: a source (by key, title, or author and year), a
note, an action, a time. The last row takes every question.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Literal

from modgraft.core.errors import ModgraftError
from modgraft.log.ask import free, refusals, sources, structured
from modgraft.log.ask.answer import Answer, Kind, Lookup, verify
from modgraft.log.ask.names import names_of
from modgraft.log.ask.question import Question, parse_question

if TYPE_CHECKING:
    from modgraft.log.index.index import Index
    from modgraft.log.index.vectors import Vectors

Needs = Literal["", "source", "note", "action", "time", "topic"]


@dataclass(frozen=True, slots=True)
class Route:
    """A kind of question: its handler, the answer's kind, what it needs, an example, patterns."""

    handler: Callable[[Lookup], Answer]
    kind: Kind
    needs: Needs
    example: str
    patterns: tuple[str, ...]

    def takes(self, question: Question) -> bool:
        """Return whether a question names what the row needs and matches one of its patterns."""
        given = {
            "": True,
            "source": question.key is not None or question.unknown_key is not None,
            "note": question.note is not None,
            "action": bool(question.actions),
            "time": bool(question.period),
            "topic": bool(question.topic),
        }
        return given[self.needs] and any(
            re.search(pattern, question.text, re.IGNORECASE) for pattern in self.patterns
        )


def _row(
    handler: Callable[[Lookup], Answer], kind: Kind, needs: Needs, example: str, *patterns: str
) -> Route:
    return Route(handler, kind, needs, example, patterns)


_NEEDED = r"(?:(?:have|need|want) to )?"
_READ_NEXT = rf"\b(?:should|shall|must|do|to) (?:i )?(?:still )?{_NEEDED}read[\s?]*$"
_HOW_MANY = r"\bhow many (?:\w+ )?(?:notes|citations|sources|papers|keys|events)\b"

ROUTES: tuple[Route, ...] = (
    _row(structured.last_run, "structured", "", "what did the last mmcot run reach?",
          r"\b(?:last|latest|newest|most recent) (?:[\w.-]+ )?run\b", r"\brun of\b"),
    _row(structured.queue, "structured", "", "what should I read next?",
          r"\breading (?:queue|list)\b", _READ_NEXT, r"\bread next\b",
          r"\bto be read\b", r"\bow(?:e|ed|ing)\b"),
    _row(sources.unresolved, "backlink", "", "which citations are missing from the bibliography?",
          r"\b(?:cit\w+|keys?)\b.*\b(?:missing|not in|isn't in|aren't in|unresolved)\b",
          r"\b(?:cit\w+|keys?)\b.*(?:not|n['’]t) resolve"),
    _row(structured.when, "temporal", "", "when did I first cite @pfeifferModularDeepLearning2023?",
          r"\bwhen\b", r"\b(?:what|which) (?:day|date|week|month|year)\b"),
    _row(sources.cites, "backlink", "source", "where do I cite @huangLanguageNotAll2023?",
          r"\bcit(?:e[sd]?|ing|ations?)\b", r"\bmention(?:s|ed|ing)?\b", r"\brefer(?:s|red)?\b",
          r"\bbacklinks?\b", r"\blinks? to\b", r"\bappears?\b", r"\bcomes? up\b", r"^\W*where\b"),
    _row(sources.quotations, "backlink", "source",
          "what did I quote from the Active Prompting paper?",
          r"\bquot(?:e[sd]?|ing|ations?)\b"),
    _row(sources.status, "structured", "source", "have I read @changMuseTextToImageGeneration2023?",
          r"^\W*(?:have|did|do|was|is|am|has)\b.*\b(?:read|skim\w*|dig\w*|dug|finish\w*|stud\w+)\b",
          r"\bstatus\b", r"\bhow far\b", r"\bworth my time\b", r"\bdecide"),
    _row(sources.entry, "structured", "source", "who wrote @changMuseTextToImageGeneration2023?",
          r"\bauthors?\b", r"\bwho (?:wrote|published)\b", r"\b(?:title|abstract|url|address) of\b",
          r"\bwhat year\b", r"\bpublished\b", r"\bfull title\b"),
    _row(sources.comments, "backlink", "source", "what did I think of the Composer paper?", ""),
    _row(structured.section, "structured", "note", "what is the tl;dr of multimodal_cot?",
          r"\btl;?dr\b", r"\bsummary\b", r"\bsum(?:med)? up\b", r"\bconclu\w+\b", r"\bcontext\b",
          r"\bbackground\b", r"\bnext (?:steps?|ideas?)\b", r"\b(?:what|was) (?:\w+ )?done\b",
          r"\bsections?\b", r"\bwhat(?:'s| is) next\b"),
    _row(structured.tally, "structured", "", "how many distinct sources do I cite?",
          _HOW_MANY + r"(?! (?:did|have|was|were|are)\b.*\b(?:skim|read|dig|learn|ask))"),
    _row(structured.notes, "structured", "", "which notes are there?",
          r"\b(?:which|what|list(?: all| my)*|show(?: all| my)*) notes (?:are|do|exist|there)\b"),
    _row(structured.mentions, "structured", "topic", "which notes mention RoPE?",
          r"\bmention(?:s|ed|ing)?\b", r"\bthe words?\b", r"\boccurs?\b", r"\bcontains?\b"),
    _row(free.free, "free", "", "why is skimming like eating?", r"^\W*(?:so |and |but )?why\b",
         r"^\W*how (?!many\b|often\b)"),
    _row(structured.events, "structured", "action", "which questions are still open in gpt?", ""),
    _row(structured.changed, "temporal", "time", "what changed between 2023-03-01 and 2023-03-07?",
          r"\bchang\w+\b", r"\bhappen\w*\b", r"\bdid i (?:\w+ )?(?:do|write|log|add|record|work)\b",
          r"\bnew\b", r"\bbeen (?:doing|up to)\b", r"\bwrote\b", r"\bwritten\b", r"\badded\b",
          r"\bevents?\b"),
    _row(free.free, "free", "", "does masking save compute?", ""),
)  # fmt: skip


def route(question: Question) -> Route:
    """Return the first row that takes the question."""
    return next(row for row in ROUTES if row.takes(question))


def ask(index: Index, vectors: Vectors, text: str, today: date) -> Answer:
    """Answer a question; see `Log.ask`."""
    if not any(c.isalnum() for c in text):
        raise ModgraftError(
            f"{text!r} is no question; ask, for example: what are my open questions?"
        )
    names = names_of(index)
    question = parse_question(text, names, today, index.settings.actions)
    row = route(question)
    lookup = Lookup(index, vectors, question, row.kind)
    answer = None
    if question.by_title and question.key not in names.cited and row.handler is not free.free:
        # Only the bibliography has such a title: the notes may mention the words without citing it.
        answer = free.free(Lookup(index, vectors, replace(question, key=None), "free"))
    if row.needs == "source" and question.key is None:
        answer = refusals.unknown_source(lookup)
    elif answer is None or answer.refused:
        answer = row.handler(lookup)
    answer = verify(index, answer)
    endpoint = index.settings.endpoint
    if endpoint and answer.refused is None and answer.evidence:
        from modgraft.log.ask.phrase import phrase

        answer = verify(index, phrase(answer, endpoint, index.settings.model))
    return answer
