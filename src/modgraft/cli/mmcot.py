"""``modgraft mmcot``: train, test and question the multimodal chain of thought."""

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
    Run,
    Seeds,
    Wide,
    changes,
    seeds_of,
    stoppable,
)

mmcot = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Multimodal chain of thought: T5 with gated image fusion, in two stages.",
)

Rows = Annotated[
    str, typer.Option(help="Rows of the table: demo, all, or keys as fused,text,modular.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on without bad records; list them.")]
SHOWN = 20
"""The number of skipped questions that the terminal lists; results.json lists all."""


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
    t5: Annotated[
        str, typer.Option(help="Whose T5 computes: transformers', or modgraft's own, one page.")
    ] = "transformers",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps of every net, for both stages.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Questions in a batch.")] = None,
    split: Annotated[
        str | None, typer.Option(help="The split to test; none: test, or val where there is none.")
    ] = None,
    quick: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="A share of digits' questions and of steps.")
    ] = 1.0,
    change: Change = None,
    fresh: Fresh = False,
    skip_bad: SkipBad = False,
    note: Note = True,
    wide: Wide = False,
) -> None:
    """Train and test the recipe; an interrupted run goes on where it stopped.

    [bold]Examples[/bold]

      modgraft mmcot train                                  the demo, about ten minutes

      modgraft mmcot train --rows all --seeds 0,1,2 --run runs/table

      modgraft mmcot train --data ScienceQA/data --features vit.npy --model t5-base
    """
    from dataclasses import replace

    from modgraft.recipes.mmcot.recipe import SCIENCEQA, Settings, smaller
    from modgraft.recipes.mmcot.run import run as run_recipe

    base = Settings() if data == "digits" else SCIENCEQA
    if quick < 1:
        base = smaller(base, quick)
    settings = replace(
        base, data=data if data == "digits" else _path(data), features=_path(features),
        model=_path(model), t5=t5, split=split, skip_bad=skip_bad,
    )  # fmt: skip
    if steps is not None:
        warmup = min(settings.warmup, steps - 1)
        settings = replace(settings, steps_rationale=steps, steps_answer=steps, warmup=warmup)
    if batch is not None:
        settings = replace(settings, batch=batch)
    settings = replace(settings, **changes(settings, change or []))
    chosen, which, console = _rows(rows), seeds_of(seeds), Console()
    with stoppable():
        run_recipe(run, settings, chosen, which, jobs=jobs, fresh=fresh, console=console, note=note)
    _show(run, console, wide)


@mmcot.command("evaluate")
def mmcot_evaluate(
    run: Run = Path("runs/mmcot"),
    rows: Rows = "",
    seeds: Seeds = "",
    jobs: Jobs = JOBS,
    note: Note = True,
    wide: Wide = False,
) -> None:
    """Decode and score a trained run's test questions again, and write its report anew.

    [bold]Example[/bold]

      modgraft mmcot evaluate --run runs/mmcot --rows fused,shuffled
    """
    from modgraft.core.files import read_json
    from modgraft.recipes.mmcot.data import settings_of
    from modgraft.recipes.mmcot.run import run as run_recipe

    settings, console = settings_of(run), Console()
    remedy = "modgraft mmcot train"
    asked = read_json(run / "run.json", what="a run", remedy=remedy, keys=["rows", "seeds"])
    chosen = _rows(rows) if rows else asked["rows"]
    which = seeds_of(seeds) if seeds else asked["seeds"]
    with stoppable():
        run_recipe(
            run, settings, chosen, which, jobs=jobs, evaluate_only=True, console=console, note=note
        )
    _show(run, console, wide)


@mmcot.command("ask")
def mmcot_ask(
    image: Annotated[str, typer.Argument(help="An image file, or - for a question without one.")],
    question: Annotated[str, typer.Argument(help="The question.")],
    choices: Annotated[list[str], typer.Argument(help="The options, two or more.")],
    hint: Annotated[str, typer.Option(help="Text that goes with the question.")] = "",
    run: Run = Path("runs/mmcot"),
    seed: Annotated[int | None, typer.Option(help="Which of the run's seeds.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse what is flagged: exit 3.")
    ] = False,
) -> None:
    """Ask a trained run one question: its rationale, its answer, and what speaks against it.

    It ends with 0 if there is an answer, flagged or not; 1 where it cannot be asked; 2 if what it
    wrote names none of the options; with --strict, 3 if anything is flagged, without the answer.

    [bold]Examples[/bold]

      modgraft mmcot ask strip.png "What is the left digit?" 3 5 8

      modgraft mmcot ask strip.png "Which is bigger, left or right?" three five eight --strict
    """
    from transformers.utils.logging import disable_progress_bar

    from modgraft.recipes.mmcot.ask import ask

    disable_progress_bar()  # loading the weights is quick
    path = None if image == "-" else Path(image)
    said = ask(run, path, question, choices, hint, seed)
    console = Console(highlight=False)

    def tell(what: str, text: str) -> None:
        console.print(f"[bold]{what}[/bold]", end=" ")
        console.print(text, markup=False, soft_wrap=True)

    if said.asked != (question, hint, *choices):
        tell("Read as", " | ".join(filter(None, said.asked)))
    refused = strict and said.flags
    if not refused:
        tell("Rationale", said.rationale)
        if said.choice is None:
            tell("Answer", f"none of the options (it wrote: {said.text})")
        else:
            shown = [f"({chr(65 + i)}) {choices[i]}" for i in range(len(choices))]
            sure = [f"{100 * p:.1f} %" for p in said.probabilities]
            best, next_ = said.choice, said.runner_up
            tell("Answer", f"{shown[best]}, {sure[best]}; next {shown[next_]}, {sure[next_]}")
    for flag in said.flags:
        tell("Flag", flag)
    if refused:
        raise typer.Exit(3)
    if said.choice is None:
        raise typer.Exit(2)


def _rows(text: str) -> list[str]:
    from modgraft.recipes.mmcot.recipe import DEMO, ROWS

    named = {"demo": list(DEMO), "all": list(ROWS)}
    chosen = named.get(text) or [part.strip() for part in text.split(",") if part.strip()]
    if not chosen:
        raise typer.BadParameter(f"--rows names none; take demo, all, or of: {', '.join(ROWS)}")
    return list(dict.fromkeys(chosen))


def _path(name: str | None) -> str | None:
    """Make a local path absolute, so that a run can resume from another working directory."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name


def _show(run: Path, console: Console, wide: bool) -> None:
    from modgraft.core.files import read_json
    from modgraft.report.table import print_results

    print_results(run, console, wide=wide)
    results = read_json(run / "results.json", what="results", remedy="modgraft mmcot train")
    lines, skipped = list(results.get("notes", [])), results.get("skipped", [])
    if skipped:
        lines.append(f"Skipped {len(skipped)} bad questions (--skip-bad):")
        lines += [f"  {s['id']} ({s['file']}): {s['reason']}" for s in skipped[:SHOWN]]
        if len(skipped) > SHOWN:
            lines.append(f"  and {len(skipped) - SHOWN} more, in {run / 'results.json'}")
    lines.append(f"\nReport: {run / 'report.html'}")
    if (run / "note.md").is_file():
        lines.append(f"Note: {run / 'note.md'}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
