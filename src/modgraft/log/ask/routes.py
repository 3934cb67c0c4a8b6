"""Which questions are answered how: a table, tried from top to bottom.

A row takes a question that one of its patterns is found in and that names what the row needs: a
source (by key, title, or author and year), a note, an action, a time. The last takes the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from modgraft.log.ask.answer import Kind
from modgraft.log.ask.question import Asked

Needs = Literal["", "source", "note", "action", "time", "topic"]


@dataclass(frozen=True, slots=True)
class Route:
    """One row: its handler's name, the answer's kind, what it needs, an example, the patterns."""

    name: str
    kind: Kind
    needs: Needs
    example: str
    patterns: tuple[str, ...]

    def takes(self, asked: Asked) -> bool:
        """Whether a question has what the row needs, and one of its patterns."""
        found = (re.search(p, asked.question, re.IGNORECASE) for p in self.patterns)
        return _has(asked, self.needs) and any(found)


def _row(name: str, kind: Kind, needs: Needs, example: str, *patterns: str) -> Route:
    return Route(name, kind, needs, example, patterns)


_NEEDED = r"(?:(?:have|need|want) to )?"
_READ_NEXT = rf"\b(?:should|shall|must|do|to) (?:i )?(?:still )?{_NEEDED}read[\s?]*$"
_HOW_MANY = r"\bhow many (?:\w+ )?(?:notes|citations|sources|papers|keys|events)\b"

ROUTES: tuple[Route, ...] = (
    _row("run", "structured", "", "what did the last mmcot run reach?",
          r"\b(?:last|latest|newest|most recent) (?:[\w.-]+ )?run\b", r"\brun of\b"),
    _row("queue", "structured", "", "what should I read next?",
          r"\breading (?:queue|list)\b", _READ_NEXT, r"\bread next\b", r"\bow(?:e|ed|ing)\b"),
    _row("unresolved", "backlink", "", "which citations are missing from the bibliography?",
          r"\b(?:cit\w+|keys?)\b.*\b(?:missing|not in|isn't in|aren't in|unresolved)\b",
          r"\b(?:cit\w+|keys?)\b.*(?:not|n['’]t) resolve"),
    _row("when", "temporal", "", "when did I first cite @pfeifferModularDeepLearning2023?",
          r"\bwhen\b", r"\b(?:what|which) (?:day|date|week|month|year)\b"),
    _row("cites", "backlink", "source", "where do I cite @huangLanguageNotAll2023?",
          r"\bcit(?:e[sd]?|ing|ations?)\b", r"\bmention(?:s|ed|ing)?\b", r"\brefer(?:s|red)?\b",
          r"\bbacklinks?\b", r"\blinks? to\b", r"\bappears?\b", r"\bcomes? up\b", r"^\W*where\b"),
    _row("quoted", "backlink", "source", "what did I quote from the Active Prompting paper?",
          r"\bquot(?:e[sd]?|ing|ations?)\b"),
    _row("status", "structured", "source", "have I read @changMuseTextToImageGeneration2023?",
          r"^\W*(?:have|did|do|was|is|am|has)\b.*\b(?:read|skim\w*|dig\w*|dug|finish\w*|stud\w+)\b",
          r"\bstatus\b", r"\bhow far\b", r"\bworth my time\b", r"\bdecide"),
    _row("entry", "structured", "source", "who wrote @changMuseTextToImageGeneration2023?",
          r"\bauthors?\b", r"\bwho (?:wrote|published)\b", r"\b(?:title|abstract|url|address) of\b",
          r"\bwhat year\b", r"\bpublished\b", r"\bfull title\b"),
    _row("said", "backlink", "source", "what did I think of the Composer paper?", ""),
    _row("section", "structured", "note", "what is the tl;dr of multimodal_cot?",
          r"\btl;?dr\b", r"\bsummary\b", r"\bsum(?:med)? up\b", r"\bconclu\w+\b", r"\bcontext\b",
          r"\bbackground\b", r"\bnext (?:steps?|ideas?)\b", r"\b(?:what|was) (?:\w+ )?done\b",
          r"\bsections?\b", r"\bwhat(?:'s| is) next\b"),
    _row("tally", "structured", "", "how many distinct sources do I cite?",
          _HOW_MANY + r"(?! (?:did|have|was|were|are)\b.*\b(?:skim|read|dig|learn|ask))"),
    _row("notes", "structured", "", "which notes are there?",
          r"\b(?:which|what|list(?: all| my)*|show(?: all| my)*) notes (?:are|do|exist|there)\b"),
    _row("mentions", "structured", "topic", "which notes mention RoPE?",
          r"\bmention(?:s|ed|ing)?\b", r"\bthe words?\b", r"\boccurs?\b", r"\bcontains?\b"),
    _row("free", "free", "", "why is skimming like eating?", r"^\W*(?:so |and |but )?why\b",
         r"^\W*how (?!many\b|often\b)"),
    _row("events", "structured", "action", "which questions are still open in gpt?", ""),
    _row("changed", "temporal", "time", "what changed between 2023-03-01 and 2023-03-07?",
          r"\bchang\w+\b", r"\bhappen\w*\b", r"\bdid i (?:\w+ )?(?:do|write|log|add|record|work)\b",
          r"\bnew\b", r"\bbeen (?:doing|up to)\b", r"\bwrote\b", r"\bwritten\b", r"\badded\b",
          r"\bevents?\b"),
    _row("free", "free", "", "does masking save compute?", ""),
)  # fmt: skip


def route(asked: Asked) -> Route:
    """The first row that takes the question."""
    return next(row for row in ROUTES if row.takes(asked))


def _has(asked: Asked, needs: Needs) -> bool:
    return {
        "": True,
        "source": asked.key is not None or asked.unknown_key is not None,
        "note": asked.note is not None,
        "action": bool(asked.actions),
        "time": asked.moment is not None,
        "topic": bool(asked.topic),
    }[needs]
