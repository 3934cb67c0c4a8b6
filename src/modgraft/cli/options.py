"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

JOBS = min(2, os.cpu_count() or 1)
Run = Annotated[Path, typer.Option(help="The run's folder.")]
Seeds = Annotated[str, typer.Option(help="Seeds, as 0 or 0,1,2.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes side by side, one thread each.")]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, as lr=3e-4."),
]
Note = Annotated[
    bool, typer.Option("--note/--no-note", help="Write note.md, the run's part of the log.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete the run's folder first.")]


def seeds_of(text: str) -> list[int]:
    """Parse seeds such as ``0,1,2``; the result is sorted, without repetitions."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"{text!r}: write seeds as 0 or 0,1,2")
    return sorted({int(part) for part in parts})


def changes(settings: Any, pairs: list[str]) -> dict[str, Any]:
    """Parse the settings of ``--set``, each with the type of its default."""
    made: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if not hasattr(settings, name) or not text:
            names = ", ".join(vars(settings))
            raise typer.BadParameter(f"--set {pair}: write NAME=VALUE; the names are {names}")
        kind = type(getattr(settings, name))
        try:
            made[name] = kind(text) if kind in (int, float) else text
        except ValueError as error:
            raise typer.BadParameter(f"--set {pair}: the value is no {kind.__name__}") from error
    return made


def any_setting(pair: str) -> tuple[str, Any]:
    """Parse ``NAME=VALUE``; a value is JSON, as a number, true or false, or else a word."""
    name, equals, text = pair.partition("=")
    if not equals:
        raise typer.BadParameter(f"--set {pair}: write NAME=VALUE, as density=0.2")
    try:
        return name, json.loads(text)
    except json.JSONDecodeError:
        return name, text


def delete(run: Path) -> None:
    """Delete a run's folder; other folders are refused."""
    import shutil

    from modgraft.core.errors import DataError

    if run.exists() and not (run / "run.json").is_file():
        raise DataError(
            "--fresh deletes runs only, and this folder holds none", file=run,
            remedy="Take another --run, or delete it yourself",
        )  # fmt: skip
    shutil.rmtree(run, ignore_errors=True)


@contextmanager
def stoppable() -> Iterator[None]:
    """On Ctrl-C, print how to resume, and exit with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where it was")
        raise typer.Exit(130) from None
