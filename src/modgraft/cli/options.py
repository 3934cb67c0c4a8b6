"""Options that several commands share, and how their values are read."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, get_type_hints

import typer
from rich.console import Console
from typer.models import OptionInfo

P = ParamSpec("P")
R = TypeVar("R")

JOBS = min(2, os.cpu_count() or 1)
Run = Annotated[Path, typer.Option(help="The run's folder.")]
Seeds = Annotated[str, typer.Option(help="Seeds, as 0 or 0,1,2.")]
Jobs = Annotated[int, typer.Option(min=1, help="Processes side by side, one thread each.")]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict/--no-strict", help="Refuse a model of other weights than it was trained in."
    ),
]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, as lr=3e-4."),
]
Note = Annotated[
    bool, typer.Option("--note/--no-note", help="Write note.md, the run's part of the log.")
]
Wide = Annotated[
    bool, typer.Option("--wide", help="Print all columns of the table, wider than the terminal.")
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
        if name in made:
            raise typer.BadParameter(f"--set {pair}: {name} is set already; say it once")
        kind = type(getattr(settings, name))
        try:
            made[name] = _READ[kind](text) if kind in _READ else text
        except (ValueError, KeyError) as error:
            raise typer.BadParameter(f"--set {pair}: the value is no {_KINDS[kind]}") from error
    return made


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


_READ: dict[type, Callable[[str], Any]] = {
    int: int,
    float: _finite,
    bool: {"true": True, "false": False}.__getitem__,
}
"""How a value of each type is read; others are words."""
_KINDS = {int: "int", float: "finite float", bool: "true or false"}


def any_settings(pairs: list[str] | None) -> dict[str, Any]:
    """Parse ``NAME=VALUE`` each; a value is JSON, as a number, true or false, or else a word."""
    made: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set {pair}: write NAME=VALUE, as density=0.2")
        if name in made:
            raise typer.BadParameter(f"--set {pair}: {name} is set already; say it once")
        try:
            made[name] = json.loads(text)
        except json.JSONDecodeError:
            made[name] = text
    return made


def in_options(command: Callable[P, R], **called: str) -> Callable[P, R]:
    """Let a command word the library's errors in its own options.

    The library says what to write in Python: ``strict=False``, ``rank=4``. Where the command has an
    option of that name its user reads ``--no-strict``, ``--rank 4``; what it passes on with
    ``--set`` is ``--set density=0.2``. Arguments of a class, as in ``LoRA(rank=4)``, are left.

    Args:
        command: the command.
        **called: the options' names where they differ: ``format="to"``.
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from modgraft.core.errors import ModgraftError

        try:
            return command(*args, **kwargs)
        except ModgraftError as error:
            error.args = (worded(str(error), _options(command), called),)
            raise

    return run


def _options(command: Callable[..., Any]) -> dict[str, list[str]]:
    """Return how each option of a command is written, by its name: on, and off if it is a flag."""
    found = {}
    for name, hint in get_type_hints(command, include_extras=True).items():
        for said in getattr(hint, "__metadata__", ()):
            if isinstance(said, OptionInfo):
                words = [w for w in (said.default, *(said.param_decls or ())) if isinstance(w, str)]
                found[name] = (words or [f"--{name.replace('_', '-')}"])[0].split("/")
    return found


def worded(text: str, options: Mapping[str, list[str]], called: Mapping[str, str]) -> str:
    """Write Python's arguments in a text as options; see :func:`in_options`."""
    sets = ["--set"] in options.values()

    def option(found: re.Match[str]) -> str:
        say, name, value = found["say"] or "", found["name"], found["value"] or ""
        if name is None:  # a call
            return found[0]
        if (known := options.get(called.get(name, name))) is None:
            return f"{say}--set {name}={value}" if say and sets else found[0]
        is_flag = value in ("True", "False")
        return say + (known[0 if value == "True" else -1] if is_flag else f"{known[0]} ")

    return _ARGUMENT.sub(option, text)


_ARGUMENT = re.compile(
    r"\w\([^()]*\)|(?P<say>\bsay )?(?<![\w/-])(?P<name>[a-z_]+)=(?P<value>True|False)?"
)


@contextmanager
def stoppable() -> Iterator[None]:
    """On Ctrl-C, print how to resume, and exit with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on where it was")
        raise typer.Exit(130) from None
