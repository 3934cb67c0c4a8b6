"""The commands that serve the log: ``modgraft log page|mcp|lsp``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from modgraft.cli.log import Bib, In, opened
from modgraft.core.errors import ModgraftError

EXTRA = ("mcp", "pygls", "lsprotocol", "starlette", "uvicorn", "anyio", "httpx2")
"""The packages of the extra `log`."""


def page(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of this machine.")] = 8765,
    folder: In = None,
    bib: Bib = None,
) -> None:
    """Show the log in a browser: timeline, notes, search, reading queue, questions.

    The page can be reached from this machine alone. Ctrl-C stops it.

    [bold]Example[/bold]

      modgraft log page
    """
    with _extra("the page"):
        from modgraft.log.serve.page import serve

    with opened(folder, bib) as found:
        typer.echo(f"http://127.0.0.1:{port}  (Ctrl-C stops it)", err=True)
        serve(found, port=port)


def mcp(
    write: Annotated[
        bool, typer.Option("--write", help="The assistant may add events; else it only reads.")
    ] = False,
    http: Annotated[
        int | None, typer.Option(help="A port of this machine, instead of stdin and stdout.")
    ] = None,
    folder: In = None,
    bib: Bib = None,
) -> None:
    """Serve the log to an assistant, by the Model Context Protocol over stdin and stdout.

    [bold]Example[/bold], in an assistant's settings

      {"mcpServers": {"log": {"command": "modgraft", "args": ["log", "mcp", "--in", "log"]}}}
    """
    with _extra("the server for assistants"):
        from modgraft.log.serve.mcp_server import serve

    with opened(folder, bib) as found:
        serve(found, write=write, http=http)


def lsp() -> None:
    """Serve the log to an editor, by the Language Server Protocol over stdin and stdout.

    Problems, completion of events and keys, hover, definition, references, rename of a key.

    [bold]Example[/bold], in an editor's settings for Markdown

      command: modgraft, arguments: log lsp
    """
    with _extra("the language server"):
        from modgraft.log.serve.lsp import main
    main()


@contextmanager
def _extra(what: str) -> Iterator[None]:
    """Turn a missing package into an error that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRA:
            raise
        raise ModgraftError(
            f'{what} needs {error.name}, which is not installed: pip install "modgraft[log]"'
        ) from error
