"""What a question names: a note, a source by its key, its title, or its author and year.

A question is looked up in tables by its runs of words, so that ten thousand names cost no more than
ten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from modgraft.log.ask.lexicon import content_words, tokens

if TYPE_CHECKING:
    from modgraft.log.index.bibliography import Entry
    from modgraft.log.index.index import Index

LONGEST = 24
"""Words that a name may have to be recognised."""

_PLAIN = re.compile(r"[^\W_]+")
_AT_KEY = re.compile(r"(?<!\w)@([A-Za-z][\w:.-]*\w)")
_KEY = re.compile(r"(?<![\w/])([A-Za-z][\w-]*(?:19|20)\d{2}[a-z]?)(?![\w/])")
_LIKE_A_KEY = re.compile(r"[a-z][A-Z]|[a-z]{3,}(?:19|20)\d{2}")
_AUTHOR = re.compile(r"\b(?:cite[ds]?|by|of|from|about|on) ([A-Za-z][\w-]+)(?: et al\.?)?[\s?.!]*$")
_END = r"(?=[\s?.,!:]|$)"

#: how a source is spoken of, and whether a year must be among its words
_SPOKEN: tuple[tuple[re.Pattern[str], bool], ...] = (
    (re.compile(r"\b[Tt]he ([\w' -]+?) papers?\b"), False),
    (re.compile(r"\b((?:[A-Z][\w-]+ )+(?:et al\.? )?\(?(?:19|20)\d{2}\)?)"), True),
)


class Names:
    """The names of a log's notes and sources."""

    def __init__(
        self, notes: Iterable[str], sources: Mapping[str, Entry], cited: Iterable[str]
    ) -> None:
        self.sources = sources
        self.cited = tuple(dict.fromkeys(cited))
        self.keys = {key.lower(): key for key in (*sources, *self.cited)}
        self._notes: dict[str, list[tuple[str, str]]] = {}
        self._parts: dict[str, set[str]] = {}
        for name in notes:
            self._add_note(name)
        self._titles: dict[str, list[Entry]] = {}
        for entry in sources.values():
            for title in _titles(entry):
                self._titles.setdefault(title, []).append(entry)

    def _add_note(self, name: str) -> None:
        *folders, last = name.split("/")
        stem = last[:-3] if last.lower().endswith(".md") else last
        if stem == "note" and folders:  # a run's: its folder says which
            stem = folders[-1]
        for spoken in dict.fromkeys((stem, name)):
            self._notes.setdefault(_normal(spoken), []).append((spoken, name))
        for part in _PLAIN.findall(stem.lower()):
            self._parts.setdefault(part, set()).add(name)

    def note(self, question: str) -> tuple[str | None, str]:
        """A note that is named as one, and the question without it.

        ``in gpt``, ``gpt.md``, ``the gpt note``; of a run's ``note.md`` its folder's name; ``in
        the draft`` where one note alone has that part in its name.
        """
        found = [pair for run in _runs(_normal(question)) for pair in self._notes.get(run, ())]
        for spoken, name in sorted(found, key=lambda pair: -len(pair[0])):
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
                return name, question.replace(match[0], " ")
        match = re.search(rf"\bin (?:the|my) ([\w-]+)(?: note)?{_END}", question, re.IGNORECASE)
        having = self._parts.get(match[1].lower(), set()) if match else set()
        if match and len(having) == 1:
            return next(iter(having)), question.replace(match[0], " ")
        return None, question

    def key(self, question: str) -> tuple[str | None, str | None, str]:
        """A citation key, with ``@`` or without; or one that nobody knows; and the rest."""
        match = _AT_KEY.search(question)
        if match is None:
            words = (w for w in re.findall(r"[\w:-]+", question) if w.lower() in self.keys)
            word = next((w for w in words if _LIKE_A_KEY.search(w)), None)
            known = rf"\b({re.escape(word)})\b" if word else _KEY
            match = re.search(known, question)
        if match is None or not (match[0].startswith("@") or _LIKE_A_KEY.search(match[1])):
            return None, None, question
        found = self.keys.get(match[1].lower())
        return found, None if found else match[1], question.replace(match[0], " ")

    def source(self, rest: str, question: str) -> tuple[str | None, str]:
        """A source by its title or its author and year, where that leaves no doubt.

        Either its title (or what stands before the title's colon) is in the question, or words by
        which it is spoken of ("the … paper", "Pfeiffer 2023") fit one source alone. Cited ones come
        first.
        """
        said = " ".join(tokens(rest)).lower()
        titles = [run for run in _runs(said) if run in self._titles]
        titles = [t for t in titles if " " in t or _is_written_as_name(t, question)]
        cited = set(self.cited)
        for among in (cited, None):
            for title in sorted(titles, key=len, reverse=True):
                fits = [e for e in self._titles[title] if among is None or e.key in among]
                if len(fits) == 1:
                    return fits[0].key, _without(rest, fits[0])
        for pattern, dated in _SPOKEN:
            match = pattern.search(rest)
            words = content_words(match[1].replace("et al", "")) if match else []
            if match and words and (not dated or any(w.isdigit() for w in words)):
                for pool in (self.cited, self.sources):
                    entries = (self.sources[k] for k in pool if k in self.sources)
                    fits = [e for e in entries if all(_says(e, w.lower()) for w in words)]
                    if len(fits) == 1:
                        return fits[0].key, rest.replace(match[0], " ")
        match = _AUTHOR.search(rest)
        if match:  # an author's name alone, if one cited source alone has that author first
            entries = (self.sources[k] for k in self.cited if k in self.sources)
            fits = [e for e in entries if _first_author(e) == match[1].lower()]
            if len(fits) == 1:
                return fits[0].key, rest.replace(match[0], " ")
        return None, rest


def names_of(index: Index) -> Names:
    """Return the names of an index's notes and sources, kept until the index changes."""

    def made() -> Names:
        cited = index.store.rows("SELECT DISTINCT key FROM cites")
        return Names(index.notes(), index.bibliography.entries, (key for (key,) in cited))

    return index.store.remembered("names", made)


def _first_author(entry: Entry) -> str:
    return entry.authors[0].split()[-1].lower() if entry.authors and entry.authors[0] else ""


def _normal(text: str) -> str:
    return " ".join(_PLAIN.findall(text.lower()))


def _runs(text: str) -> Iterator[str]:
    """Every run of words of a text, up to ``LONGEST``."""
    words: Sequence[str] = text.split()
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
            yield " ".join(words[start:end])


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
