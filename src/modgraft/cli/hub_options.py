"""What the commands of ``modgraft hub`` share: options, addresses as they are typed, answers."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from modgraft.store.hub.address import Found
    from modgraft.store.hub.hub import Hub

Where = Annotated[
    str | None,
    typer.Option(
        "--hub", metavar="FOLDER|URL", help="Another hub than yours: ./team, s3://bucket/modules."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Address = Annotated[
    str, typer.Argument(metavar="ADDRESS", help="qa, qa@2, qa@paper, hf:me/qa-lora, ./qa, a URL.")
]
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME[@VERSION]", help="None: all.")]


def opened(where: str | None) -> "Hub":
    """Return the hub of ``--hub``, or yours."""
    from modgraft.store.hub.hub import Hub

    return Hub(where)


def as_address(text: str) -> str:
    """Return an address: a word without ':' and '/' is a name on the hub."""
    return text if ":" in text or "/" in text else f"hub:{text}"


def found(text: str, hub: "Hub") -> "Found":
    """Find a module by what was typed."""
    from modgraft.store.hub.address import find

    return find(as_address(text), hub=hub)


def say(value: Any, as_json: bool, text: str) -> None:
    """Print an answer, as JSON or for people."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)
