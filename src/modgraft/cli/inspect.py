"""``modgraft inspect``: list a model's sites, what a selection matches, which modules fit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

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
) -> nn.Module:
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
    import transformers
    from transformers import AutoConfig

    from modgraft.core.errors import DataError

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(
            "no config.json here", file=folder,
            remedy="Give a folder that model.save_pretrained(folder) wrote, or a hub name",
        )  # fmt: skip
    if folder.is_file() or (not folder.exists() and name.count("/") != 1 and "/" in name):
        raise DataError(
            "this is no folder", file=name,
            remedy="Give a folder with a config.json, or a hub name such as bert-base-uncased",
        )  # fmt: skip
    if not folder.exists():
        what = "config.json and the weights" if weights else "config.json, no weights,"
        typer.echo(f"fetching {what} of {name} from the Hugging Face hub", err=True)
    try:
        config = AutoConfig.from_pretrained(name, **(settings or {}))
        made = _class_of(config) if kind is None else getattr(transformers, kind, None)
        if made is None:
            raise DataError(
                f"transformers {transformers.__version__} has no {kind}", file=name,
                remedy="Name a class of it, such as BertForSequenceClassification",
            )  # fmt: skip
        if weights:
            return made.from_pretrained(name, config=config)
        with torch.device("meta"):  # only shapes, so that size does not matter
            return made(config)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        remedy = (
            "See whether its config.json is whole, and its model_type one that transformers "
            f"{transformers.__version__} knows; any other model: print(mg.Host(model)) in Python"
            if folder.exists()
            else "See the name and the network, or give a folder that you have"
        )
        raise DataError(first.rstrip("."), file=name, remedy=remedy) from error


def _class_of(config: Any) -> Any:
    """Return the class that ``config.architectures`` names, else the base model of its type."""
    import transformers

    for name in config.architectures or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
        typer.echo(f"transformers has no {name}; the bare model is shown", err=True)
    return transformers.AutoModel._model_mapping[type(config)]


def _overview(model: nn.Module) -> dict[str, Any]:
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


def _selection(model: nn.Module, at: Sequence[str], rank: int) -> dict[str, Any]:
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


def _card(model: nn.Module, folder: Path, weights: bool) -> list[dict[str, Any]]:
    """Describe saved modules: what they are, their size, and whether they fit this model."""
    from modgraft.core.errors import SiteError, UnknownNameError
    from modgraft.core.sites import located
    from modgraft.store.fingerprint import differences, is_in_another_precision
    from modgraft.store.folder import stored

    found = stored(folder, model)
    there, beside = found.card.host, found.card.beside
    differs = differences(model, there, beside, values=weights) if there else []
    rounded = is_in_another_precision(model, there, differs, beside)
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
        rows.append({
            "folder": str(folder),
            "name": saved.name,
            "type": saved.type,
            "config": saved.config,
            "method": method,
            "sites": len(saved.sites),
            "parameters": sum(
                math.prod(entry.shape)
                for key, entry in found.entries.items()
                if key.startswith(f"{saved.name}:")
            ),
            "fits": not differs and not absent,
            "compared": ["architecture", "shape", "config"] + ["weights", "buffers"] * weights,
            "differs": differs,
            "rounded": rounded,
            "absent": absent,
        })  # fmt: skip
    return rows


def _print(model: nn.Module, report: dict[str, Any]) -> None:
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
    from modgraft.host.describe import table

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
    from modgraft.host.describe import table

    rows = [
        (c["name"], c["method"], f"{c['sites']}", f"{c['parameters']:,}",
         _share(c["parameters"], total), _verdict(c))
        for c in cards
    ]  # fmt: skip
    console.print()
    columns = ("module", "method", "sites", "parameters", "of the model", "fits")
    show(console, table(columns, rows))


def show(console: Console, made: Table) -> None:
    """Print a table, fitted to the terminal or, in other outputs, at its full width."""
    from modgraft.host.describe import plain

    console.print(made if console.is_terminal else plain(made), soft_wrap=not console.is_terminal)


def _share(size: int, total: int) -> str:
    return f"{100 * size / max(1, total):.2f} %"


def _verdict(card: dict[str, Any]) -> str:
    if card["absent"]:
        return f"no: {len(card['absent'])} of its sites are not here, {card['absent'][0]} for one"
    if card["differs"]:
        other = "this host in another precision" if card["rounded"] else "another host"
        return f"no: {other} ({', '.join(card['differs'])})"
    return "yes" if "weights" in card["compared"] else "in shape; weights not compared (--weights)"
