"""``modgraft recipe``: run an experiment over several seeds, and show its results."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

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
) -> None:
    """Run a recipe over seeds; an interrupted run goes on where it stopped.

    The run's folder then holds results.json, table.md, plot.png and a note for the log.

    [bold]Examples[/bold]

      modgraft recipe                                       what there is

      modgraft recipe madx --seeds 0,1,2

      modgraft recipe madx --quick 0.1 --seeds 0 --run runs/look
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
