"""How the page shows what a log gives: places as addresses, times as days, text as HTML."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
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
"""Files of the log's folders that are served: pictures, and nothing else."""

LONGEST = 1200
"""Characters of an event's body in a list of events."""

_BULLET = re.compile(r"^\s*(?:(?:[-*+]|\d{1,9}[.)]|#{1,6})\s+|>\s*)+", re.MULTILINE)


def address(note: str, line: int | None = None) -> str:
    """Where a note is on the page, at a line of it."""
    return f"/note/{quote(note)}" + (f"?line={line}#L{line}" if line else "")


def day(when: str) -> str:
    """An ISO time as a day to read: ``2 March 2023``; what is no day stays as it is."""
    try:
        at = date.fromisoformat(when[:10])
    except ValueError:
        return when or "undated"
    return f"{at.day} {at:%B %Y}"


@dataclass(frozen=True, slots=True)
class Told:
    """A hit as it is listed.

    `own` says that its line is an event's own; else it is a passage, maybe one under an event.
    `text` is what it says besides the event's brackets, `keys` what it cites.
    """

    own: bool
    text: str
    keys: tuple[str, ...]


def told(hit: Hit) -> Told:
    """A hit's text without what it is an outline by."""
    from modgraft.log.syntax.parse import parse

    text = hit.text[: 4 * LONGEST]
    data = text.encode("utf-8")
    note = parse(data)
    # An event is known by what it is; a passage has the event that it hangs under.
    known = (hit.action, hit.arguments, hit.result, 1)
    here = [e for e in note.events if (e.action, e.arguments, e.result, e.line) == known]
    if here:
        event = here[0]
        # Of two events on a line, each has what stands before it and behind the other.
        start = max((e.end for e in note.events if e.end <= event.start), default=0)
        before = _BULLET.sub("", data[start : event.start].decode("utf-8", "replace")).strip()
        before = before if re.search(r"\w", before) else ""
        text = "\n".join(part for part in (before, event.body) if part)
    lines = (_BULLET.sub("", line).strip() for line in text.splitlines())
    short = " · ".join(line for line in lines if line)
    short = short if len(short) <= LONGEST else f"{short[:LONGEST]}…"
    keys = dict.fromkeys([*hit.keys, *(c.key for c in (*note.citations, *note.mentions))])
    return Told(bool(here), short, tuple(keys))


class Places:
    """Where on the page a thing is: a note's text, a source, a picture."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.sources: Mapping[str, Entry] = {}

    def title(self, key: str) -> str | None:
        """What a citation shows on hover; None where the bibliography lacks it."""
        entry = self.sources.get(key)
        return entry and f"{entry.title} · {', '.join(entry.authors)} · {entry.year}"

    def of(self, note: str, *, figures: bool = True) -> View:
        """For the text of a note: what its relative paths mean; `figures` are drawn or named."""
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
        """The address of a picture; None where there is none in the log's folders."""
        real, root = picture(self.log, path), self.log.settings.root.resolve()
        if real is None or not real.is_relative_to(root):
            return None
        return f"/figure/{quote(real.relative_to(root).as_posix())}"

    def note(self, path: Path) -> str | None:
        """The address of the note in a file; None where the log has no such note."""
        for file in (path, path.with_name(f"{path.name}.md"), path / "note.md"):
            rows = self.log.database.rows(
                "SELECT note FROM files WHERE path = ?", str(Path(*_normal(file.parts)))
            )
            if rows:
                return address(rows[0][0])
        return None


def _normal(parts: Iterable[str]) -> list[str]:
    """A path's parts without `.` and `..`, as the index knows it."""
    kept: list[str] = []
    for part in parts:
        if part == ".." and len(kept) > 1:
            kept.pop()
        elif part != ".":
            kept.append(part)
    return kept


def _local(folder: Path, target: str) -> Path | None:
    """The file that a relative target means; None for an address or an absolute path."""
    try:
        parts = urlsplit(target)
    except ValueError:  # such as http://[
        return None
    path = unquote(parts.path)
    if parts.scheme or parts.netloc or not path or path.startswith(("/", "\\")) or "\0" in path:
        return None
    return folder / path


def picture(log: Log, path: Path) -> Path | None:
    """The file of a picture in the log's folders; None for any other file, or none at all."""
    try:
        real = path.resolve()
        own = any(real.is_relative_to(folder.resolve()) for folder in log.settings.folders)
        # A link out of the folders was followed by resolve(), and is out.
        return real if own and real.suffix.lower() in IMAGES and real.is_file() else None
    except (OSError, RuntimeError):  # a name too long, a loop of links
        return None


def environment(places: Places) -> Environment:
    """The templates; everything is escaped that is not our own markup."""
    made = Environment(
        loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    plain = View(places.title, web, lambda target: None)

    def md(text: str, keys: Collection[str] = (), note: str = "") -> Markup:
        return inline(text, places.of(note, figures=False) if note else plain, keys)

    made.filters |= {"at": address, "day": day, "told": told, "md": md, "path": quote}
    made.filters["badge"] = lambda action: badge(action, action)
    made.filters["titles"] = lambda hit: [
        places.sources[key].title
        for key in hit.keys
        if key in places.sources and key in (hit.arguments or "")
    ]
    made.filters["unknown"] = lambda key: UNKNOWN[is_name(key)]
    made.filters["begun"] = lambda text: text[:1].upper() + text[1:]
    made.filters["filename"] = lambda path: Path(path).name
    return made
