"""``modgraft hub``: modules with versions, in a folder or anywhere else."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from modgraft.cli import hub_show
from modgraft.cli.hub_options import (
    Dry,
    Json,
    Where,
    Yes,
    as_address,
    found,
    opened,
    say,
)

hub = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Share modules, with versions: in a folder, at a URL, on the Hugging Face Hub.

    Your hub is a folder, $MODGRAFT_HUB or ~/.local/share/modgraft/hub; --hub names another one, or
    a URL. It needs no server.

      modgraft hub push modules/qa          adds what host.save wrote, as qa@1

      modgraft hub list

      modgraft hub pull qa ./qa             or, in Python, host.load("hub:qa")

    An ADDRESS is NAME, NAME@VERSION or NAME@TAG on the hub; hf:USER/REPO@REVISION/FOLDER; a URL
    such as s3://bucket/qa; or a folder, as ./qa.
    """,
    epilog="Exits with 0; with 1 where something is refused, missing or broken, and nothing is "
    "changed then; with 2 for a command that cannot be read.",
)

_MOVE, _LOOK, _CHANGE = "Move modules", "Look", "Change a hub"


@hub.command("push", rich_help_panel=_MOVE)
def push(
    address: Annotated[
        str, typer.Argument(metavar="FOLDER|ADDRESS", help="What host.save wrote, or any module.")
    ],
    to: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|hf:USER/REPO", help="None: on the hub, by the name it was saved with."
        ),
    ] = None,
    tag: Annotated[str, typer.Option(help="What else to call this version: NAME@TAG.")] = "",
    private: Annotated[bool, typer.Option("--private", help="If hf: makes a repository.")] = False,
    where: Where = None,
    dry_run: Dry = False,
    as_json: Json = False,
) -> None:
    """Add a module to a hub as a new version, or upload it to the Hugging Face Hub.

    Versions are numbered. One whose hash is there already is not added again; none is ever changed.

    [bold]Examples[/bold]

      modgraft hub push modules/qa

      modgraft hub push modules/qa qa_squad --tag paper

      modgraft hub push modules/qa hf:me/qa-lora --private
    """
    from modgraft.store.hub import address as addresses

    if to is not None and to.startswith("hf:"):
        if tag or where is not None:
            raise typer.BadParameter(f"--tag and --hub are of a hub; write {to}@BRANCH")
    elif private:
        raise typer.BadParameter("--private is of hf:USER/REPO")
    place = opened(where)
    it = addresses.find(address if Path(address).is_dir() else as_address(address), hub=place)
    pushed = addresses.push(it, to or "", place, tag=tag, private=private, dry_run=dry_run)
    say({"address": pushed, "sha256": it.sha256}, as_json,
        f"{'would be ' * dry_run}{pushed}  {it.sha256[:12]}")  # fmt: skip


@hub.command("pull", rich_help_panel=_MOVE)
def pull(
    address: Annotated[str | None, typer.Argument(metavar="ADDRESS")] = None,
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
        into, named = Path(address or "."), None if where is None else opened(where)
        modules = Lock.read(lock).found(named)
        pulled = [(it, into / name) for name, it in modules.items()]
    else:
        it = found(address or "", opened(where))
        pulled = [(it, folder or Path(addresses.name_of(it.address)))]
    if not dry_run:
        for it, target in pulled:
            addresses.pull(it, target)
    rows = [{"folder": str(t), "address": f.address, "sha256": f.sha256} for f, t in pulled]
    say(rows, as_json, "\n".join(
        f"{r['folder']}: {'would be ' * dry_run}{r['address']}  {r['sha256'][:12]}" for r in rows
    ))  # fmt: skip


@hub.command("lock", rich_help_panel=_MOVE)
def lock(
    composition: Annotated[str, typer.Argument(help="What is to be the same everywhere.")],
    file: Annotated[Path, typer.Argument(help="The lock file.")] = Path("modules.lock.json"),
    module: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ADDRESS",
            help="Where a module is, if not on the hub. May be given again.",
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
    addresses = {name: as_address(text) for name, _, text in pairs}
    made = locks.lock(composition, addresses, hub=opened(where)).in_folder(file.parent)
    made.write(file)
    rows = [f"  {m.name}: {m.address}  {m.sha256[:12]}" for m in made.modules]
    text = "\n".join([f"{file}: {composition}", *rows])
    say({"file": str(file), **made.model_dump()}, as_json, text)


@hub.command("update", rich_help_panel=_MOVE)
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

    rows = update(path, None if where is None else opened(where), dry_run)
    lines = []
    for row in rows:
        if row.old == row.new:
            lines.append(f"{row.name}: {row.old} is the newest")
        else:
            lines.append(f"{row.name}: {row.old} → {row.new}{' (not done)' * dry_run}")
            lines.append(f"  {'; '.join(row.changes)}")
    say([asdict(row) for row in rows], as_json, "\n".join(lines))


hub.command("list", rich_help_panel=_LOOK)(hub_show.listing)
hub.command("search", rich_help_panel=_LOOK)(hub_show.search)
hub.command("show", rich_help_panel=_LOOK)(hub_show.show)
hub.command("verify", rich_help_panel=_LOOK)(hub_show.verify)


@hub.command("rename", rich_help_panel=_CHANGE)
def rename(
    name: Annotated[str, typer.Argument(help="The name on the hub.")],
    new: Annotated[str, typer.Argument(help="Another one.")],
    where: Where = None,
) -> None:
    """Give a module with all its versions another name; lock files keep the old one.

    [bold]Example[/bold]

      modgraft hub rename qa qa_squad
    """
    opened(where).rename(name, new)
    typer.echo(f"{name} is {new}")


@hub.command("remove", rich_help_panel=_CHANGE)
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME[@VERSION|@TAG]", help="On the hub.")],
    where: Where = None,
    yes: Yes = False,
    dry_run: Dry = False,
) -> None:
    """Remove NAME@VERSION, or every version of NAME; their numbers are not given again.

    Of NAME@TAG the tag alone is removed, so that another version may have it.

    [bold]Examples[/bold]

      modgraft hub remove qa@1

      modgraft hub remove qa@paper

      modgraft hub remove qa --yes
    """
    place = opened(where)
    stays, gone = place.versions(name), place.remove(name, dry_run=True)
    more = "" if gone == stays else f", a tag; {stays[0]} stays"
    if dry_run:
        typer.echo(f"would be removed: {', '.join(gone)}{more}")
        return
    if not yes and not more:
        typer.confirm(f"Remove {', '.join(gone)} from {place.address}, for good?", abort=True)
    typer.echo(f"removed: {', '.join(place.remove(name))}{more}")
