"""``modgraft ladder``: how much of a model has to change for a task, within a budget."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from modgraft.cli.options import Fresh, Note, Wide, stoppable
from modgraft.core.errors import ModgraftError

if TYPE_CHECKING:
    from modgraft.recipes.ladder.result import Ladder
    from modgraft.recipes.ladder.tasks import Task

UNITS = {"": 0, "k": 1, "m": 2, "g": 3}
"""A letter after a number → the power of 1000, or of 1024 before "iB"."""

STEPS = {"docstrings": 150, "digitsqa": 600}
"""A built-in task → the steps of a rung by default."""


def ladder(
    what: Annotated[
        list[str],
        typer.Argument(
            help="docstrings or digitsqa; or files of text, a class each; or one table (.csv, "
            ".tsv, .jsonl) with the columns text and label."
        ),
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, help="The budget of steps of a rung; none: 150, or 600.")
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="The budget of trained parameters, as 100k or 2M.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="The budget of memory in training, as 500M or 2GiB.")
    ] = None,
    by: Annotated[
        str, typer.Option(help="What is to be least: parameters, memory or bytes (stored).")
    ] = "parameters",
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="How far below the best will do; none: a standard error."),
    ] = None,
    rungs: Annotated[
        str | None, typer.Option(help="Some rungs alone, as nothing,lora_4,full.")
    ] = None,
    eta: Annotated[
        int, typer.Option(min=2, help="One candidate of so many goes on from round to round.")
    ] = 3,
    keep: Annotated[int, typer.Option(min=1, help="Candidates that take all steps.")] = 5,
    model: Annotated[
        str | None, typer.Option(help="For files: a pretrained model; none: all-MiniLM-L6-v2.")
    ] = None,
    text: Annotated[str, typer.Option(help="The table's column of texts.")] = "text",
    label: Annotated[str, typer.Option(help="The table's column of classes.")] = "label",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Examples in a batch; none: 16, digitsqa's 32.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the data, the weights and their order.")] = 0,
    quick: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="A share of the built-in tasks' data.")
    ] = 1.0,
    run: Annotated[
        Path | None, typer.Option(help="The run's folder; none: runs/ladder, or runs/ladder-TASK.")
    ] = None,
    fresh: Fresh = False,
    note: Note = True,
    wide: Wide = False,
) -> None:
    """Train each level of change of a model within a budget, and say which to take.

    Nothing, a prompt, a prefix, a rescaling, LoRA by rank, adapters, a sparse change, and full
    fine-tuning; an interrupted run goes on where it stopped. The run's folder then holds table.md,
    plot.png, results.json, the chosen module and a note for the log.

    [bold]Examples[/bold]

      modgraft ladder docs/log.md docs/routing.md docs/hub.md   which file a sentence is from

      modgraft ladder reviews.csv --model my-encoder --parameters 100k

      modgraft ladder docstrings --memory 500M

      modgraft ladder digitsqa --rungs nothing,lora_4,full
    """
    from transformers.utils.logging import disable_progress_bar

    from modgraft.recipes.ladder.ladder import ladder as climb

    disable_progress_bar()  # loading the weights is quick
    console = Console()
    named = what[0] if len(what) == 1 and what[0] in STEPS else None
    folder = run or Path("runs") / (f"ladder-{named}" if named else "ladder")
    limits = {
        "parameters": number(parameters, "--parameters"),
        "memory": number(memory, "--memory"),
    }
    chosen = None if rungs is None else [name.strip() for name in rungs.split(",")]
    with stoppable():
        task = _task(named, what, folder, model, text, label, batch, seed, quick)
        found = climb(
            task.host, task.loader, evaluate=task.evaluate, test=task.test, beside=task.beside,
            steps=steps or STEPS.get(named or "", 150), rungs=chosen, by=by, tolerance=tolerance,  # type: ignore[arg-type]
            eta=eta, keep=keep, seed=seed, folder=folder, fresh=fresh, note=note, **limits,
            **task.settings,
        )  # fmt: skip
    _show(found, task.title, folder, console, wide)


def _task(
    named: str | None, what: list[str], folder: Path, model: str | None, text: str, label: str,
    batch: int | None, seed: int, quick: float,
) -> "Task":  # fmt: skip
    if named == "digitsqa":
        from modgraft.recipes.ladder.digits import Sizes, digitsqa

        sizes = Sizes() if quick == 1 else Sizes().smaller(quick)
        return digitsqa(
            folder.with_name(f"{folder.name}-host"), sizes=sizes, batch=batch or 32, seed=seed
        )
    from modgraft.data.labelled import divide, read_labelled
    from modgraft.recipes.ladder.tasks import docstrings, text_task

    if named == "docstrings":
        return docstrings(share=quick, batch=batch or 16, seed=seed)
    classes, rows = read_labelled(what, text=text, label=label)
    title = f"which of {', '.join(classes)}"
    return text_task(
        title, divide(rows, seed), len(classes), model=model, batch=batch or 16, seed=seed
    )


def number(text: str | None, option: str) -> int | None:
    """Read a number of parameters or bytes, as ``100k``, ``1.5M`` or ``2GiB``.

    Raises:
        ModgraftError: it is none.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMG]?)(i?)B?", text.strip())
    if found is None:
        raise ModgraftError(f"{option} {text}: write a number as 5000, 100k, 1.5M, 2G or 2GiB")
    base = 1024 if found[3] else 1000
    return round(float(found[1]) * base ** UNITS[found[2].lower()])


def _show(found: "Ladder", title: str, folder: Path, console: Console, wide: bool) -> None:
    from modgraft.recipes.ladder.result import COLUMNS
    from modgraft.report.table import print_fitted, terminal_table

    table = terminal_table(escape(title), COLUMNS[0], COLUMNS[1:])
    for row in found.cells():
        table.add_row(*map(escape, row))
    print_fitted(table, console, folder / "table.md", wide=wide)
    lines: list[Any] = [*found.remarks(), f"\nPicture: {folder / 'plot.png'}"]
    if found.module is not None:
        lines.append(f"Module: {found.module}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
