"""``modgraft hub list|search|show|verify``: what there is on a hub, and whether it is whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from modgraft.cli.hub_options import Address, Json, Names, Where, found, opened, say

if TYPE_CHECKING:
    from modgraft.store.hub.hub import Hub
    from modgraft.store.hub.search import Listed


def listing(names: Names = None, where: Where = None, as_json: Json = False) -> None:
    """List the versions on a hub.

    [bold]Examples[/bold]

      modgraft hub list

      modgraft hub list qa --hub s3://team/modules
    """
    place = opened(where)
    rows = [row for name in names or [""] for row in place.listed(name)]
    _print_rows(place, rows, as_json, "nothing")


def search(
    text: Annotated[
        list[str] | None, typer.Argument(metavar="WORD", help="In its name, description, data…")
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="A class, a name, the start of a hash, or a model's folder: what fits?"),
    ] = "",
    task: Annotated[str, typer.Option(help="As question-answering.")] = "",
    kind: Annotated[str, typer.Option(help="As lora.")] = "",
    metric: Annotated[
        list[str] | None, typer.Option(help='As "f1>0.8". May be given again.')
    ] = None,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """Search a hub by words, host, task, kind and metrics; all must hold.

    [bold]Examples[/bold]

      modgraft hub search squad --kind lora --metric "f1>0.8"

      modgraft hub search --host ./my-model
    """
    from modgraft.store.fingerprint import differences

    place, folder = opened(where), Path(host)
    is_model = bool(host) and (folder / "config.json").is_file()
    rows = place.search(
        " ".join(text or ()), host="" if is_model else host, task=task, kind=kind,
        metrics=metric or (),
    )  # fmt: skip
    if is_model:
        from modgraft.cli.inspect import read_model

        model = read_model(host)
        rows = [r for r in rows if not differences(model, r.card.host, r.card.beside, values=False)]
    _print_rows(place, rows, as_json, "nothing of that")


def show(address: Address, where: Where = None, as_json: Json = False) -> None:
    """Show a module's card.

    [bold]Examples[/bold]

      modgraft hub show qa

      modgraft hub show hf:me/qa-lora
    """
    from rich.markdown import Markdown

    from modgraft.store.readme import readme

    it = found(address, opened(where))
    if as_json:
        card = json.loads(it.card.to_text()) if it.card else None
        say({"address": it.address, "sha256": it.sha256, "card": card}, True, "")
        return
    console = Console(highlight=False, markup=False)
    console.print(f"{it.address}  {it.sha256}", soft_wrap=True)
    if it.card is None:
        files = ", ".join(sorted(path.name for path in it.folder.iterdir()))
        console.print(f"another tool's module, without a card: {files}", soft_wrap=True)
        return
    text = readme(it.card).split("---\n", 2)[2].strip()
    console.print(Markdown(text) if console.is_terminal else text)


def verify(names: Names = None, where: Where = None, as_json: Json = False) -> None:
    """Read modules to the last bit, on a hub or at an ADDRESS (./qa); exit with 1 if one is broken.

    [bold]Examples[/bold]

      modgraft hub verify

      modgraft hub verify qa@2 ./modules/style
    """
    from modgraft.store.hub.address import local
    from modgraft.store.verify import verify as verify_folder

    place, said, unsure = opened(where), {}, {}
    for name in names or [""]:
        if "/" in name:
            report = verify_folder(local(name, "modgraft hub verify"))
            why = "; ".join(report.problems)
            said[name] = "" if report.whole else why
            unsure[name] = why if report.whole and not report.hash else ""
        else:
            said |= place.verify(name)
    rows = [
        {"address": a, "whole": not why, "why": why or unsure.get(a, "")} for a, why in said.items()
    ]
    text = "\n".join(f"{r['address']}: {r['why'] or 'whole'}" for r in rows)
    say(rows, as_json, text or f"nothing on the hub {place.address}")
    if any(said.values()):
        raise typer.Exit(1)


def _print_rows(place: "Hub", rows: "Sequence[Listed]", as_json: bool, none: str) -> None:
    """Print versions as a table, or as JSON with their cards; say how many cannot be read."""
    from modgraft.cli.inspect import show as show_table
    from modgraft.core.files import in_bytes
    from modgraft.core.tables import table

    if broken := place.broken():
        typer.echo(f"broken: {', '.join(broken)}; `modgraft hub verify` says why", err=True)
    if as_json or not rows:
        said = [
            {"name": r.name, "version": r.version, "tags": list(r.tags), "address": r.address,
             "bytes": r.size, "card": json.loads(r.card.to_text())}
            for r in rows
        ]  # fmt: skip
        say(said, as_json, f"{none} on the hub {place.address}")
        return
    cells = [
        (
            " ".join([f"{r.name}@{r.version}", *(f"@{tag}" for tag in r.tags)]),
            ", ".join(dict.fromkeys(m.type for m in r.card.modules)),
            r.card.base_model or r.card.host.get("architecture", ""),
            r.card.task or "",
            ", ".join(f"{k} {v:.4g}" for k, v in r.card.metrics.items()),
            in_bytes(r.size),
            r.card.sha256[:12],
        )
        for r in rows
    ]
    columns = ("module", "method", "host", "task", "metrics", "size", "hash")
    show_table(Console(highlight=False, markup=False), table(columns, cells))
