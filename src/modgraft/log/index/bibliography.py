"""Read BibTeX files with bibtexparser, and keep the file and line of every entry."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ESCAPED = re.compile(r"\\([%&#_])")
_LONG = 400
"""LaTeX in longer values (abstracts) is kept as written: parsing it takes the most time."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One source: the fields of its BibTeX entry, and where the entry stands."""

    key: str
    title: str
    authors: tuple[str, ...]
    year: str
    url: str
    abstract: str
    file: str
    line: int

    @property
    def short(self) -> str:
        """Authors and year in short: ``Pfeiffer et al. 2023``."""
        names = [author.split()[-1] for author in self.authors if author.split()]
        who = names[0] + (" et al." if len(names) > 2 else "") if names else "no author"
        return f"{' and '.join(names) if len(names) == 2 else who} {self.year}".strip()


@dataclass(frozen=True, slots=True)
class Broken:
    """A part of a bibliography that could not be read, and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class Bibliography:
    """Sources by citation key, and the entries that could not be read."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    broken: tuple[Broken, ...] = ()

    @classmethod
    def read(cls, paths: Iterable[str | Path]) -> Bibliography:
        """Read all entries of ``paths``; if two have the same key, the second is reported.

        A broken entry or invalid UTF-8 is reported and affects that entry alone.

        Raises:
            OSError: if a file cannot be read.
        """
        entries: dict[str, Entry] = {}
        broken: list[Broken] = []
        for path in paths:
            text, problems = _decoded(Path(path))
            broken += problems
            for each in _entries(text, str(path)):
                if isinstance(each, Broken):
                    broken.append(each)
                elif each.key in entries:
                    first = entries[each.key]
                    reason = f"{each.key} is already in {first.file}:{first.line}, which is used"
                    broken.append(Broken(each.file, each.line, reason))
                else:
                    entries[each.key] = each
        return cls(entries, tuple(sorted(broken, key=lambda b: (b.file, b.line))))

    def nearest(self, key: str, n: int = 3) -> list[str]:
        """Return the keys most similar to ``key`` (with or without ``@``), the nearest first."""
        wanted = key.lstrip("@").lower()
        lower = {known.lower(): known for known in self.entries}
        if wanted in lower:
            return [lower[wanted]]
        starts = [k for k in lower if len(wanted) >= 4 and k.startswith(wanted)]
        found = [*(lower[k] for k in starts), *similar(wanted, self.entries, n)]
        return list(dict.fromkeys(found))[:n]

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __len__(self) -> int:
        return len(self.entries)


def similar(key: str, known: Iterable[str], n: int) -> list[str]:
    """Return the ``n`` known keys that are most similar to ``key``, whatever their case."""
    from difflib import get_close_matches

    lower = {one.lower(): one for one in known}
    return [lower[one] for one in get_close_matches(key.lower(), lower, n, cutoff=0.75)]


def _decoded(path: Path) -> tuple[str, list[Broken]]:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"byte {error.start} is no UTF-8; what cannot be read is shown as \ufffd"
        return data.decode("utf-8-sig", errors="replace"), [Broken(str(path), line, reason)]


def _entries(text: str, file: str) -> Iterator[Entry | Broken]:
    """Yield the entries of one file, and its broken ones."""
    from bibtexparser.entrypoint import parse_string
    from bibtexparser.model import DuplicateBlockKeyBlock, DuplicateFieldKeyBlock

    with _quiet():
        library = parse_string(text)
    for entry in library.entries:
        line = (entry.start_line or 0) + 1
        if entry.key:
            yield _entry(entry, file, line)
        else:
            yield Broken(file, line, "an entry without a key; nothing can cite it")
    for block in library.failed_blocks:
        line = (block.start_line or 0) + 1
        if isinstance(block, DuplicateFieldKeyBlock):
            twice = ", ".join(sorted(block.duplicate_keys))
            yield Broken(file, line, f"{twice} twice in one entry; the first is used")
            yield _entry(block.ignore_error_block, file, line)
        elif isinstance(block, DuplicateBlockKeyBlock):
            yield _entry(block.ignore_error_block, file, line)
        else:
            head = " ".join((block.raw or "").split())[:60]
            yield Broken(file, line, f"not BibTeX from here on: {head!r}; close its braces")


def _entry(entry: Any, file: str, line: int) -> Entry:
    fields: dict[str, str] = {}
    for each in entry.fields:
        fields.setdefault(each.key.lower(), str(each.value))
    date = fields.get("date") or fields.get("year", "")
    year = re.search(r"\d{4}", date)
    url = fields.get("url") or (f"https://doi.org/{fields['doi']}" if "doi" in fields else "")
    return Entry(
        key=entry.key,
        title=_plain(fields.get("title", "")),
        authors=tuple(_names(fields.get("author") or fields.get("editor", ""))),
        year=year[0] if year else "",
        url=url.replace("\\", ""),
        abstract=_plain(fields.get("abstract", "")),
        file=file,
        line=line,
    )


def _names(field: str) -> Iterator[str]:
    """Yield names, first name first: ``Mokrá, Soňa and {The Team}`` → ``Soňa Mokrá``, …"""
    for name in re.split(r"\s+and\s+", field.strip()) if field.strip() else ():
        last, _, first = name.partition(",")
        yield _plain(f"{first.rpartition(',')[2]} {last}" if first else last)


def _plain(value: str) -> str:
    """Remove braces, translate LaTeX commands, and put everything on one line."""
    value = _ESCAPED.sub(r"\1", value)
    if "\\" in value and len(value) < _LONG:
        from pylatexenc.latex2text import LatexNodes2Text

        value = LatexNodes2Text(math_mode="verbatim").latex_to_text(value)
    return " ".join(value.replace("{", "").replace("}", "").split())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence bibtexparser's log: broken entries are reported with file and line instead."""
    logger = logging.getLogger("bibtexparser")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
