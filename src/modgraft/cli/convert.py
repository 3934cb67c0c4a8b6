"""``modgraft convert``: a module's folder in another tool's format, or another tool's in ours."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modgraft.cli.inspect import read_model
from modgraft.cli.options import Strict, any_settings

if TYPE_CHECKING:
    from modgraft.store.card import Card


def convert(
    folder: Annotated[Path, typer.Argument(help="What host.save, PEFT or AdapterHub wrote.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="modgraft, peft or adapterhub.")] = "modgraft",
    host: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model it is for, a folder or a hub name; left out, what the folder names.",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--class",
            metavar="NAME",
            help="The model's class, where it was trained with another one than config.json says: "
            "BertForSequenceClassification.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="A value of the model's config: num_labels=3."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What to call the module; left out, as it is called there.")
    ] = None,
    strict: Strict = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Write a module in another format.

    The model is needed, since formats name its layers in their own ways. What the other format has
    no place for is refused, and nothing is written then. Metrics, licence and description go along,
    in the card or, of other tools, README.md.

    [bold]Examples[/bold]

      modgraft convert modules/qa ./qa-for-peft --to peft --host bert-base-uncased

      modgraft convert ./some-peft-adapter modules/theirs

      modgraft convert ./classifier-lora modules/c --host bert-base-uncased
      --class BertForSequenceClassification --set num_labels=3
    """
    from modgraft.core.errors import ModgraftError
    from modgraft.host.host import Host
    from modgraft.store.folder import FILE, stored

    if out.resolve() == folder.resolve():
        raise ModgraftError(f"{out} is what is read; write to another folder")
    model = host or named_host(folder)
    read = read_model(model, True, kind, any_settings(settings))
    made: Any = Host(read.eval())
    source = stored(folder, read).card
    made.load(folder, name, strict=strict)
    names = list(made.implants)
    one = len(source.names) == 1 and not source.together
    own = (folder / FILE).exists()
    about = _about(folder, source, own)
    made.save(
        (name or source.names[0]) if one else None, out, format=to,
        **(about if to == "modgraft" else {}),
    )  # fmt: skip
    written = stored(out, read)
    written.read()  # raises for what cannot be read again
    _write_page(folder, out, written.card.described(about), own, to)
    modules = [
        {"name": saved.name, "method": saved.method(out).brief(), "sites": len(saved.sites)}
        for saved in written.card.modules
    ]
    said = {"folder": str(folder), "out": str(out), "format": to, "host": model, "from": names}
    if as_json:
        typer.echo(json.dumps({**said, "modules": modules}, indent=2))
        return
    for each in modules:
        typer.echo(f"{out}: {each['name']}, {each['method']} at {each['sites']} sites, as {to}")


def _about(folder: Path, card: "Card", own: bool) -> dict[str, Any]:
    """Return what is known of the modules in a folder, which another tool says in README.md."""
    from modgraft.core.errors import CheckpointError
    from modgraft.store.card import ABOUT, Card
    from modgraft.store.file import read_small
    from modgraft.store.folder import README
    from modgraft.store.readme import read_readme

    page = folder / README
    if not own:
        try:
            return read_readme(read_small(page).decode(errors="replace")) if page.exists() else {}
        except CheckpointError as error:
            typer.echo(f"{page}: {error}; what it says is not in the card", err=True)
            return {}
    nothing = Card(names=card.names, modules=card.modules)
    said = {field: getattr(card, field) for field in ABOUT}
    return {field: value for field, value in said.items() if value != getattr(nothing, field)}


def _write_page(folder: Path, out: Path, card: "Card", own: bool, to: str) -> None:
    """Write README.md: somebody's own page is copied, and another tool's folder has one of ours."""
    from modgraft.core.files import write_text
    from modgraft.store.file import read_small
    from modgraft.store.folder import README
    from modgraft.store.readme import WRITTEN, readme

    page, libraries = folder / README, {"peft": "peft", "adapterhub": "adapter-transformers"}
    text = read_small(page).decode(errors="replace") if page.is_file() else ""
    if text and not (own and WRITTEN in text):
        write_text(out / README, text)
    elif to in libraries:
        write_text(out / README, readme(card, libraries[to]))


def named_host(folder: Path) -> str:
    """Return the model that a folder says it is for.

    Raises:
        MissingFileError: where there is no such folder.
        CheckpointError: for a folder without a module.
        ModgraftError: where it says none.
    """
    from modgraft.core.errors import CheckpointError, MissingFileError, ModgraftError
    from modgraft.core.files import read_json
    from modgraft.store.folder import FILE, found_in, native

    if not folder.is_dir():
        remedy = "Give the folder that host.save, PEFT or AdapterHub wrote"
        raise MissingFileError("there is no such folder", file=folder, remedy=remedy)
    if not (folder / FILE).exists() and found_in(folder) is None:
        more = ": a model is there, and convert writes modules" * (folder / "config.json").is_file()
        raise CheckpointError(f"there is no module in {folder}{more}")

    name: Any = None
    if (folder / FILE).exists():
        name = native(folder).card.base_model
    elif (folder / "adapter_config.json").is_file():
        remedy = "Copy the folder again"
        said = read_json(folder / "adapter_config.json", what="an adapter", remedy=remedy)
        name = said.get("base_model_name_or_path") or said.get("model_name")
    if not isinstance(name, str) or not name:
        raise ModgraftError(
            f"{folder} does not say which model it is for; name it: --host MODEL, a folder or a "
            f"hub name"
        )
    typer.echo(f"the host: {name}, as {folder} says", err=True)
    return name
