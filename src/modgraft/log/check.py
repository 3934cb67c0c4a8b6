"""Check notes for problems and fix them: `modgraft log check`.

An error is certain: text that cannot be read, wrong arithmetic, a file that does not exist, a
misspelt citation key. A warning may be intended: a source that is not in the bibliography yet, an
unknown word where an action is expected. The rest is information. No network is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from difflib import SequenceMatcher
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from modgraft.core.errors import MissingFileError, ModgraftError, UnknownNameError
from modgraft.log.index.bibliography import Bibliography, Broken
from modgraft.log.index.find_notes import find_notes
from modgraft.log.settings import Settings, read_table, settings
from modgraft.log.syntax.actions import ACTIONS, Actions
from modgraft.log.syntax.note import Citation, Diagnostic, Event, Fix, Note, Severity
from modgraft.log.syntax.parse import parse

if TYPE_CHECKING:
    from modgraft.log.index.index import Index

CODES = {
    "encoding": "bytes that are not UTF-8",
    "nul": "NUL bytes",
    "long-line": "a line too long to look for events in",
    "unreadable": "a file or folder that cannot be read",
    "calculate": "arithmetic that does not hold, or is none",
    "dead-figure": "a figure that is not there",
    "dead-link": "a file that is not there",
    "near-key": "a key one slip away from one in the bibliography",
    "missing-key": "a key that is not in the bibliography",
    "key-without-at": "a key of the bibliography without @",
    "handle": "an @name that has no year, and is in no bibliography",
    "no-bibliography": "citations, and no bibliography",
    "bibliography": "a broken entry, or one that is there twice",
    "unknown-action": "nearly an action",
    "unclosed": "an event without its closing bracket",
    "arrow": "a result without ->",
    "nesting": "events in events, too deep",
    "fence": "a code fence that never closes",
    "mojibake": "text saved in the wrong encoding",
    "link": "a link without a target, or with a key as one; a folder reached twice",
    "file-link": "a link to file://",
    "empty-section": "a section with nothing in it",
}
"""Code → the problem that `check` reports under it."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:|//|#")
_YEAR = re.compile(r"\d{4}[a-z]?\Z")
_TYPO = 0.9  # how similar two keys are if one is a misspelling of the other


def check(
    log: Index | str | Path | Iterable[str | Path],
    bibliography: Bibliography | None = None,
    *,
    actions: Actions | None = None,
) -> list[Diagnostic]:
    """Find all problems of a log, a folder, or some notes and folders, by file and line.

    Args:
        log: An open log, or paths.
        bibliography: The sources; left out, those that the project names or the folders hold.
        actions: The table of actions; left out, the project's.

    Raises:
        MissingFileError: a path that does not exist.
    """
    project, files, folders = _scope(log)
    found = find_notes(folders)
    out = [replace(one, note=shown(one.note or "")) for one in found.problems]
    if bibliography is None:
        named = project.bibliography
        if named is None:
            near = find_notes(project.folders) if files else found
            named = tuple(Path(one.path) for one in near.bibliographies)
        bibliography = Bibliography.read([one for one in named if _opens(one, out)])
    actions = actions or ACTIONS.extended(project.actions)
    link_roots, nearest = roots(project), dict[str, str | None]()
    for path in dict.fromkeys([*files, *(Path(one.path) for one in found.notes)]):
        name = shown(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            out.append(Diagnostic("error", "unreadable", str(error.strerror), 1, 0, 0, name))
            continue
        note = parse(data, name, actions)
        digest = blake2b(data, digest_size=16).digest()
        problems = check_note(note, path, bibliography, link_roots, nearest)
        out += (replace(one, digest=digest) for one in problems)
    out += (_broken(one) for one in bibliography.broken)
    return sorted(out, key=lambda one: (one.note or "", one.line, one.start))


def check_note(
    note: Note,
    path: Path,
    bibliography: Bibliography,
    roots: tuple[Path, ...] = (),
    nearest: dict[str, str | None] | None = None,
) -> list[Diagnostic]:
    """Find the problems of one note that lies (or will lie) at `path`.

    `roots` are folders that a link may be relative to, besides the note's folder. `nearest` caches
    the most similar key of each missing key, which takes long to find, from note to note.
    """
    out = [*note.diagnostics]
    out += _links(note, (path.parent, *roots))
    out += _citations(note, bibliography, {} if nearest is None else nearest)
    return sorted((replace(one, note=note.name) for one in out), key=lambda one: one.start)


def shown(path: str | Path) -> str:
    """Return a path for messages: relative if it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


# -- what to check -------------------------------------------------------------------------------


def _scope(
    log: Index | str | Path | Iterable[str | Path],
) -> tuple[Settings, list[Path], tuple[Path, ...]]:
    """Return the settings of what is to be checked, its single notes and its folders."""
    project = None
    if isinstance(log, (str, Path)):
        paths = [Path(log)]
    elif isinstance(log, Iterable):
        paths = [Path(one) for one in log]
    else:
        project, paths = log.settings, list(log.settings.folders)
    for path in paths:
        if not path.exists():
            remedy = "Name a note or a folder that holds notes"
            raise MissingFileError("there is no such note or folder", file=path, remedy=remedy)
    files = [path for path in paths if not path.is_dir()]
    folders = tuple(path for path in paths if path.is_dir())
    if project is None:  # a note by itself belongs to the folder it lies in
        project = settings(*folders, *dict.fromkeys(file.absolute().parent for file in files))
    return project, files, folders


def roots(project: Settings) -> tuple[Path, ...]:
    """Return the folders that links may be relative to: the project, the log, its folders."""
    named, _ = read_table(project.root)
    above = (named.parent,) if named else ()
    return tuple(dict.fromkeys((*above, project.root, *project.folders)))


def _opens(path: Path, problems: list[Diagnostic]) -> bool:
    try:
        path.open("rb").close()
    except OSError as error:
        said = str(error.strerror)
        problems.append(Diagnostic("error", "unreadable", said, 1, 0, 0, shown(path)))
        return False
    return True


def _broken(one: Broken) -> Diagnostic:
    """Turn a bibliography's problem into a diagnostic: duplicates are warnings, the rest errors."""
    twice = "twice" in one.reason or "is already in" in one.reason
    severity: Severity = "warning" if twice else "error"
    return Diagnostic(severity, "bibliography", one.reason, one.line, 0, 0, shown(one.file))


# -- links -----------------------------------------------------------------------------------------


def _links(note: Note, folders: tuple[Path, ...]) -> Iterator[Diagnostic]:
    for link in (*note.links, *note.figures):
        target = link.target
        place = (link.line, link.start, link.end)
        if target.casefold().startswith("file:"):
            said = f"{target} points into one machine; write a path relative to the note"
            yield Diagnostic("warning", "file-link", said, *place)
            continue
        if getattr(link, "kind", "inline") != "inline" or _SCHEME.match(target):
            continue
        if target.startswith("@"):
            said = f"{target} stands where a link has its target; did you mean ({target}) in […]?"
            yield Diagnostic("warning", "link", said, *place)
            continue
        if not target:
            yield Diagnostic("warning", "link", "a link without a target", *place)
            continue
        if not any(found_at(folder, target) for folder in folders):
            what = "figure" if hasattr(link, "alt") else "file"
            said = f"there is no {what} {target}"
            yield Diagnostic("error", f"dead-{'link' if what == 'file' else what}", said, *place)


def found_at(folder: Path, target: str) -> Path | None:
    """Find the file of a link's target, as it is written or without its anchor and escapes."""
    plain = unquote(re.split(r"[#?]", target, maxsplit=1)[0])
    for name in (target, plain):
        try:
            if name and (folder / name).exists():
                return folder / name
        except (OSError, ValueError):  # a name too long, or with a NUL: no file has it
            continue
    return None


# -- citations -------------------------------------------------------------------------------------


def _citations(
    note: Note, bibliography: Bibliography, nearest: dict[str, str | None]
) -> Iterator[Diagnostic]:
    if not bibliography.entries:
        if note.citations:
            first = note.citations[0]
            said = f"{len(note.citations)} citations and no bibliography; add a .bib to the folder"
            yield Diagnostic("info", "no-bibliography", said, first.line, first.start, first.end)
        return
    for one in note.citations:
        if one.key not in bibliography:
            if one.key not in nearest:
                nearest[one.key] = next(iter(bibliography.nearest(one.key)), None)
            yield _missing(one, nearest[one.key])
    for one in note.mentions:
        if one.key in bibliography:
            yield _without_at(one)
    for event in note.events:
        yield from _arguments(event, bibliography)


def _missing(one: Citation, near: str | None) -> Diagnostic:
    place = (one.line, one.start, one.end)
    said = f"@{one.key} is not in the bibliography"
    if near and _is_typo(one.key, near):
        fix = Fix(one.start + 1, one.end, near.encode(), f"write @{near}")
        return Diagnostic("error", "near-key", f"{said}; did you mean @{near}?", *place, fix=fix)
    if not re.search(r"\d", one.key):
        said = f"@{one.key} is in no bibliography and has no year: a person's handle?"
        return Diagnostic("info", "handle", said, *place)
    more = f"; the nearest is @{near}" if near else "; add its entry"
    return Diagnostic("warning", "missing-key", said + more, *place)


def _is_typo(key: str, other: str) -> bool:
    """Return whether one key misspells the other; if only the years differ, it may be another
    source."""
    if _YEAR.sub("", key) == _YEAR.sub("", other):
        return False
    return SequenceMatcher(None, key.casefold(), other.casefold()).ratio() >= _TYPO


def _without_at(one: Citation) -> Diagnostic:
    said = f"{one.key} is a key of the bibliography; write @{one.key} to cite it"
    fix = Fix(one.start, one.start, b"@", f"write @{one.key}")
    return Diagnostic("warning", "key-without-at", said, one.line, one.start, one.end, fix=fix)


def _arguments(event: Event, bibliography: Bibliography) -> Iterator[Diagnostic]:
    """Report keys without `@` that only the bibliography shows to be keys: `[read(smith2020)]`."""
    if event.action not in ("skim", "read") or event.inside is None or event.keys:
        return
    inside = event.source.data[slice(*event.inside)]
    for word in re.finditer(rb"[^\s,;]+", inside):
        key = word[0].decode("utf-8", "replace")
        if key in bibliography:
            start = event.inside[0] + word.start()
            yield _without_at(Citation(key, event.line, start, start + len(word[0]), False))


# -- fixes -----------------------------------------------------------------------------------------


def apply_fixes(
    diagnostics: Iterable[Diagnostic],
    codes: Iterable[str] | None = None,
    ask: Callable[[Diagnostic], bool] | None = None,
) -> list[Diagnostic]:
    """Apply the fixes of problems, file by file, and return the problems that were fixed.

    Only the bytes of a fix change. A file is written completely or not at all. Of two fixes that
    overlap the first is applied; check again for the other.

    Args:
        diagnostics: What `check` returned.
        codes: Which problems to fix (`mojibake`, `near-key`, …); left out, all.
        ask: Decides about each fix; left out, all are applied.

    Raises:
        UnknownNameError: a code that does not exist.
        ModgraftError: a file that changed since it was checked, or cannot be written.
    """
    wanted = None if codes is None else set(codes)
    for code in wanted or ():
        if code not in CODES:
            raise UnknownNameError.among("code", code, CODES)
    by_file: dict[str, list[Diagnostic]] = {}
    for one in diagnostics:
        if one.fix and one.note and (wanted is None or one.code in wanted):
            by_file.setdefault(one.note, []).append(one)
    fixed: list[Diagnostic] = []
    for name, problems in by_file.items():
        chosen = _disjoint(one for one in problems if ask is None or ask(one))
        if chosen:
            _fix(Path(name), chosen)
            fixed += chosen
    return fixed


def _disjoint(problems: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Return the problems whose fixes do not overlap, in order."""
    out: list[Diagnostic] = []
    end = -1
    fixes = [(one.fix.start, one.fix.end, one) for one in problems if one.fix]
    for start, stop, one in sorted(fixes, key=lambda fix: fix[:2]):
        if start >= end and (start, stop) != (end, end):
            out.append(one)
            end = stop
    return out


def _fix(path: Path, problems: list[Diagnostic]) -> None:
    from modgraft.log.record.editing import rewrite

    def change(data: bytes) -> bytes:
        if blake2b(data, digest_size=16).digest() != problems[0].digest:
            raise ModgraftError(
                f"{path}: changed since it was checked; nothing is written. Check again"
            )
        pieces, at = [], 0
        for one in problems:
            if one.fix:
                pieces += [data[at : one.fix.start], one.fix.replacement]
                at = one.fix.end
        return b"".join([*pieces, data[at:]])

    rewrite(path, change)
