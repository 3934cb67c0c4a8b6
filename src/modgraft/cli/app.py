"""The ``modgraft`` command. Each command imports what is slow to import only when it runs."""

import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from modgraft.cli.convert import convert
from modgraft.cli.data import data
from modgraft.cli.diff import diff
from modgraft.cli.hub import hub
from modgraft.cli.inspect import inspect
from modgraft.cli.ladder import ladder
from modgraft.cli.log import ask, log
from modgraft.cli.log_check import check
from modgraft.cli.log_serve import lsp, mcp, page
from modgraft.cli.merge import merge
from modgraft.cli.mmcot import mmcot
from modgraft.cli.options import in_options
from modgraft.cli.recipe import recipe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Modular deep learning on one ordinary machine: implant modules in a frozen host, train, "
    "compose, store and share them.",
)
app.add_typer(mmcot, name="mmcot")
app.command("inspect")(inspect)
app.command("convert")(in_options(convert, format="to"))
app.add_typer(hub, name="hub")
app.add_typer(data, name="data")
app.command("merge")(in_options(merge))
app.command("diff")(in_options(diff))
app.command("recipe")(recipe)
app.command("ladder")(in_options(ladder))
app.add_typer(log, name="log")
app.command("ask")(ask)
log.command("check")(check)
log.command("page")(page)
log.command("mcp")(mcp)
log.command("lsp")(lsp)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Set up what every command shares."""
    if version:
        from modgraft import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command("report")
def report(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    readme: Annotated[
        Path | None, typer.Option(help="Put the table between this page's result markers.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Which markers, <!-- results:NAME -->; none: the recipe's.")
    ] = None,
) -> None:
    """Write a run's report again; with --readme, also the table that a page shows.

    [bold]Example[/bold]

      modgraft report runs/table --readme docs/mmcot.md
    """
    from modgraft.core.files import read_json
    from modgraft.recipes import trials
    from modgraft.recipes.ladder.result import read_ladder, write_ladder
    from modgraft.report import families, insert, read_results, table, write

    asked = read_json(run / "run.json", what="a run", remedy="modgraft mmcot train, or recipe")
    is_ladder = asked.get("recipe") == "ladder"
    is_trials = "recipe" in asked and not is_ladder

    def text() -> str:
        if is_trials:
            return trials.markdown(trials.read_results(run))
        if is_ladder:
            return read_ladder(run).markdown()
        return f"{table(run)}\n\nBy family:\n\n{families(read_results(run / 'results.json'))}"

    if readme is not None:  # first: where that fails, nothing is written
        insert(readme, name or asked.get("recipe", "mmcot"), text())
    if is_trials:
        trials.write_report(run)
    elif is_ladder:
        write_ladder(run, read_ladder(run))
    # also of a run of mmcot that was interrupted
    page = run / "plot.png" if "recipe" in asked else write(run)
    typer.echo(text())
    typer.echo(f"\nReport: {page}")


def entry() -> None:
    """Run the command line; say errors and warnings in a line each, not with lines of source."""
    from modgraft.core.errors import ModgraftError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal of few letters, or half a character
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _line
    try:
        app()
    except ModgraftError as error:
        _say("[red]error:[/red]", str(error))
        sys.exit(1)
    except OSError as error:
        if error.filename is None:  # of no file that was named
            raise
        _say("[red]error:[/red]", f"{error.strerror}: {error.filename}")
        sys.exit(1)


def _line(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {message}\n"


def _say(what: str, text: str) -> None:
    Console(stderr=True).print(f"{what} {escape(text)}", highlight=False, soft_wrap=True)
