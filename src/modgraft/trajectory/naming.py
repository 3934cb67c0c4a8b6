"""What a question names: a note, a source by its key, its title, or its author and year."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from modgraft.trajectory.lexicon import content_words, tokens

if TYPE_CHECKING:
    from modgraft.trajectory.bibliography import Entry

_AT_KEY = re.compile(r"(?<!\w)@([A-Za-z][\w:.-]*\w)")
_KEY = re.compile(r"(?<![\w/])([A-Za-z][\w-]*(?:19|20)\d{2}[a-z]?)(?![\w/])")
_LIKE_A_KEY = re.compile(r"[a-z][A-Z]|[a-z]{3,}(?:19|20)\d{2}")
_END = r"(?=[\s?.,!:]|$)"

#: how a source is spoken of, and whether a year must be among its words
_SPOKEN: tuple[tuple[re.Pattern[str], bool], ...] = (
    (re.compile(r"\b[Tt]he ([\w' -]+?) papers?\b"), False),
    (re.compile(r"\b((?:[A-Z][\w-]+ )+(?:et al\.? )?\(?(?:19|20)\d{2}\)?)"), True),
)


def note(question: str, notes: Iterable[str]) -> tuple[str | None, str]:
    """A note that is named as one, and the question without it.

    ``in gpt``, ``gpt.md``, ``the gpt note``; of a run's ``note.md`` its folder's name; ``in the
    draft`` where one note alone has that part in its name.
    """
    names: dict[str, str] = {}
    lower = question.lower().replace("_", " ")
    for name in notes:
        path = PurePosixPath(name)
        stem = path.parent.name if path.stem == "note" and path.parent.name else path.stem
        names.setdefault(stem, name)
        names[name] = name
    said_at_all = [n for n in names if n.lower().replace("_", " ") in lower]
    for spoken in sorted(said_at_all, key=len, reverse=True):
        said = re.escape(spoken).replace("_", "[_ ]")
        quoted = rf"[`'\"]?{said}{'' if spoken.endswith('.md') else r'(?:[.]md)?'}[`'\"]?"
        forms = (
            rf"\b(?:in|from|of|for|by) (?:the |my )?(?:notes? )?{quoted}(?: notes?)?{_END}",
            rf"\bnotes? (?:called |named )?{quoted}{_END}",
            rf"(?<!\S)(?:the |my )?{quoted} notes?\b",
            rf"(?<!\S)[`'\"]?{said}[.]md\b[`'\"]?",
        )
        match = re.search("|".join(forms), question, re.IGNORECASE)
        if match:
            return names[spoken], question.replace(match[0], " ")
    match = re.search(rf"\bin (?:the|my) ([\w-]+)(?: note)?{_END}", question, re.IGNORECASE)
    if match:
        said = match[1].lower()
        having = {n for s, n in names.items() if said in re.split(r"[/_. -]", s.lower())}
        if len(having) == 1:
            return having.pop(), question.replace(match[0], " ")
    return None, question


def key(question: str, known: Mapping[str, str]) -> tuple[str | None, str | None, str]:
    """A citation key, with ``@`` or without; or one that nobody knows; and the question without it.

    Args:
        question: The question.
        known: The keys there are, by their lower case.
    """
    match = _AT_KEY.search(question)
    if match is None:
        words = (w for w in re.findall(r"[\w:-]+", question) if w.lower() in known)
        word = next((w for w in words if _LIKE_A_KEY.search(w)), None)
        match = re.search(rf"\b({re.escape(word)})\b", question) if word else _KEY.search(question)
    if match is None or not (match[0].startswith("@") or _LIKE_A_KEY.search(match[1])):
        return None, None, question
    found = known.get(match[1].lower())
    return found, None if found else match[1], question.replace(match[0], " ")


def source(
    rest: str, question: str, sources: Mapping[str, Entry], cited: tuple[str, ...]
) -> tuple[str | None, str]:
    """A source by its title or its author and year, where that leaves no doubt.

    Either its title (or what stands before the title's colon) is in the question, or words by which
    it is spoken of ("the … paper", "Pfeiffer 2023") fit one source alone. Cited ones come first.
    """
    cited_ones = [sources[k] for k in dict.fromkeys(cited) if k in sources]
    pools = (cited_ones, list(sources.values()))
    lower = f" {' '.join(tokens(rest)).lower()} "
    for entries in pools:
        titled: dict[str, list[Entry]] = {}
        for entry in entries:
            for title in _titles(entry):
                if f" {title} " in lower and (" " in title or _is_written_as_name(title, question)):
                    titled.setdefault(title, []).append(entry)
        longest = max(titled, key=len, default="")
        if len(titled.get(longest, ())) == 1:
            entry = titled[longest][0]
            return entry.key, _without(rest, entry)
    for pattern, dated in _SPOKEN:
        match = pattern.search(rest)
        words = [w.lower() for w in content_words(match[1].replace("et al", ""))] if match else []
        for entries in pools if match and words else ():
            fits = [e for e in entries if all(_says(e, w) for w in words)]
            if len(fits) == 1 and (not dated or any(w.isdigit() for w in words)):
                return fits[0].key, rest.replace(match[0], " ") if match else rest
    return None, rest


@lru_cache(maxsize=100_000)
def _titles(entry: Entry) -> tuple[str, ...]:
    whole = " ".join(tokens(entry.title)).lower()
    head = " ".join(tokens(entry.title.partition(":")[0])).lower()
    return tuple(t for t in dict.fromkeys((whole, head)) if t)


def _is_written_as_name(title: str, question: str) -> bool:
    """Whether a title of one word is written as a name, not at the start: ``Muse``, ``ELITE``."""
    return any(t[0].isupper() for t in tokens(question)[1:] if t.lower() == title)


def _says(entry: Entry, word: str) -> bool:
    text = f"{entry.title} {' '.join(entry.authors)} {entry.year}".lower()
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def _without(question: str, entry: Entry) -> str:
    for title in sorted(_titles(entry), key=len, reverse=True):
        words = r"\W+".join(map(re.escape, title.split()))
        question = re.sub(rf"\b{words}\b", " ", question, flags=re.IGNORECASE)
    return question
