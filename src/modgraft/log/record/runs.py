"""Record runs automatically: each writes ``note.md`` in its folder.

The data, command, commit, versions and settings stand under Context, the work under Done, results
with their spread and controls under Learned. The Log gets an event each time the run is started,
breaks off or ends, and nothing in it is changed. A person may write into the note too: only lines
that a run wrote, recognised by their label, are replaced.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from modgraft.core.errors import warn
from modgraft.log.record.editing import append, create, empty, replace, rewrite, section
from modgraft.log.syntax.parse import parse

NOTE = "note.md"
"""The note's name in a run's folder."""

LONGEST = 400
"""Characters of an error's message that go into a note."""

PACKAGES = ("modgraft", "torch", "transformers", "numpy")
"""Packages whose versions a note states if they are installed; none is imported for it."""

GIT_TIMEOUT = 10.0
"""Seconds to wait for git."""

_part: ContextVar[bool] = ContextVar("part_of_a_run", default=False)


@contextmanager
def part_of_a_run() -> Iterator[None]:
    """Let the runs in this block write no note: they are part of a run that does."""
    token = _part.set(True)
    try:
        yield
    finally:
        _part.reset(token)


@dataclass
class RunNote:
    """The content of a run's note, which is written when the run ends.

    Attributes:
        headline: the result in one sentence; it becomes the note's tl;dr.
        context, done, learned: label → text, one line each.
        figures: file → caption; files that do not exist are left out.
        seconds: the run's duration over all its parts; None: as measured here.
    """

    headline: str = ""
    context: dict[str, str] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    learned: dict[str, str] = field(default_factory=dict)
    figures: dict[Path, str] = field(default_factory=dict)
    seconds: float | None = None


Describe = Callable[[RunNote], None]


@contextmanager
def recorded(
    folder: str | Path | None,
    project: str,
    about: Describe | None = None,
    result: Describe | None = None,
    *,
    wanted: bool = True,
) -> Iterator[None]:
    """Record the run in this block as a note in its folder.

    If the note cannot be written, a warning says so and the run goes on. An exception in the block
    is recorded and raised again.

    Args:
        folder: the run's folder; None: no note is written.
        project: the run's name in the Log, such as ``mmcot``.
        about: fills in ``context``; called at the beginning.
        result: fills in the rest; called if the block ends without an error.
        wanted: False: no note is written.
    """
    if folder is None or not wanted or _part.get():
        yield
        return
    path, name = Path(folder) / NOTE, _name(project)
    began, note = time.monotonic(), RunNote()
    with _warn_on_error(path):
        if about is not None:
            about(note)
        _begin(path, name, note)
    try:
        with part_of_a_run():
            yield
    except BaseException as error:
        with _warn_on_error(path):
            _break(path, error, time.monotonic() - began)
        raise
    with _warn_on_error(path):
        if result is not None:
            result(note)
        _end(path, name, note, time.monotonic() - began)


def write_run(
    folder: str | Path,
    project: str,
    *,
    headline: str,
    context: Mapping[str, str] | None = None,
    done: Mapping[str, str] | None = None,
    learned: Mapping[str, str] | None = None,
    figures: Mapping[Path, str] | None = None,
    seconds: float | None = None,
) -> Path:
    """Write the note of a finished run, and return its path; see `RunNote` for the arguments."""
    path, name = Path(folder) / NOTE, _name(project)
    note = RunNote(
        headline, dict(context or {}), dict(done or {}), dict(learned or {}),
        dict(figures or {}), seconds,
    )  # fmt: skip
    _begin(path, name, note)
    _end(path, name, note, 0.0 if seconds is None else seconds)
    return path


@contextmanager
def _warn_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  (a run must not fail over its note; a warning tells)
        why = f"{type(error).__name__}: {error}"
        warn(
            f"{path}: the run's note could not be written ({why}). The run and its results are "
            "not concerned",
        )  # fmt: skip


# -- start, end, interruption -------------------------------------------------------------------


def _begin(path: Path, name: str, note: RunNote) -> None:
    if not path.exists():
        create(path, empty().encode())
    ran, at_commit = code(command()), commit()
    context = {
        "Run": name,
        **note.context,
        "Command": ran,
        "Commit": at_commit,
        "Versions": versions(),
    }

    def change(data: bytes) -> bytes:
        before = [e for e in parse(data, str(path)).events if e.section == "Log"]
        ours = {"start": name, "return": name}  # a person may have started something else here
        events = [e.action for e in before if e.arguments == ours.get(e.action, e.arguments)]
        events = [action for action in events if action in (*ours, "interrupt")]
        lines = []
        if events and events[-1] == "start":
            lines.append("- [interrupt(killed)]: the run before ended without a word")
        again = (" -> again" if events[-1] == "return" else " -> resumed") if events else ""
        lines.append(f"- [start({name}){again}] {moment()}: {ran}")
        lines.append(f"  - commit {at_commit}")
        data = _labelled(data, "Context", context, path)
        return append(data, "Log", lines, str(path))

    rewrite(path, change)


def _end(path: Path, name: str, note: RunNote, seconds: float) -> None:
    total = seconds if note.seconds is None else note.seconds
    took = duration(total)
    headline = plain(note.headline) or "done"
    done = {**note.done, "Duration": took}
    shown = [
        f"  - ![{plain(text)}]({file.relative_to(path.parent).as_posix()})"
        for file, text in note.figures.items()
        if file.is_file()
    ]

    def change(data: bytes) -> bytes:
        data = _labelled(data, "tl;dr", {f"Run of {name}": headline}, path, item="")
        data = _labelled(data, "Done", done, path)
        data = _labelled(data, "Learned", note.learned, path)
        event = f"- [return({name}) -> {headline}] {moment()}, after {took}"
        return append(data, "Log", [event, *shown], str(path))

    rewrite(path, change)


def _break(path: Path, error: BaseException, seconds: float) -> None:
    kind, took = type(error).__name__, duration(seconds)
    why = plain(str(error)) or "no message"
    event = f"- [interrupt({kind})] {moment()}, after {took}: {code(why)}"
    rewrite(path, lambda data: append(data, "Log", [event], str(path)))


# -- where a run comes from: nothing of this is needed to run -------------------------------------


def moment() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def command() -> str:
    """Return the command line of this process, with the program's name instead of its path."""
    program, *arguments = sys.argv or ["python"]
    name = Path(program).name
    if name in ("", "-", "-c"):
        return "python"
    if name == "ipykernel_launcher.py":  # its arguments are paths of this machine
        return "a notebook"
    if name == "__main__.py":
        name = f"python -m {Path(program).parent.name}"
    return " ".join([name, *map(shlex.quote, arguments)])


def commit() -> str:
    """Return the commit of the working directory, and whether files differ from it."""
    found = _git("rev-parse", "HEAD")
    if found is None:
        return "not known: git sees no repository with a commit here"
    changed = _git("status", "--porcelain", "--untracked-files=no")
    if changed is None:
        return f"{found[:12]}, and git did not say whether the tree differs from it"
    files = len(changed.splitlines())
    what = "1 file" if files == 1 else f"{files} files"
    return f"{found[:12]}, " + (f"with changes in {what}" if files else "tree clean")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            capture_output=True, text=True, errors="replace", timeout=GIT_TIMEOUT, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> str:
    """Return the versions of Python and of `PACKAGES`."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def duration(seconds: float) -> str:
    """Format a duration: ``9.5 s``, ``12.0 min``, ``2.5 h``."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


# -- lines -------------------------------------------------------------------------------------


def _labelled(
    data: bytes, title: str, lines: Mapping[str, str], path: Path, item: str = "- "
) -> bytes:
    """Write one line per label to a section, in place of an earlier line with that label."""
    for label, text in lines.items():
        note = parse(data, str(path))
        found, start = section(note, title), f"{item}{plain(label)}: "
        new = f"{start}{' '.join(text.split())}"
        for line in range(found.line + 1, found.end_line + 1):
            if note.line(line).startswith(start):
                data = replace(note, line, new)
                break
        else:
            data = append(data, title, [new], str(path))
    return data


def _name(project: str) -> str:
    """Turn a project's name into an argument of an event."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in project).strip("-") or "run"


def plain(text: str, longest: int = LONGEST) -> str:
    """Put text on one line, without the characters that form events, links or citations."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else f"{line[:longest]} …"
    return line.replace("->", "→").translate(str.maketrans("[]@<>", "()＠‹›"))


def code(text: str) -> str:
    """Format text as a Markdown code span, whatever it holds."""
    line = " ".join(text.split())
    fence = "``" if "`" in line else "`"
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def settings_row(record: Mapping[str, object], leave: Sequence[str] = ()) -> str:
    """Format settings as one line of code, without those in ``leave``."""
    given = {name: value for name, value in record.items() if name not in leave}
    return code(", ".join(f"{name} {value}" for name, value in given.items()))
