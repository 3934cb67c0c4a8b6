"""The notes that runs write of themselves: ``note.md`` in the run's folder.

What was run, on what, command, commit, versions and settings stand under Context, what was done
under Done, results with their spread and controls under Learned; the Log has an event for every
time the run was started, broke off and ended, and is only ever added to. A person may write into
the note: a line is replaced only where it is one that the run wrote, known by its label.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from modgraft.log.record import provenance

NOTE = "note.md"
"""The note's name in a run's folder."""

LONGEST = 400
"""Characters of an error's message that go into a note; the whole is in the run's log."""

_part: ContextVar[bool] = ContextVar("part_of_a_run", default=False)


@contextmanager
def part_of_a_run() -> Iterator[None]:
    """In this block runs write no note of their own: they are part of one that does."""
    token = _part.set(True)
    try:
        yield
    finally:
        _part.reset(token)


@dataclass
class RunNote:
    """What a run has to say of itself; it is written when the run ends, whole.

    Attributes:
        headline: one sentence, the result; it becomes the note's tl;dr.
        context, done, learned: label → what is said under it, a line each.
        figures: file → what it shows; files that are not there are left out.
        seconds: how long the run took, all its parts; None: as long as this one.
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

    The run is worth more than its note: where the note cannot be written, a warning says so and
    the run goes on.

    Args:
        folder: the run's; None: there is no note.
        project: what the Log calls the run, such as ``mmcot``.
        about: fills in ``context``; called at the beginning.
        result: fills in the rest; called where the block ended without an error.
        wanted: False: there is no note.

    Raises:
        Nothing of its own; what the block raises is recorded and raised again.
    """
    if folder is None or not wanted or _part.get():
        yield
        return
    path, name = Path(folder) / NOTE, _name(project)
    began, said = time.monotonic(), RunNote()
    with _loudly(path):
        if about is not None:
            about(said)
        _begin(path, name, said)
    try:
        with part_of_a_run():
            yield
    except BaseException as error:
        with _loudly(path):
            _break(path, error, time.monotonic() - began)
        raise
    with _loudly(path):
        if result is not None:
            result(said)
        _end(path, name, said, time.monotonic() - began)


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
    """Write the note of a run that is over; its path. For runs of one's own, see `RunNote`."""
    path, name = Path(folder) / NOTE, _name(project)
    said = RunNote(
        headline, dict(context or {}), dict(done or {}), dict(learned or {}),
        dict(figures or {}), seconds,
    )  # fmt: skip
    _begin(path, name, said)
    _end(path, name, said, 0.0 if seconds is None else seconds)
    return path


@contextmanager
def _loudly(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001  (a run is not lost over its note, and it is said)
        why = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"{path}: the run's note could not be written ({why}). The run and its results are "
            "not concerned", stacklevel=4,
        )  # fmt: skip


# -- the three moments -------------------------------------------------------------------------


def _begin(path: Path, name: str, said: RunNote) -> None:
    from modgraft.log.record.editing import append, empty
    from modgraft.log.record.writing import create, rewrite
    from modgraft.log.syntax.parse import parse

    if not path.exists():
        create(path, empty().encode())
    command, commit = provenance.command(), provenance.commit()
    context = {
        "Run": name,
        **said.context,
        "Command": code(command),
        "Commit": commit,
        "Versions": provenance.versions(),
    }

    def change(data: bytes) -> bytes:
        before = [e for e in parse(data, str(path)).events if e.section == "Log"]
        ours = {"start": name, "return": name}  # a person may have started something else here
        told = [e.action for e in before if e.arguments == ours.get(e.action, e.arguments)]
        told = [action for action in told if action in (*ours, "interrupt")]
        lines = []
        if told and told[-1] == "start":
            lines.append("- [interrupt(killed)]: the run before ended without a word")
        again = (" -> again" if told[-1] == "return" else " -> resumed") if told else ""
        lines.append(f"- [start({name}){again}] {provenance.moment()}: {code(command)}")
        lines.append(f"  - commit {commit}")
        data = _labelled(data, "Context", context, path)
        return append(data, "Log", lines, str(path))

    rewrite(path, change)


def _end(path: Path, name: str, said: RunNote, seconds: float) -> None:
    from modgraft.log.record.editing import append
    from modgraft.log.record.writing import rewrite

    total = seconds if said.seconds is None else said.seconds
    took = provenance.lasted(total)
    headline = plain(said.headline) or "done"
    done = {**said.done, "Duration": took}
    shown = [
        f"  - ![{plain(text)}]({file.relative_to(path.parent).as_posix()})"
        for file, text in said.figures.items()
        if file.is_file()
    ]

    def change(data: bytes) -> bytes:
        data = _labelled(data, "tl;dr", {f"Run of {name}": headline}, path, item="")
        data = _labelled(data, "Done", done, path)
        data = _labelled(data, "Learned", said.learned, path)
        event = f"- [return({name}) -> {headline}] {provenance.moment()}, after {took}"
        return append(data, "Log", [event, *shown], str(path))

    rewrite(path, change)


def _break(path: Path, error: BaseException, seconds: float) -> None:
    from modgraft.log.record.editing import append
    from modgraft.log.record.writing import rewrite

    kind, took = type(error).__name__, provenance.lasted(seconds)
    why = plain(str(error)) or "no message"
    event = f"- [interrupt({kind})] {provenance.moment()}, after {took}: {code(why)}"
    rewrite(path, lambda data: append(data, "Log", [event], str(path)))


# -- lines -------------------------------------------------------------------------------------


def _labelled(
    data: bytes, title: str, lines: Mapping[str, str], path: Path, item: str = "- "
) -> bytes:
    """A line a label in a section: where the label stands there, its line is replaced."""
    from modgraft.log.record.editing import append, replace, section
    from modgraft.log.syntax.parse import parse

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
    """A project's name as the argument of an event."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in project).strip("-") or "run"


def plain(text: str, longest: int = LONGEST) -> str:
    """One line that nothing in it makes an event, a link or a citation of."""
    line = " ".join(text.split())
    line = line if len(line) <= longest else f"{line[:longest]} …"
    return line.replace("->", "→").translate(str.maketrans("[]@<>", "()＠‹›"))


def code(text: str) -> str:
    """The text as a code span, whatever it holds."""
    line = " ".join(text.split())
    fence = "``" if "`" in line else "`"
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in a row, the first of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def settings_row(record: Mapping[str, object], leave: Sequence[str] = ()) -> str:
    """Settings in a row, as code."""
    given = {name: value for name, value in record.items() if name not in leave}
    return code(", ".join(f"{name} {value}" for name, value in given.items()))
