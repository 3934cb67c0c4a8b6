"""``modgraft inspect``: list a model's sites, what a selection matches, which modules fit."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from torch import nn

    from modgraft.core.tables import Table
    from modgraft.store.stored import Stored

SHOWN = 8
"""The number of a selection's sites that are listed; --json lists all."""


def inspect(
    model: Annotated[
        str, typer.Argument(help="A folder that save_pretrained wrote, or a hub name.")
    ],
    at: Annotated[
        list[str] | None,
        typer.Option(help="A role or path pattern: what does it match? May be given again."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="The rank that --at counts LoRA's cost at.")] = 8,
    modules: Annotated[
        list[Path] | None,
        typer.Option(help="A saved module's folder: does it fit? May be given again."),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Read the weights too; else config.json is enough.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, nothing else.")] = False,
) -> None:
    """Show a model's sites by role, and what can be implanted where.

    [bold]Examples[/bold]

      modgraft inspect bert-base-uncased                    fetches its config.json alone

      modgraft inspect ./my-model --at query --at value --rank 16

      modgraft inspect ./my-model --modules modules/qa --weights
    """
    host = read_model(model, weights)
    report: dict[str, Any] = {"model": model, **_overview(host)}
    if at:
        report["selection"] = _selection(host, at, rank)
    if modules:
        report["modules"] = [row for each in modules for row in _card(host, each, weights)]
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    _print(host, report)


def read_model(
    name: str,
    weights: bool = False,
    kind: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> "nn.Module":
    """Create the model of a folder or hub name.

    Args:
        name: the folder's, or the hub's.
        weights: whether its weights are read too.
        kind: the name of its class; None: the one that its config names.
        settings: values of its config that are to be others.

    Raises:
        DataError: The folder has no config, the config cannot be read, the name cannot be fetched,
            or there is no such class.
    """
    import torch
    from transformers import AutoConfig

    from modgraft.core.errors import DataError, ModgraftError

    _check_is_a_model(name)
    values = dict(settings or {})
    cached = not Path(name).exists() and not _fetches(name, weights)
    try:
        found: Any = AutoConfig.from_pretrained(
            name, **values, return_unused_kwargs=True, local_files_only=cached
        )
        config, unused = found
        if unknown := unused.keys() & values.keys():
            raise DataError(
                f"a {type(config).__name__} has no {', '.join(sorted(unknown))}", file=name,
                remedy="See its config.json for those that --set can change",
            )  # fmt: skip
        made = _class_of(config) if kind is None else _class_named(kind, config, name)
        if weights:
            return made.from_pretrained(name, config=config, local_files_only=cached)
        with torch.device("meta"):  # only shapes, so that size does not matter
            return made(config)
    except ModgraftError:
        raise
    except Exception as error:  # transformers has others for each thing that may be wrong
        asked = [f"--set {key}={value}" for key, value in values.items()]
        asked = [*([] if kind is None else [f"--class {kind}"]), *asked]
        first = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise DataError(
            first.rstrip(".:"), file=name, remedy=_remedy(name, error, " ".join(asked))
        ) from error


def _check_is_a_model(name: str) -> None:
    """Refuse what is neither a folder with a config nor the name of a model on a hub."""
    from modgraft.core.errors import DataError

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(
            "no config.json here", file=folder,
            remedy="Give a folder that model.save_pretrained(folder) wrote, or a hub name",
        )  # fmt: skip
    if folder.is_file() or (not folder.exists() and not _may_be_on_a_hub(name)):
        raise DataError(
            "this is no folder", file=name,
            remedy="Give a folder with a config.json, or a hub name such as bert-base-uncased",
        )  # fmt: skip


def _fetches(name: str, weights: bool) -> bool:
    """Say what is fetched of a hub; return whether that can be reached."""
    what = "config.json and the weights" if weights else "config.json, no weights,"
    typer.echo(f"fetching {what} of {name} from the Hugging Face hub", err=True)
    reached = _answers()
    if not reached:
        typer.echo("the hub cannot be reached: what is not in its cache is missing", err=True)
    return reached


def _remedy(name: str, error: Exception, asked: str) -> str:
    """Return what to do where transformers did not make the model.

    Args:
        name: the folder's, or the hub's.
        error: its error.
        asked: the options that asked for another model than the config's own.
    """
    import transformers

    if asked or not isinstance(error, OSError | ValueError):
        return f"See whether {asked or 'its config.json'} is right for these weights"
    if not Path(name).exists():
        return "See the name and the network, or give a folder that you have"
    return (
        "See whether its config.json is whole, and its model_type one that transformers "
        f"{transformers.__version__} knows; any other model: print(mg.Host(model)) in Python"
    )


def _class_named(kind: str, config: Any, name: str) -> Any:
    """Return a class of transformers that makes models of a config.

    Raises:
        DataError: where there is none of that name, or it makes others.
    """
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    from modgraft.core.errors import DataError

    found: Any = getattr(transformers, kind, None)
    if not isinstance(found, type):
        found = None
    elif issubclass(found, _BaseAutoModelClass):
        found = found._model_mapping.get(type(config), None)  # type: ignore[union-attr]
    elif not issubclass(found, transformers.PreTrainedModel):
        found = None
    own = getattr(found, "config_class", None)
    if own is not None and isinstance(config, own):
        return found
    of = f"makes models of a {own.__name__}" if own else "makes no models of it"
    raise DataError(
        f"its config is a {type(config).__name__}, and {kind} {of}", file=name,
        remedy=f"Name another class, such as {(config.architectures or ['AutoModel'])[0]}",
    )  # fmt: skip


def _may_be_on_a_hub(name: str) -> bool:
    """Return whether a model on the Hugging Face hub may be called so, and no path alone is."""
    return name.count("/") <= 1 and not name.startswith(("/", ".", "~")) and "\\" not in name


def _answers() -> bool:
    """Return whether the hub can be reached, whose library would try again for half a minute."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        return False
    if place.scheme in getproxies():  # then that is asked
        return True
    port = place.port or {"http": 80}.get(place.scheme, 443)
    try:
        socket.create_connection((place.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True


def _class_of(config: Any) -> Any:
    """Return the class that ``config.architectures`` names, else the base model of its type."""
    import transformers

    for name in config.architectures or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
        typer.echo(f"transformers has no {name}; the bare model is shown", err=True)
    return transformers.AutoModel._model_mapping[type(config)]


def _overview(model: "nn.Module") -> dict[str, Any]:
    from modgraft.core.roles import roles_of
    from modgraft.host.describe import rows_of

    roles = roles_of(model)
    return {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "roles": not roles.guessed,
        "guessed": list(roles.patterns) if roles.guessed else [],
        "sites": [
            {
                "at": row.at,
                "paths": [site.label for site in row.sites],
                "shape": row.shape,
                "type": row.kind,
            }
            for row in rows_of(model)
        ],
    }


def _selection(model: "nn.Module", at: Sequence[str], rank: int) -> dict[str, Any]:
    from modgraft.core.sites import find
    from modgraft.host.describe import lora_cost, shape_of

    sites = find(model, list(at))
    return {
        "at": list(at),
        "sites": [
            {"path": s.label, "shape": shape_of(s), "type": type(s.module).__name__} for s in sites
        ],
        "rank": rank,
        "lora_parameters": lora_cost(sites, rank),
    }


def _card(model: "nn.Module", folder: Path, weights: bool) -> list[dict[str, Any]]:
    """Describe saved modules: what they are, their size, and whether they fit this model.

    Raises:
        CheckpointError: for a folder that holds no modules.
    """
    from modgraft.core.errors import ModgraftError, SiteError, UnknownNameError
    from modgraft.core.sites import located
    from modgraft.store.fingerprint import differences, is_in_another_precision
    from modgraft.store.folder import FILE, stored
    from modgraft.store.formats.base import found_in
    from modgraft.store.within import beside_within

    row: dict[str, Any] = {
        "folder": str(folder), "name": folder.name, "type": None, "config": {}, "method": "–",
        "sites": 0, "parameters": 0, "fits": False, "differs": [], "rounded": False, "absent": [],
        "compared": ["architecture", "shape", "config"] + ["weights", "buffers"] * weights,
    }  # fmt: skip
    try:
        found = stored(folder, model)
    except ModgraftError as error:
        if not (folder / FILE).exists() and found_in(folder) is None:
            raise
        return [row | {"refused": str(error).removeprefix(f"{folder}: ")}]
    there, beside, part = found.card.host, beside_within(found), model.get_submodule(found.within)
    differs = differences(part, there, beside, values=weights) if there else []
    rounded = is_in_another_precision(part, there, differs, beside)
    rows = []
    for saved in found.card.modules:
        absent = []
        for label in saved.sites:
            try:
                located(model, [label])
            except SiteError:
                absent.append(label)
        try:
            method = saved.method(folder).brief()
        except UnknownNameError:  # a class of the user's, which is not imported here
            method = f"{saved.type}(…)"
        rows.append(row | {
            "name": saved.name,
            "type": saved.type,
            "config": saved.config,
            "method": method,
            "sites": len(saved.sites),
            "parameters": sum(
                math.prod(entry.shape)
                for key, entry in found.entries().items()
                if key.startswith(f"{saved.name}:")
            ),
            "differs": differs,
            "rounded": rounded,
            "absent": absent,
        })  # fmt: skip
    any_absent = any(each["absent"] for each in rows)
    refused = "" if differs or any_absent else _refused(model, found)
    return [
        each | {"fits": not (differs or each["absent"] or refused), "refused": refused}
        for each in rows
    ]


def _refused(model: "nn.Module", found: "Stored") -> str:
    """Return why a model refuses modules that are loaded into it, "" where it takes them."""
    from modgraft.core.errors import ModgraftError, UnknownNameError
    from modgraft.host.host import Host
    from modgraft.store.folder import load

    card = found.card.model_copy(update={"host": {}})  # which was compared
    host = Host(model)
    try:
        load(host, replace(found, card=card), None, strict=False, active=False)
    except UnknownNameError:  # a class of the user's, which is not imported here
        return ""
    except ModgraftError as error:
        return str(error).removeprefix(f"{found.folder}: ")
    except RuntimeError:  # a model without weights has no values for what a method asks of them
        if all(not parameter.is_meta for parameter in model.parameters()):
            raise
        return ""
    for name in reversed(list(host.implants)):
        host.remove(name)
    return ""


def _print(model: "nn.Module", report: dict[str, Any]) -> None:
    from modgraft.host.describe import sites_table

    console = Console(highlight=False, markup=False)
    console.print(f"{report['architecture']}: {report['parameters']:,} parameters")
    if not report["roles"]:
        guessed = ", ".join(report["guessed"])
        how = f"; roles guessed from names and shapes: {guessed}" if guessed else ""
        console.print(f"of no family whose roles are known{how}", soft_wrap=True)
    console.print()
    show(console, sites_table(model))
    if "selection" in report:
        _print_selection(console, report["selection"], report["parameters"])
    if "modules" in report:
        _print_modules(console, report["modules"], report["parameters"])


def _print_selection(console: Console, chosen: dict[str, Any], total: int) -> None:
    from modgraft.core.tables import table

    sites, rank, cost = chosen["sites"], chosen["rank"], chosen["lora_parameters"]
    console.print(f"\n{', '.join(chosen['at'])}: {len(sites)} sites")
    if cost is None:
        console.print(f"LoRA(rank={rank}) needs a weight matrix of that rank at every one of them")
    else:
        console.print(f"LoRA(rank={rank}): {cost:,} parameters, {_share(cost, total)} of the model")
    rows = [(s["path"], s["shape"], s["type"]) for s in sites[:SHOWN]]
    if len(sites) > SHOWN:
        rows.append((f"and {len(sites) - SHOWN} more", "", ""))
    console.print()
    show(console, table(("site", "shape", "type"), rows))


def _print_modules(console: Console, cards: Sequence[dict[str, Any]], total: int) -> None:
    from modgraft.core.tables import table

    rows = [
        (c["name"], c["method"], f"{c['sites']}", f"{c['parameters']:,}",
         _share(c["parameters"], total), _verdict(c))
        for c in cards
    ]  # fmt: skip
    console.print()
    columns = ("module", "method", "sites", "parameters", "of the model", "fits")
    show(console, table(columns, rows))


def show(console: Console, made: "Table") -> None:
    """Print a table, fitted to the terminal or, in other outputs, at its full width."""
    console.print(made if console.is_terminal else str(made), soft_wrap=not console.is_terminal)


def _share(size: int, total: int) -> str:
    return f"{100 * size / max(1, total):.2f} %"


def _verdict(card: dict[str, Any]) -> str:
    if card["refused"]:
        return f"no: {card['refused']}"
    if card["absent"]:
        return f"no: {len(card['absent'])} of its sites are not here, {card['absent'][0]} for one"
    if card["differs"]:
        other = "this host in another precision" if card["rounded"] else "another host"
        return f"no: {other} ({', '.join(card['differs'])})"
    return "yes" if "weights" in card["compared"] else "in shape; weights not compared (--weights)"
