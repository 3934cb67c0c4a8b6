"""``modgraft merge``: several modules, or several checkpoints, become one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from modgraft.cli.options import Strict, any_setting

if TYPE_CHECKING:
    from modgraft.host.host import Host


def merge(
    paths: Annotated[
        list[Path], typer.Argument(metavar="A B…", help="Folders of modules, or of checkpoints.")
    ],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    method: Annotated[
        str,
        typer.Option(help="average, arithmetic, ties, dare, slerp, isotropic, tsv or knots."),
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
    strict: Strict = True,
    into_model: Annotated[
        bool,
        typer.Option("--into-model", help="Modules: write the host with the merge in its weights."),
    ] = False,
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
    from modgraft.store.merging.methods import SOUP

    kind = kind_of(paths)
    said = dict(any_setting(pair) for pair in options or [])
    if own := {"weights", "rank", "base", "into", "validate", "progress", "method"} & said.keys():
        raise typer.BadParameter(
            f"--set {min(own)}=…: an option of a method; see --help for others"
        )
    if method == SOUP:
        raise ModgraftError(
            f"{SOUP} asks a function of yours for scores: mg.merge(host, …, validate=…) in Python"
        )
    if out.resolve() in {path.resolve() for path in paths}:
        raise ModgraftError(f"{out} is among what is merged; write to another folder")
    numbers = None if weights is None else [_number(text) for text in weights.split(",")]
    if not as_json:
        typer.echo(f"{len(paths)} {kind}, {method}", err=True)
    if kind == "checkpoints":
        if rank is not None or into_model:
            raise ModgraftError("--rank and --into-model are of modules, and these are checkpoints")
        from modgraft.store.merging.checkpoints import merge_checkpoints

        with shown_progress("merging", as_json) as progress:
            merge_checkpoints(
                paths, out, method, base=base, weights=numbers, progress=progress, **said
            )
        report: dict[str, Any] = {}
    else:
        host, names = loaded(paths, base, name, strict)
        report = _modules(host, names, out, method, base, numbers, rank, name, into_model, said)
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
    from modgraft.store.folder import FILE, found_in

    found: dict[str, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise ModgraftError(f"{path} is no folder; give folders of modules or of checkpoints")
        held = (path / FILE).exists() or found_in(path) is not None
        found["modules" if held else "checkpoints"] = path
    if len(found) == 2:
        raise ModgraftError(
            f"{found['modules']} holds a module and {found['checkpoints']} does not; merge or "
            f"compare modules with modules, or checkpoints with checkpoints"
        )
    return next(iter(found))


def loaded(
    paths: Sequence[Path], base: str | None, new: str = "", strict: bool = True
) -> tuple[Host, list[str]]:
    """Make the host of saved modules and load them; return it and their names.

    Those are the names that they were saved under, or ``m2_<folder>`` where one has that already,
    or ``new`` will.

    Raises:
        ModgraftError: where nothing says which model is the host.
    """
    from modgraft.cli.inspect import read_model
    from modgraft.core.errors import ModgraftError
    from modgraft.host.host import Host
    from modgraft.store.folder import FILE, native, stored

    if base is None and (paths[0] / FILE).exists():
        base = native(paths[0]).card.base_model
        if base is not None:
            typer.echo(f"the host: {base}, as the card of {paths[0]} says", err=True)
    if base is None:
        raise ModgraftError(
            f"which host is {paths[0]} for? Its card does not say; name it with --base MODEL, a "
            f"folder or a hub name"
        )
    host = Host(read_model(base, weights=True).eval())
    names = []
    for number, path in enumerate(paths, 1):
        own = stored(path, host.model).card.names
        taken = len(own) != 1 or own[0] in host or own[0] == new
        names.append(f"m{number}_" + re.sub(r"\W", "_", path.resolve().name) if taken else own[0])
        host.load(path, names[-1], strict=strict, active=False)
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
    host: Host,
    names: list[str],
    out: Path,
    method: str,
    base: str | None,
    weights: list[float] | None,
    rank: int | None,
    name: str,
    into_model: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    from modgraft.core.files import new_folder
    from modgraft.store.merging.checkpoints import copy_rest
    from modgraft.store.merging.modules import merge as merge_modules

    new = merge_modules(host, names, name, method, weights=weights, rank=rank, **options)
    if into_model:
        plain: Any = host.merge(name)
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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"--weights: {text!r} is no number; write 0.7,0.3") from error
