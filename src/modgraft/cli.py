"""The command line: parse, call, print. What takes long to import is imported where it is used."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Modular deep learning on one ordinary machine: implant modules in a frozen host, train, "
    "compose, store and share them.",
)
mmcot = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Multimodal chain of thought: T5 with gated image fusion, in two stages.",
)
app.add_typer(mmcot, name="mmcot")

JOBS = min(2, os.cpu_count() or 1)
Run = Annotated[Path, typer.Option(help="The run's folder.")]
Seeds = Annotated[str, typer.Option(help="Seeds, as 0 or 0,1,2.")]
Rows = Annotated[
    str, typer.Option(help="Rows of the table: demo, all, or keys as fused,text,modular.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Processes side by side, one thread each.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on without bad records; list them.")]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Set up what every command shares."""
    if version:
        from modgraft import __version__

        typer.echo(__version__)
        raise typer.Exit


@mmcot.command("train")
def mmcot_train(
    run: Run = Path("runs/mmcot"),
    rows: Rows = "demo",
    seeds: Seeds = "0",
    jobs: Jobs = JOBS,
    data: Annotated[
        str, typer.Option(help="digits (nothing to download), or a folder in ScienceQA's format.")
    ] = "digits",
    features: Annotated[
        str | None,
        typer.Option(help="For a folder: .npy or .safetensors features, or a vision model."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A pretrained T5, folder or hub name; none: a small new one.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps of every net, for both stages.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Questions in a batch.")] = None,
    quick: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="A share of questions and steps, for a look.")
    ] = 1.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the run's folder first.")] = False,
    skip_bad: SkipBad = False,
) -> None:
    """Train and test the recipe; an interrupted run goes on where it stopped.

    [bold]Examples[/bold]

      modgraft mmcot train                                  the demo, about ten minutes

      modgraft mmcot train --rows all --seeds 0,1,2 --run runs/table

      modgraft mmcot train --data ScienceQA/data --features vit.npy --model t5-base
    """
    from dataclasses import replace

    from modgraft.recipes.mmcot import SCIENCEQA, Settings, smaller
    from modgraft.recipes.mmcot_run import run as run_recipe

    base = Settings() if data == "digits" else SCIENCEQA
    settings = replace(base, data=data, features=features, model=model, skip_bad=skip_bad)
    if steps is not None:
        settings = replace(settings, steps_rationale=steps, steps_answer=steps)
    if batch is not None:
        settings = replace(settings, batch=batch)
    if quick < 1:
        settings = smaller(settings, quick)
    if fresh:
        _delete(run)
    chosen = _rows(rows)
    console = Console()
    run_recipe(run, settings, chosen, _seeds(seeds), jobs=jobs, console=console)
    _show(run, console)


@mmcot.command("evaluate")
def mmcot_evaluate(
    run: Run = Path("runs/mmcot"),
    rows: Rows = "",
    seeds: Seeds = "",
    jobs: Jobs = JOBS,
) -> None:
    """Decode and score a trained run's test questions again, and write its report anew.

    [bold]Example[/bold]

      modgraft mmcot evaluate --run runs/mmcot --rows fused,shuffled
    """
    from modgraft.files import read_json
    from modgraft.recipes.mmcot_run import run as run_recipe
    from modgraft.recipes.mmcot_run import settings_of

    settings, console = settings_of(run), Console()
    asked = read_json(run / "run.json", what="a run", remedy="modgraft mmcot train")
    chosen = _rows(rows) if rows else asked["rows"]
    which = _seeds(seeds) if seeds else asked["seeds"]
    run_recipe(run, settings, chosen, which, jobs=jobs, evaluate_only=True, console=console)
    _show(run, console)


@mmcot.command("ask")
def mmcot_ask(
    image: Annotated[str, typer.Argument(help="An image file, or - for a question without one.")],
    question: Annotated[str, typer.Argument(help="The question.")],
    choices: Annotated[list[str], typer.Argument(help="The options, two or more.")],
    hint: Annotated[str, typer.Option(help="Text that goes with the question.")] = "",
    run: Run = Path("runs/mmcot"),
    seed: Annotated[int | None, typer.Option(help="Which of the run's seeds.")] = None,
) -> None:
    """Ask a trained run one question; it prints its rationale and its answer.

    [bold]Example[/bold]

      modgraft mmcot ask strip.png "What is the left digit?" 3 5 8
    """
    from modgraft.recipes.mmcot_run import ask

    path = None if image == "-" else Path(image)
    rationale, text, choice = ask(run, path, question, choices, hint, seed)
    console = Console(highlight=False)
    console.print("[bold]Rationale[/bold]", end=" ")
    console.print(rationale, markup=False)
    console.print("[bold]Answer[/bold]", end=" ")
    if choice is None:
        console.print(f"none of the options (it wrote: {text})", markup=False)
        raise typer.Exit(2)
    console.print(f"({chr(65 + choice)}) {choices[choice]}", markup=False)


@app.command("report")
def report(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    readme: Annotated[
        Path | None, typer.Option(help="Put the table between this page's result markers.")
    ] = None,
    name: Annotated[str, typer.Option(help="Which markers: <!-- results:NAME -->.")] = "mmcot",
) -> None:
    """Write a run's report again; with --readme, also the table that a page shows.

    [bold]Example[/bold]

      modgraft report runs/table --readme README.md
    """
    from modgraft.report import families, insert, read_results, table, write

    page = write(run)
    text = f"{table(run)}\n\nBy family:\n\n{families(read_results(run / 'results.json'))}"
    if readme is not None:
        insert(readme, name, text)
    typer.echo(text)
    typer.echo(f"\nReport: {page}")


def _rows(text: str) -> list[str]:
    from modgraft.recipes.mmcot import DEMO, ROWS

    named = {"demo": list(DEMO), "all": list(ROWS)}
    return named.get(text) or [part.strip() for part in text.split(",") if part.strip()]


def _seeds(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: write seeds as 0 or 0,1,2") from error


def _delete(run: Path) -> None:
    import shutil

    from modgraft.errors import DataError

    if run.exists() and not (run / "run.json").is_file():
        raise DataError(
            "--fresh deletes runs only, and this folder holds none", file=run,
            remedy="Take another --run, or delete it yourself",
        )  # fmt: skip
    shutil.rmtree(run, ignore_errors=True)


def _show(run: Path, console: Console) -> None:
    from modgraft.report.terminal import show

    show(run, console)
    console.print(f"\nReport: {run / 'report.html'}", highlight=False)


def entry() -> None:
    """What the ``modgraft`` command runs: errors are one line for people, not a traceback."""
    from modgraft.errors import ModgraftError

    try:
        app()
    except ModgraftError as error:
        Console(stderr=True).print(f"[red]error:[/red] {_escaped(str(error))}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where it was")
        sys.exit(130)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
