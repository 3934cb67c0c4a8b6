"""The template environment: filters for addresses, days, hits and text, and link resolution."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from modgraft.log.serve.web.inline import LOST, UNKNOWN, View, badge, inline, is_name, web

if TYPE_CHECKING:
    from modgraft.log.index.bibliography import Entry
    from modgraft.log.index.query import Hit
    from modgraft.log.log import Log

FOLDER = Path(str(files("modgraft.log.serve.web")))

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".avif", ".svg"})
"""Suffixes of the files in the log's folders that are served: pictures only."""

LONGEST = 1200
"""Characters of an event's body in a list of events."""

_BULLET = re.compile(r"^\s*(?:(?:[-*+]|\d{1,9}[.)]|#{1,6})\s+|>\s*)+", re.MULTILINE)


def address(note: str, line: int | None = None) -> str:
    """Return a note's address on the website, at a line if one is given."""
    return f"/note/{quote(note)}" + (f"?line={line}#L{line}" if line else "")


def day(when: str) -> str:
    """Format an ISO time as a day: ``2 March 2023``; other text is returned as it is."""
    try:
        at = date.fromisoformat(when[:10])
    except ValueError:
        return when or "undated"
    return f"{at.day} {at:%B %Y}"


@dataclass(frozen=True, slots=True)
class ListedHit:
    """A hit as it is listed.

    `is_event` says that its line is an event; else it is a passage, perhaps under an event.
    `text` is its text without the event's brackets, `keys` are its citations.
    """

    is_event: bool
    text: str
    keys: tuple[str, ...]


def listed_hit(hit: Hit) -> ListedHit:
    """Return a hit's text without bullets and the event's brackets, on one line."""
    from modgraft.log.syntax.parse import parse

    text = hit.text[: 4 * LONGEST]
    data = text.encode("utf-8")
    note = parse(data)
    # Find the hit's event in its text; a passage has only the event that it hangs under.
    known = (hit.action, hit.arguments, hit.result, 1)
    here = [e for e in note.events if (e.action, e.arguments, e.result, e.line) == known]
    if here:
        event = here[0]
        # Of two events on a line, the text between them belongs to the second.
        start = max((e.end for e in note.events if e.end <= event.start), default=0)
        before = _BULLET.sub("", data[start : event.start].decode("utf-8", "replace")).strip()
        before = before if re.search(r"\w", before) else ""
        text = "\n".join(part for part in (before, event.body) if part)
    lines = (_BULLET.sub("", line).strip() for line in text.splitlines())
    short = " · ".join(line for line in lines if line)
    short = short if len(short) <= LONGEST else f"{short[:LONGEST]}…"
    keys = dict.fromkeys([*hit.keys, *(c.key for c in (*note.citations, *note.mentions))])
    return ListedHit(bool(here), short, tuple(keys))


class Resolver:
    """Resolves citations, links and pictures of notes to addresses on the website."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.sources: Mapping[str, Entry] = {}

    def title(self, key: str) -> str | None:
        """Return what a citation shows on hover; None if the bibliography lacks it."""
        entry = self.sources.get(key)
        return entry and f"{entry.title} · {', '.join(entry.authors)} · {entry.year}"

    def view(self, note: str, *, figures: bool = True) -> View:
        """Return the view for the text of a note; without ``figures`` pictures are only named."""
        folder = self.log.path(note).parent

        def href(target: str) -> str | None:
            path = _local(folder, target)
            return web(target) if path is None else self.note(path) or self.figure(path)

        def figure(target: str) -> str | None:
            path = _local(folder, target) if figures else None
            return path and self.figure(path)

        lost = LOST if figures else "A figure, to be seen in the note"
        return View(self.title, href, figure, lost)

    def figure(self, path: Path) -> str | None:
        """Return the address of a picture; None if it is not in the log's folders."""
        real, root = picture(self.log, path), self.log.settings.root.resolve()
        if real is None or not real.is_relative_to(root):
            return None
        return f"/figure/{quote(real.relative_to(root).as_posix())}"

    def note(self, path: Path) -> str | None:
        """Return the address of the note in a file; None if the log has no such note."""
        for file in (path, path.with_name(f"{path.name}.md"), path / "note.md"):
            named = os.path.normpath(file)  # links are not resolved, as in the index
            rows = self.log.database.rows("SELECT note FROM files WHERE path = ?", named)
            if rows:
                return address(rows[0][0])
        return None


def _local(folder: Path, target: str) -> Path | None:
    """Return the file of a relative target; None for an address or an absolute path."""
    try:
        parts = urlsplit(target)
    except ValueError:  # such as http://[
        return None
    path = unquote(parts.path)
    if parts.scheme or parts.netloc or not path or path.startswith(("/", "\\")) or "\0" in path:
        return None
    return folder / path


def picture(log: Log, path: Path) -> Path | None:
    """Return the file of a picture if it lies in the log's folders; else None."""
    try:
        real = path.resolve()
        own = any(real.is_relative_to(folder.resolve()) for folder in log.settings.folders)
        # resolve() followed a link that leads out of the folders, so it is refused.
        return real if own and real.suffix.lower() in IMAGES and real.is_file() else None
    except (OSError, RuntimeError):  # a name too long, a loop of links
        return None


def environment(resolver: Resolver) -> Environment:
    """Build the template environment, which escapes all text."""
    made = Environment(
        loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    plain = View(resolver.title, web, lambda target: None)

    def md(text: str, keys: Collection[str] = (), note: str = "") -> Markup:
        return inline(text, resolver.view(note, figures=False) if note else plain, keys)

    made.filters |= {"at": address, "day": day, "listed": listed_hit, "md": md, "path": quote}
    made.filters["badge"] = lambda action: badge(action, action)
    made.filters["titles"] = lambda hit: [
        resolver.sources[key].title
        for key in hit.keys
        if key in resolver.sources and key in (hit.arguments or "")
    ]
    made.filters["unknown"] = lambda key: UNKNOWN[is_name(key)]
    made.filters["begun"] = lambda text: text[:1].upper() + text[1:]
    made.filters["filename"] = lambda path: Path(path).name
    return made
