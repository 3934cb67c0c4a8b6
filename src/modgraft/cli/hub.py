"""``modgraft hub``: modules with versions, in a folder or anywhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from modgraft.store.hub.address import Found
    from modgraft.store.hub.hub import Hub
    from modgraft.store.hub.search import Listed

hub = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Modules with versions. NAME and NAME@VERSION are on your hub: the folder or URL of --hub "
    "or $MODGRAFT_HUB, else ~/.local/share/modgraft/hub. An ADDRESS is one of these, "
    "hf:USER/REPO@REVISION/FOLDER, a URL such as s3://bucket/qa, or a folder, as ./qa.",
)

Where = Annotated[
    str | None, typer.Option("--hub", metavar="FOLDER|URL", help="Another hub than yours.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Address = Annotated[str, typer.Argument(metavar="ADDRESS")]
Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]…", help="None: all.")]


# -- moving modules ------------------------------------------------------------------------------


@hub.command("push")
def push(
    address: Address,
    to: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|hf:USER/REPO]", help="None: the name it was saved with."),
    ] = None,
    tag: Annotated[str, typer.Option(help="A version's name; none: the next number.")] = "",
    private: Annotated[bool, typer.Option("--private", help="If hf: makes a repository.")] = False,
    where: Where = None,
    dry_run: Dry = False,
    as_json: Json = False,
) -> None:
    """Add a module to a hub as a new version, or upload it to the Hugging Face Hub.

    What is there already, by its hash, is not added again; no version is ever overwritten.

    [bold]Examples[/bold]

      modgraft hub push modules/qa

      modgraft hub push modules/qa qa_squad --tag paper

      modgraft hub push modules/qa hf:me/qa-lora --private
    """
    from modgraft.store.folder import FILE
    from modgraft.store.hub import huggingface
    from modgraft.store.hub.remote import check_file

    found, place = _found(address, where, local=True), _hub(where)
    if to is not None and to.startswith("hf:"):
        repo = huggingface.Place.read(to)
        if found.card is not None:
            check_file(found.folder / FILE, found.sha256, found.address)
        pushed = to
        if not dry_run:
            message = (
                f"{', '.join(found.card.names) if found.card else 'Module'} {found.sha256[:12]}"
            )
            pushed = huggingface.push(found.folder, repo, message, private)
    else:
        name = (to or "").removeprefix("hub:")
        pushed = place.push(found.folder, name, tag, dry_run=dry_run).address
    _say({"address": pushed, "sha256": found.sha256}, as_json,
         f"{'would be ' * dry_run}{pushed}  {found.sha256[:12]}")  # fmt: skip


@hub.command("pull")
def pull(
    address: Annotated[str | None, typer.Argument(metavar="[ADDRESS]")] = None,
    folder: Annotated[
        Path | None, typer.Argument(help="None: a new folder here, of the module's name.")
    ] = None,
    lock: Annotated[
        Path | None, typer.Option(help="A lock file: exactly its modules, each to FOLDER/NAME.")
    ] = None,
    where: Where = None,
    dry_run: Dry = False,
    as_json: Json = False,
) -> None:
    """Copy a module to a folder and verify it; a module that is there is replaced at once.

    [bold]Examples[/bold]

      modgraft hub pull qa@2 modules/qa

      modgraft hub pull hf:me/qa-lora@main modules/qa

      modgraft hub pull --lock mix.lock.json modules
    """
    from modgraft.store.hub import address as addresses
    from modgraft.store.hub.lock import Lock

    if (address is None and lock is None) or (folder is not None and lock is not None):
        raise typer.BadParameter("give ADDRESS [FOLDER], or --lock FILE [FOLDER]")
    if lock is not None:
        into = Path(address or ".")
        modules = Lock.read(lock).modules
        pulled = [(m.found(lock.parent, _hub(where)), into / m.name) for m in modules]
    else:
        found = _found(address or "", where)
        pulled = [(found, folder or Path(addresses.name_of(found.address)))]
    if not dry_run:
        for found, target in pulled:
            addresses.pull(found, target)
    rows = [{"folder": str(t), "address": f.address, "sha256": f.sha256} for f, t in pulled]
    _say(rows, as_json, "\n".join(
        f"{r['folder']}: {'would be ' * dry_run}{r['address']}  {r['sha256'][:12]}" for r in rows
    ))  # fmt: skip


@hub.command("lock")
def lock(
    composition: Annotated[str, typer.Argument(help="What is to be the same everywhere.")],
    file: Annotated[Path, typer.Argument(help="The lock file.")] = Path("modules.lock.json"),
    module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ADDRESS",
            help="Where a module is, if not on your hub. May be given again.",
        ),
    ] = None,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """Write a lock file, which names the exact modules of a composition; host.load(FILE) loads it.

    [bold]Examples[/bold]

      modgraft hub lock "0.5*qa + style"

      modgraft hub lock "fr >> qa" mix.lock.json --module fr=hf:me/fr-lora
    """
    from modgraft.store.hub import lock as locks

    pairs = [each.partition("=") for each in module or ()]
    if wrong := next((name for name, _, address in pairs if not address), None):
        raise typer.BadParameter(f"--module {wrong}: write NAME=ADDRESS, as fr=hf:me/fr-lora")
    made = locks.lock(
        composition, {name: _address(text) for name, _, text in pairs}, file.parent, _hub(where)
    )
    made.write(file)
    rows = [f"  {m.name}: {m.address}  {m.sha256[:12]}" for m in made.modules]
    text = "\n".join([f"{file}: {composition}", *rows])
    _say({"file": str(file), **made.model_dump()}, as_json, text)


@hub.command("update")
def update(
    path: Annotated[
        Path, typer.Argument(help="A lock file, or a folder of a module that was pulled.")
    ],
    where: Where = None,
    dry_run: Dry = False,
    as_json: Json = False,
) -> None:
    """Look for newer versions, say what changes, and bring them.

    A lock file's modules are asked for as they were when it was written; a folder's is found on
    the hub by its hash.

    [bold]Examples[/bold]

      modgraft hub update modules.lock.json --dry-run

      modgraft hub update modules/qa
    """
    from modgraft.store.hub.update import update

    rows = update(path, _hub(where), dry_run)
    lines = []
    for row in rows:
        if row.old == row.new:
            lines.append(f"{row.name}: {row.old} is the newest")
        else:
            lines.append(f"{row.name}: {row.old} → {row.new}{' (not done)' * dry_run}")
            lines.append(f"  {'; '.join(row.changes)}")
    _say([asdict(row) for row in rows], as_json, "\n".join(lines))


# -- looking -------------------------------------------------------------------------------------


@hub.command("list")
def listing(names: Names = None, where: Where = None, as_json: Json = False) -> None:
    """List the versions on a hub.

    [bold]Example[/bold]

      modgraft hub list
    """
    place = _hub(where)
    rows = [row for row in place.listed() if not names or row.name in names]
    for name in names or ():
        place.find(name)
    _print_rows(rows, as_json, f"nothing on the hub {place.address}")


@hub.command("search")
def search(
    text: Annotated[list[str] | None, typer.Argument(metavar="[WORD]…")] = None,
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

    place, folder = _hub(where), Path(host)
    is_model = bool(host) and (folder / "config.json").is_file()
    rows = place.search(
        " ".join(text or ()), host="" if is_model else host, task=task, kind=kind,
        metrics=metric or (),
    )  # fmt: skip
    if is_model:
        from modgraft.cli.inspect import read_model

        model = read_model(host)
        rows = [r for r in rows if not differences(model, r.card.host, r.card.beside, values=False)]
    _print_rows(rows, as_json, f"nothing of that on the hub {place.address}")


@hub.command("show")
def show(address: Address, where: Where = None, as_json: Json = False) -> None:
    """Show a module's card.

    [bold]Examples[/bold]

      modgraft hub show qa

      modgraft hub show hf:me/qa-lora
    """
    from rich.markdown import Markdown

    from modgraft.store.readme import readme

    found = _found(address, where)
    if as_json:
        card = json.loads(found.card.to_text()) if found.card else None
        _say({"address": found.address, "sha256": found.sha256, "card": card}, True, "")
        return
    console = Console(highlight=False, markup=False)
    console.print(f"{found.address}  {found.sha256}", soft_wrap=True)
    if found.card is None:
        files = ", ".join(sorted(path.name for path in found.folder.iterdir()))
        console.print(f"another tool's module, without a card: {files}", soft_wrap=True)
        return
    text = readme(found.card).split("---\n", 2)[2].strip()
    console.print(Markdown(text) if console.is_terminal else text)


@hub.command("verify")
def verify(names: Names = None, where: Where = None, as_json: Json = False) -> None:
    """Read modules to the last bit, on a hub or in folders (./qa); exit with 1 if one is broken.

    [bold]Examples[/bold]

      modgraft hub verify

      modgraft hub verify qa@2 ./modules/style
    """
    from modgraft.store.verify import verify as verify_folder

    place, found = _hub(where), {}
    for name in names or [""]:
        if name and "/" in name:
            report = verify_folder(Path(name))
            found[name] = "" if report.whole else "; ".join(report.problems)
        else:
            found |= place.verify(name)
    rows = [{"address": a, "whole": not why, "why": why} for a, why in found.items()]
    text = "\n".join(f"{a}: {why or 'whole'}" for a, why in found.items())
    _say(rows, as_json, text or f"nothing on the hub {place.address}")
    if any(found.values()):
        raise typer.Exit(1)


# -- changing ------------------------------------------------------------------------------------


@hub.command("rename")
def rename(name: str, new: str, where: Where = None) -> None:
    """Give a module with all its versions another name; lock files keep the old one.

    [bold]Example[/bold]

      modgraft hub rename qa qa_squad
    """
    _hub(where).rename(name, new)
    typer.echo(f"{name} is {new}")


@hub.command("remove")
def remove(name: str, where: Where = None, yes: Yes = False, dry_run: Dry = False) -> None:
    """Remove NAME@VERSION, or every version of NAME.

    [bold]Examples[/bold]

      modgraft hub remove qa@1

      modgraft hub remove qa --yes
    """
    place = _hub(where)
    gone = place.versions(name)
    if dry_run:
        typer.echo(f"would be removed: {', '.join(gone)}")
        return
    if not yes:
        typer.confirm(f"Remove {', '.join(gone)} from {place.address}, for good?", abort=True)
    typer.echo(f"removed: {', '.join(place.remove(name))}")


# -- words and tables ----------------------------------------------------------------------------


def _hub(where: str | None) -> Hub:
    from modgraft.store.hub.hub import Hub

    return Hub(where)


def _address(text: str) -> str:
    """Return an address: a word without ':' and '/' is a name on the hub."""
    return text if ":" in text or "/" in text else f"hub:{text}"


def _found(text: str, where: str | None, local: bool = False) -> Found:
    """Find a module; with ``local``, a folder that is there may be written without a slash."""
    from modgraft.store.hub.address import find

    is_folder = local and Path(text).is_dir()
    return find(text if is_folder else _address(text), hub=_hub(where))


def _say(value: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)


def _print_rows(rows: Sequence[Listed], as_json: bool, none: str) -> None:
    """Print versions as a table, or as JSON with their cards."""
    from modgraft.cli.inspect import show as show_table
    from modgraft.host.describe import table
    from modgraft.store.hub.remote import in_bytes

    if as_json or not rows:
        said = [
            {"name": r.name, "version": r.version, "address": r.address, "bytes": r.size,
             "card": json.loads(r.card.to_text())}
            for r in rows
        ]  # fmt: skip
        _say(said, as_json, none)
        return
    cells = [
        (
            f"{r.name}@{r.version}",
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
