"""Find the note or source that a question names, by key, by title, or by author and year.

Each run of words in the question is looked up in a dictionary, so that ten thousand names cost no
more than ten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from modgraft.log.ask.lexicon import content_words, tokens

if TYPE_CHECKING:
    from modgraft.log.index.bibliography import Entry
    from modgraft.log.index.index import Index

LONGEST = 24
"""The longest name that is recognised, in words."""

_PLAIN = re.compile(r"[^\W_]+")
_AT_KEY = re.compile(r"(?<!\w)@([A-Za-z][\w:.-]*\w)")
_KEY = re.compile(r"(?<![\w/])([A-Za-z][\w-]*(?:19|20)\d{2}[a-z]?)(?![\w/])")
_LIKE_A_KEY = re.compile(r"[a-z][A-Z]|[a-z]{3,}(?:19|20)\d{2}")
_AUTHOR = re.compile(r"\b(?:cite[ds]?|by|of|from|about|on) ([A-Za-z][\w-]+)(?: et al\.?)?[\s?.!]*$")
_END = r"(?=[\s?.,!:]|$)"

#: ways to refer to a source, and whether a year must be among the words
_REFERENCES: tuple[tuple[re.Pattern[str], bool], ...] = (
    (re.compile(r"\b[Tt]he ([\w' -]+?) papers?\b"), False),
    (re.compile(r"\b((?:[A-Z][\w-]+ )+(?:et al\.? )?\(?(?:19|20)\d{2}\)?)"), True),
)


class Names:
    """The names by which a question may refer to a log's notes and sources."""

    def __init__(
        self, notes: Iterable[str], sources: Mapping[str, Entry], cited: Iterable[str]
    ) -> None:
        self.sources = sources
        self.cited = tuple(dict.fromkeys(cited))
        #: where a source is looked for: first among the cited ones, then among all
        self._pools = ({key: sources[key] for key in self.cited if key in sources}, sources)
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

    def find_note(self, question: str) -> tuple[str | None, str]:
        """Find the note that a question names, and return it with the rest of the question.

        Recognised are ``in gpt``, ``gpt.md`` and ``the gpt note``; a run's ``note.md`` goes by its
        folder's name; ``in the draft`` is enough where only one note has that word in its name.
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

    def find_key(self, question: str) -> tuple[str | None, str | None, str]:
        """Find a citation key: known, or else unknown; and return the rest of the question."""
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

    def find_source(self, rest: str, question: str) -> tuple[str | None, str]:
        """Find a source by its title or its author and year, where only one fits.

        Either the question holds its title (or the part before the title's colon), or a reference
        ("the … paper", "Pfeiffer 2023") fits only one source. Cited sources come first.
        """
        by_title = self._by_title(rest, question)
        return by_title or self._by_reference(rest) or self._by_author(rest) or (None, rest)

    def _by_title(self, rest: str, question: str) -> tuple[str, str] | None:
        titles = [run for run in _runs(" ".join(tokens(rest)).lower()) if run in self._titles]
        titles = [t for t in titles if " " in t or _is_written_as_name(t, question)]
        for pool in self._pools:
            for title in sorted(titles, key=len, reverse=True):
                fits = [e for e in self._titles[title] if e.key in pool]
                if len(fits) == 1:
                    return fits[0].key, _without(rest, fits[0])
        return None

    def _by_reference(self, rest: str) -> tuple[str, str] | None:
        for pattern, dated in _REFERENCES:
            match = pattern.search(rest)
            words = content_words(match[1].replace("et al", "")) if match else []
            if match is None or not words or (dated and not any(w.isdigit() for w in words)):
                continue
            for pool in self._pools:
                fits = [e for e in pool.values() if all(_has_word(e, w.lower()) for w in words)]
                if len(fits) == 1:
                    return fits[0].key, rest.replace(match[0], " ")
        return None

    def _by_author(self, rest: str) -> tuple[str, str] | None:
        """Find a cited source by its first author's name alone."""
        match = _AUTHOR.search(rest)
        if match is None:
            return None
        fits = [k for k, e in self._pools[0].items() if _first_author(e) == match[1].lower()]
        return (fits[0], rest.replace(match[0], " ")) if len(fits) == 1 else None


def names_of(index: Index) -> Names:
    """Return the names of an index's notes and sources, kept until the index changes."""

    def build() -> Names:
        cited = index.database.rows("SELECT DISTINCT key FROM cites")
        return Names(index.notes(), index.bibliography.entries, (key for (key,) in cited))

    return index.database.cached("names", build)


def _first_author(entry: Entry) -> str:
    return entry.authors[0].split()[-1].lower() if entry.authors and entry.authors[0] else ""


def _normal(text: str) -> str:
    return " ".join(_PLAIN.findall(text.lower()))


def _runs(text: str) -> Iterator[str]:
    """Yield every run of up to ``LONGEST`` words of a text."""
    words = text.split()
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
            yield " ".join(words[start:end])


def _titles(entry: Entry) -> tuple[str, ...]:
    whole = " ".join(tokens(entry.title)).lower()
    head = " ".join(tokens(entry.title.partition(":")[0])).lower()
    return tuple(t for t in dict.fromkeys((whole, head)) if t)


def _is_written_as_name(title: str, question: str) -> bool:
    """Return whether a one-word title is capitalised, other than at the start: ``Muse``,
    ``ELITE``."""
    return any(t[0].isupper() for t in tokens(question)[1:] if t.lower() == title)


def _has_word(entry: Entry, word: str) -> bool:
    text = f"{entry.title} {' '.join(entry.authors)} {entry.year}".lower()
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def _without(question: str, entry: Entry) -> str:
    for title in sorted(_titles(entry), key=len, reverse=True):
        words = r"\W+".join(map(re.escape, title.split()))
        question = re.sub(rf"\b{words}\b", " ", question, flags=re.IGNORECASE)
    return question
