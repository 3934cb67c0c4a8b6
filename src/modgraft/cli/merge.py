"""``modgraft merge``: several modules, or several checkpoints, become one."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from modgraft.host.host import Host


def merge(
    paths: Annotated[
        list[Path], typer.Argument(metavar="A B…", help="Folders of modules, or of checkpoints.")
    ],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    method: Annotated[
        str,
        typer.Option(
            help="average, arithmetic, ties, dare, slerp, isotropic, tsv, knots or greedy_soup."
        ),
    ] = "average",
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Modules: their host, a folder or a hub name; left out, what their card names. "
            "Checkpoints: the folder of the one that they were all trained from.",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A number for each, as 0.7,0.3; left out, 1 each.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An option of the method, density=0.2."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Modules: the rank of the new one; left out, exact.")
    ] = None,
    name: Annotated[str, typer.Option(help="Modules: the name of the new one.")] = "merged",
    into_model: Annotated[
        bool,
        typer.Option("--into-model", help="Modules: write the host with the merge in its weights."),
    ] = False,
    validate: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="For greedy_soup of checkpoints: is given a folder as its last argument, and "
            "prints its score; higher is better.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Merge modules into a module or a model, or whole checkpoints into one.

    Which of them the folders hold is seen, and said. Checkpoints are read in blocks and may be
    larger than memory. The methods and their options: docs/merging.md.

    [bold]Examples[/bold]

      modgraft merge modules/qa modules/style --base ./my-model --method ties --out modules/both

      modgraft merge modules/qa modules/style --base ./my-model --out ./qa-model --into-model

      modgraft merge ./seed0 ./seed1 ./seed2 --out ./soup

      modgraft merge ./math ./code --base ./pretrained --method dare --set density=0.3 --out ./both
    """
    from modgraft.core.errors import ModgraftError

    kind = kind_of(paths)
    said = _options(method, options or [])
    numbers = None if weights is None else _numbers(weights)
    if not as_json:
        typer.echo(f"{len(paths)} {kind}, {method}", err=True)
    if kind == "checkpoints":
        if rank is not None or into_model:
            raise ModgraftError("--rank and --into-model are of modules, and these are checkpoints")
        from modgraft.store.merging.checkpoints import merge_checkpoints

        with shown_progress("merging", as_json) as progress:
            merge_checkpoints(
                paths, out, method, base=base, weights=numbers, progress=progress,
                validate=None if validate is None else _score_of(validate), **said,
            )  # fmt: skip
        report: dict[str, Any] = {}
    else:
        if validate is not None or method == "greedy_soup":
            raise ModgraftError(
                "a greedy soup of modules is validated in Python: mg.merge(host, names, into=…, "
                "method='greedy_soup', validate=…); here it is of checkpoints"
            )
        report = _modules(paths, out, method, base, numbers, rank, name, into_model, said, as_json)
    report = {"merged": kind, "method": method, "out": str(out), **report}
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        lost = report.get("relative_error")
        more = f", {100 * lost:.2g} % of Δ left out by the rank" if lost else ""
        typer.echo(f"{out}: {report.get('module', 'a checkpoint')}{more}")


def kind_of(paths: Sequence[Path]) -> str:
    """Return whether folders hold ``"modules"`` or ``"checkpoints"``.

    Raises:
        ModgraftError: for a folder of neither, or folders of both.
    """
    from modgraft.core.errors import ModgraftError
    from modgraft.store import formats
    from modgraft.store.folder import FILE

    found: dict[str, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise ModgraftError(f"{path} is no folder; give folders of modules or of checkpoints")
        held = (path / FILE).exists() or formats.found_in(path) is not None
        found["modules" if held else "checkpoints"] = path
    if len(found) == 2:
        raise ModgraftError(
            f"{found['modules']} holds a module and {found['checkpoints']} does not; merge or "
            f"compare modules with modules, or checkpoints with checkpoints"
        )
    return next(iter(found))


def loaded(paths: Sequence[Path], base: str | None) -> tuple[Host, list[str]]:
    """Make the host of saved modules and load them; return it and their names in it.

    Raises:
        ModgraftError: where nothing says which model is the host.
    """
    from modgraft.cli.inspect import read_model
    from modgraft.core.errors import ModgraftError
    from modgraft.host.host import Host
    from modgraft.store.folder import FILE, stored

    if base is None and (paths[0] / FILE).exists():
        from torch import nn

        base = stored(paths[0], nn.Module()).card.base_model
        if base is not None:
            typer.echo(f"the host: {base}, as the card of {paths[0]} says", err=True)
    if base is None:
        raise ModgraftError(
            f"which host is {paths[0]} for? Its card does not say; name it with --base MODEL, a "
            f"folder or a hub name"
        )
    host = Host(read_model(base, weights=True).eval())
    names: list[str] = []
    for path in paths:
        plain = re.sub(r"\W", "_", path.resolve().name)
        stem = f"m_{plain}" if not plain.isidentifier() or hasattr(host.implants, plain) else plain
        name, number = stem, 2
        while name in host:
            name, number = f"{stem}_{number}", number + 1
        host.load(path, name, active=False)
        names.append(name)
    return host, names


@contextmanager
def shown_progress(what: str, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar in a ``with`` block; gives the function that moves it."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, every: bar.update(task, completed=done, total=every)


def _modules(
    paths: Sequence[Path],
    out: Path,
    method: str,
    base: str | None,
    weights: list[float] | None,
    rank: int | None,
    name: str,
    into_model: bool,
    options: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    from modgraft.core.errors import ModgraftError
    from modgraft.store.merging.checkpoints import copy_rest, new_folder
    from modgraft.store.merging.modules import merge as merge_modules

    host, names = loaded(paths, base)
    if name in names:
        raise ModgraftError(f"--name {name}: one of the folders is called so; take another name")
    new = merge_modules(host, names, name, method, weights=weights, rank=rank, **options)
    if into_model:
        plain: Any = host.merge(name)
        if out.is_dir() and any(out.iterdir()):
            raise ModgraftError(f"{out} is there and not empty; choose another folder")
        with new_folder(out) as part:
            if base is not None and Path(base).is_dir():
                copy_rest(Path(base), part)
            plain.save_pretrained(part)
    else:
        host.save(name, out)
    return {
        "module": new.method.brief(),
        "sites": len(new.paths),
        "parameters": new.size,
        "into_model": into_model,
        **new.provenance,
    }


def _options(method: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` as the types that the method's options have."""
    from modgraft.store.merging.methods import METHODS

    known = METHODS[method].options if method in METHODS else {}
    made: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        kind = type(known.get(name, ""))
        try:
            made[name] = _TRUTH[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError) as error:
            raise typer.BadParameter(f"--set {pair}: the value is no {kind.__name__}") from error
    return made


_TRUTH = {"true": True, "false": False}


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--weights {text}: write numbers as 0.7,0.3") from error


def _score_of(command: str) -> Callable[[Path], float]:
    """Return what runs a command on a checkpoint's folder and reads the number it prints last."""
    from modgraft.core.errors import ModgraftError

    words = shlex.split(command)

    def score(folder: Path) -> float:
        done = subprocess.run([*words, str(folder)], stdout=subprocess.PIPE, text=True)  # noqa: S603
        last = done.stdout.strip().rpartition("\n")[2]
        try:
            if done.returncode == 0:
                return float(last)
        except ValueError:
            pass
        raise ModgraftError(
            f"--validate {command}: it ended with status {done.returncode}, and its last line was "
            f"{last!r:.80}; it has to print a score as its last line"
        )

    return score
