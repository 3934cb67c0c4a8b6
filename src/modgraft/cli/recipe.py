"""``modgraft recipe``: run an experiment over several seeds, and show its results."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from modgraft.cli.options import (
    JOBS,
    Change,
    Fresh,
    Jobs,
    Note,
    Seeds,
    Wide,
    changes,
    seeds_of,
    stoppable,
)
from modgraft.core.errors import ModgraftError

if TYPE_CHECKING:
    from modgraft.recipes.trials import Recipe


def recipe(
    name: Annotated[str | None, typer.Argument(help="The recipe; none: list them.")] = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder; none: runs/NAME.")] = None,
    seeds: Seeds = "0,1,2",
    jobs: Jobs = JOBS,
    quick: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="A share of the data and of the steps.")
    ] = 1.0,
    change: Change = None,
    fresh: Fresh = False,
    note: Note = True,
    wide: Wide = False,
    sample: Annotated[
        str | None, typer.Option(help="Train nothing: write on from this text, by the run's model.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 500,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, help="Choose among so many of the likeliest tokens; 0: all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Choose among those of this probability.")
    ] = 1.0,
) -> None:
    """Run a recipe over seeds; an interrupted run goes on where it stopped.

    The run's folder then holds results.json, table.md, plot.png and a note for the log.

    [bold]Examples[/bold]

      modgraft recipe                                       what there is

      modgraft recipe madx --seeds 0,1,2

      modgraft recipe madx --quick 0.1 --seeds 0 --run runs/look

      modgraft recipe chargpt --set corpus=shakespeare.txt

      modgraft recipe chargpt --sample "def main(" --temperature 0.6 --seeds 1
    """
    from modgraft.recipes import trials

    console = Console()
    if name is None:
        for known in trials.NAMES:
            console.print(
                f"[bold]{known}[/bold]  {trials.find_recipe(known).title}", highlight=False
            )
        return
    found = trials.find_recipe(name)
    if sample is not None:
        how = {"tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        _write(found, run or Path("runs") / name, sample, how | {"seed": seeds_of(seeds)[0]})
        return
    settings = found.settings if quick == 1 else found.smaller(quick)
    settings = replace(settings, **changes(settings, change or []))
    folder = run or Path("runs") / name
    with stoppable():
        trials.run(
            found, folder, settings, seeds_of(seeds), jobs=jobs, fresh=fresh, console=console,
            note=note,
        )  # fmt: skip
    trials.show(folder, console, wide=wide)
    console.print(f"\nPicture: {folder / 'plot.png'}", highlight=False, soft_wrap=True)


def _write(found: "Recipe", folder: Path, text: str, how: dict[str, Any]) -> None:
    """Write on from a text to standard output, as it comes."""
    if found.sample is None:
        raise ModgraftError(f"--sample: the models of {found.name} write no text; chargpt's do")
    for number, piece in enumerate(found.sample(folder, text, **how)):
        sys.stdout.write(piece if number else text + piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
