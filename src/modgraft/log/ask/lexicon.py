"""The words of questions: those that name an action, and those that carry no content."""

from __future__ import annotations

import re
from functools import lru_cache

#: pattern of words → the action they name, and the status if they name one; longer ones first
ACTION_WORDS: tuple[tuple[str, str, str], ...] = (
    (r"(?:have|did) i (?:fully read|read (?:fully|in full))|finish(?:ed)? reading", "read", ""),
    (r"full[ _-]?read(?:ing)?|(?:be )?read(?:ing)? in full", "skim", "full_read"),
    (r"dig(?:ging)?(?: deeper| into)?|dug(?: into)?", "skim", "digging"),
    (r"skim(?:s|med|ming)?", "skim", ""),
    (r"(?:open|unanswered|unresolved) questions?", "question", "open"),
    (r"questions? (?:is|are|remain|that are|still) (?:\w+ )?(?:open|unanswered)",
     "question", "open"),
    (r"answered questions?|questions? (?:(?:is|are|was|were|got)|ha(?:s|ve) been) answered",
     "question", "answered"),
    (r"questions? (?:did|have) i answer(?:ed)?", "question", "answered"),
    (r"questions?", "question", ""),
    (r"lessons?(?: learn(?:ed|t))?|learn(?:ed|t)?(?! more)", "lesson_learned", ""),
    (r"eurekas?(?: moments?)?|ideas? (?:did|do|have) i|(?:my|which|what|all) ideas?", "eureka", ""),
    (r"hypothes[ie]s|hypothesi[sz](?:e|ed|ing)", "hypothesize", ""),
    (r"soliloqu(?:y|ies)|thinking aloud", "soliloquy", ""),
    (r"critiques?|critici[sz]ed?", "critique", ""),
    (r"interrupt(?:s|ed|ion|ions)?|distract(?:s|ed|ion|ions)?", "interrupt", ""),
    (r"calculat(?:e|ed|ion|ions)", "calculate", ""),
    (r"ask(?:ed)? chatgpt|(?:conversations?|chats?) with chatgpt", "ChatGPT", ""),
    (r"ask(?:ed)? bing(?:chat)?|(?:conversations?|chats?) with bing(?:chat)?", "BingChat", ""),
    (r"projects? (?:did|have) i start(?:ed)?", "start", ""),
    (r"blog(?:s|ged)?(?: posts?)?", "blog", ""),
    (r"github issues?", "file_github_issue", ""),
    (r"(?:write|wrote|written) (?:in |as )?code|code (?:did|have) i|(?:i|me) code|coded",
     "code", ""),
    (r"(?:have|did|had) i (?:already |ever )?read|i (?:have |did )?read|read by me", "read", ""),
)  # fmt: skip

_STOP_WORDS = """
a about above after again against all already also am an and any anything are aren't as at be
because been before being below between both but by can can't cannot could couldn't did didn't do
does doesn't doing don't done down during each else ever every few find for from further get give
gives go going got had has hasn't have haven't having he her here hers him his how however i i'd
i'll i'm i've if in into is isn't it it's its itself just know last latest let like list made make
makes many may me mean means might more most much must my myself need never no nor not nothing now
of off on once one only or other our ours out over own please recent recently really regarding
same say saying says said she should show so some something still such take tell than that that's
the their theirs them then there there's these they thing things this those though through to told
too toward under until up upon us use used using very want was wasn't way we were what what's
whatever when where whether which while who whom whose why will with within without won't would
write writes writing written wrote yes yet you your yours

note notes noted log logged paper papers source sources think thinks thinking thought thoughts
opinion opinions comment comments view views mention mentions mentioned mentioning recorded record
entry entries article articles per quote quotes quoted quotation quotations
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Words that never become part of a query: they carry no content, or only address the log."""

_GENERIC = """
marked mark flagged flag judged decided left remain remaining total altogether session time times
happened happen work worked worth answered answer unanswered long best wrong special big good bad
use publish published name names titles title date dates far currently question ask lookup kind came
come learned learn learnt piece pieces idea ideas post posts
"""
GENERIC = frozenset(_GENERIC.split())
"""Words that ask for events without saying what the events are about."""

_TOKEN = re.compile(r"[^\W_]+(?:[.'’-][^\W_]+)*")


def tokens(text: str) -> list[str]:
    """Split a text into words; ``gpt3.5`` and ``co-occurrence`` are one word each."""
    return _TOKEN.findall(text)


def content_words(text: str) -> list[str]:
    """Return the words of a text without the stop words."""
    return [token for token in tokens(text) if _without_s(token) not in STOP_WORDS]


def _without_s(word: str) -> str:
    return word.lower().replace("’", "'").removesuffix("'s")


_ENDINGS = (
    *("ations", "ation", "ions", "ion", "ingly", "ings", "ing", "edly", "ed"),
    *("ies", "es", "s", "ly", "y", "e"),
)


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """Strip a word's ending, so that ``masked``, ``masks`` and ``masking`` are equal."""
    word = _without_s(word)
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word
