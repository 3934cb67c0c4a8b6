"""``modgraft merge``: several modules, or several checkpoints, become one."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from modgraft.cli.options import Strict, any_settings

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
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Modules whose heads, or other parts of the host that trained with them, differ: "
            "average, none (the host's own stay), or the name of the module whose are taken.",
        ),
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
    from modgraft.store.merging.table import SOUP

    kind = kind_of(paths)
    said = any_settings(options)
    if own := _APART & said.keys():
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
        what = kind if len(paths) > 1 else kind[:-1]
        typer.echo(f"{len(paths)} {what}, {method}", err=True)
    if kind == "checkpoints":
        if rank is not None or into_model or heads is not None:
            raise ModgraftError(
                "--heads, --rank and --into-model are of modules, and these are checkpoints"
            )
        from modgraft.store.merging.checkpoints import merge_checkpoints
        from modgraft.store.merging.streamed import RECORD

        with shown_progress("merging", as_json) as progress:
            merge_checkpoints(
                paths, out, method, base=base, weights=numbers, progress=progress, **said
            )
        report: dict[str, Any] = {"averaged": json.loads((out / RECORD).read_text())["averaged"]}
    else:
        own = {"method": method, "weights": numbers, "rank": rank, "heads": heads, "strict": strict}
        report = _modules(paths, out, base, name, into_model, said | own)
    report = {"merged": kind, "method": method, "out": str(out), **report}
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        lost = report.get("relative_error")
        more = f", {100 * lost:.2g} % of Δ left out by the rank" if lost else ""
        typer.echo(f"{out}: {report.get('module', 'a checkpoint')}{more}")
        if averaged := report.get("averaged"):
            typer.echo(
                f"averaged, since nothing says that they are matrices: {', '.join(averaged)}"
            )


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


def host_of(paths: Sequence[Path], base: str | None) -> "tuple[Host, str]":
    """Make the host of saved modules; return it, and the folder or hub name that it is from.

    Its class, and how many labels it has, are those that the cards say.

    Raises:
        ModgraftError: where nothing says which model is the host.
    """
    import transformers

    from modgraft.cli.inspect import read_model
    from modgraft.core.errors import ModgraftError
    from modgraft.host.host import Host
    from modgraft.store.folder import FILE, native

    cards = {path: native(path).card for path in paths if (path / FILE).exists()}
    if base is None:
        said = {path: cards[path].base_model if path in cards else _peers(path) for path in paths}
        named = {path: name for path, name in said.items() if name}
        if not named:
            raise ModgraftError(
                f"which host is {paths[0]} for? Its card does not say; name it with --base MODEL, "
                f"a folder or a hub name"
            )
        path, base = next(iter(named.items()))
        typer.echo(f"the host: {base}, as the card of {path} says", err=True)
    there = next((card.host for card in cards.values()), {})
    kind = str(there.get("architecture"))
    labels = there.get("config", {}).get(f"{kind}.num_labels", [])
    model = read_model(
        base,
        weights=True,
        kind=kind if hasattr(transformers, kind) else None,
        settings={"num_labels": int(labels[0])} if len(labels) == 1 else None,
    )
    return Host(model.eval()), base


def _peers(folder: Path) -> str | None:
    """Return the host's name in a folder that PEFT or AdapterHub wrote."""
    from modgraft.core.files import read_json

    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    said = read_json(path, what="an adapter's configuration", remedy="copy the folder again")
    name = said.get("base_model_name_or_path", said.get("model_name"))
    return name if isinstance(name, str) and name else None


@contextmanager
def shown_progress(what: str, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar in a ``with`` block once it is moved; gives the function that moves it."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), disable=hidden)
    task = bar.add_task(what, total=None)
    with ExitStack() as shown:

        def move(done: int, every: int) -> None:
            if not bar.live.is_started and not hidden:
                shown.enter_context(bar)
            bar.update(task, completed=done, total=every)

        yield move


_APART = {
    "weights", "rank", "heads", "strict", "base", "into", "validate", "progress", "method",
}  # fmt: skip
"""What has an option of its own, and is none of a method's."""


def _modules(
    paths: Sequence[Path],
    out: Path,
    base: str | None,
    name: str,
    into_model: bool,
    given: dict[str, Any],
) -> dict[str, Any]:
    from modgraft.core.files import new_folder
    from modgraft.store.folder import stored
    from modgraft.store.merging.folders import merge_folders
    from modgraft.store.merging.streamed import copy_rest

    host, base = host_of(paths, base)
    new = merge_folders(host, paths, name, **given)
    if into_model:
        plain: Any = host.merge(name)
        with new_folder(out) as part:
            copy_rest(_beside_weights(base), part)
            plain.save_pretrained(part)
    else:
        said = {stored(path, host.model).card.base_model for path in paths} - {None}
        about: dict[str, Any] = {"base_model": said.pop()} if len(said) == 1 else {}
        host.save(name, out, **about)
    return {
        "module": new.method.brief(),
        "sites": len(new.paths),
        "parameters": new.size,
        "into_model": into_model,
        **new.provenance,
    }


def _beside_weights(base: str) -> Path:
    """Return the folder of a model, or that with what a hub has of it beside its weights."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    from modgraft.core.errors import ModgraftError
    from modgraft.store.merging.streamed import WEIGHTS

    try:
        return Path(snapshot_download(base, ignore_patterns=[f"*{ending}" for ending in WEIGHTS]))
    except (OSError, ValueError) as error:
        raise ModgraftError(
            f"the tokenizer and what else is beside the weights of {base} cannot be fetched "
            f"({str(error).partition(chr(10))[0]:.200}); give its folder, --base ./folder"
        ) from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"--weights: {text!r} is no number; write 0.7,0.3") from error
