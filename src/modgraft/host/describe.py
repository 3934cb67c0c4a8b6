"""Tables of a host: its sites, the modules in it, and what trains.

Each row of sites begins with a selection that can be given as ``at=``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modgraft.core.errors import SiteError
from modgraft.core.expression import Expression, Weight
from modgraft.core.layers import WEIGHTED, open_modules, weight_labels, weight_matrix
from modgraft.core.patterns import starred
from modgraft.core.roles import roles_of
from modgraft.core.sites import Site, find
from modgraft.core.tables import Page, Table, table
from modgraft.engine.implant import Implants

SITES = ("sites at", "number", "first", "shape", "type")
MODULES = ("module", "method", "sites", "first", "parameters", "of the host", "trains", "in force")


@dataclass(frozen=True)
class Row:
    """A row of the table of sites: a selection ``at`` and the ``sites`` that it means."""

    at: str
    sites: Sequence[Site]

    @property
    def shape(self) -> str:
        """The weight ``out × in`` of a linear layer, the width of another; a `…` if they differ."""
        return _first_of(shape_of(site) for site in self.sites)

    @property
    def kind(self) -> str:
        """The type of its sub-modules; a `…` if they differ."""
        return _first_of(type(site.module).__name__ for site in self.sites)

    def cells(self) -> tuple[str, ...]:
        """Return the cells as text."""
        first = self.sites[0].label or "the host"
        return self.at, f"{len(self.sites)}", first, self.shape, self.kind


def shape_of(site: Site) -> str:
    """Return the weight's shape, ``"64 × 32"``, else the width of the output, or – if it is
    unknown."""
    shape = _weight_shape(site)
    try:
        return f"{site.width:,}" if shape is None else " × ".join(f"{n:,}" for n in shape)
    except SiteError:
        return "–"


def lora_cost(sites: Iterable[Site], rank: int) -> int | None:
    """Return the number of parameters of LoRA at ``sites``;

    None if it is not defined at one of them.
    """
    total = 0
    for site in sites:
        shape = _weight_shape(site)
        if shape is None or rank > min(shape[-2:]):
            return None
        total += math.prod(shape[:-2]) * rank * sum(shape[-2:])
    return total


def _weight_shape(site: Site) -> torch.Size | None:
    try:
        shape = weight_matrix(site.module, site.part, site.parameter).shape
    except SiteError:
        return None
    return shape if len(shape) > 1 else None


def rows_of(model: nn.Module) -> list[Row]:
    """Return the sites of ``model``: by role, and where roles are guessed, also by path pattern and
    type."""
    roles, rows = roles_of(model), []
    for role in roles.patterns:
        try:
            rows.append(Row(role, find(model, role)))
        except SiteError:  # a role that this member of the family lacks, such as an encoder alone
            continue
    return [*rows, *_by_pattern(model)] if roles.guessed else rows


def _by_pattern(model: nn.Module) -> list[Row]:
    groups: dict[tuple[str, type], list[str]] = {}
    modules = dict(open_modules(model))
    for path, module in modules.items():
        direct = next(module.parameters(recurse=False), None) is not None
        inner = not direct and any(True for _ in module.parameters())
        if path and (direct or (inner and not isinstance(module, nn.ModuleList | nn.Sequential))):
            groups.setdefault((starred(path), type(module)), []).append(path)
        if direct and not isinstance(module, WEIGHTED):
            for label, _ in weight_labels(path, module):  # the single weights of attention, RNNs, …
                if label not in modules:
                    groups.setdefault((starred(label), type(module)), []).append(label)
    rows = []
    for (pattern, _), labels in groups.items():
        for at in (pattern, _numbered(labels), "{" + ",".join(labels) + "}"):
            sites = find(model, at)
            if [site.label for site in sites] == labels:
                rows.append(Row(at, sites))
                break
    return rows


def _numbered(paths: Sequence[str]) -> str:
    """Write one pattern for several paths: ``"layer.{0,1}.ffn"``."""
    places = [
        list(dict.fromkeys(parts)) for parts in zip(*(p.split(".") for p in paths), strict=True)
    ]
    return ".".join(p[0] if len(p) == 1 else "{" + ",".join(p) + "}" for p in places)


def modules_table(model: nn.Module, implants: Implants, composition: Expression | None) -> Table:
    """Return the modules implanted in ``model``, one a row."""
    host_size = max(1, _size(model))
    weights = {} if composition is None else composition.weights()
    rows = []
    for name, implant in implants.items():
        learns = [p.requires_grad for p in implant.parameters()]
        rows.append(
            (
                name,
                implant.method.brief(),
                f"{len(implant.paths)}",
                implant.paths[0] or "the input",
                f"{implant.size:,}",
                f"{100 * implant.size / host_size:.2f} %",
                "yes" if learns and all(learns) else "in part" if any(learns) else "no",
                _in_force(implant.names, weights),
            )
        )
    return table(MODULES, rows)


def _in_force(names: Sequence[str], weights: Mapping[str, Weight]) -> str:
    """Return ``"yes"``, ``"× 0.5"`` or ``"no"``.

    For a module with several tasks, the active ones.
    """
    parts = []
    for name in (n for n in names if n in weights):
        weight = weights[name]
        weight = "by example" if not isinstance(weight, float) else _times(weight)
        parts.append(f"{name} {weight}".strip() if len(names) > 1 else weight or "yes")
    return ", ".join(parts) or "no"


def _times(weight: float) -> str:
    return "" if weight == 1 else f"× {weight:g}"


def sites_table(model: nn.Module) -> Table:
    """Return the sites of ``model``, one selection a row."""
    return table(SITES, [row.cells() for row in rows_of(model)])


def describe(
    model: nn.Module, implants: Implants, composition: Expression | None, waiting: Sequence[str]
) -> Page:
    """Return what ``print(host)`` shows: plain text, aligned, and tables of HTML in a notebook.

    The modules ``waiting`` are loaded, and read from their files at their first use.
    """
    every = nn.ModuleList([model, *implants.values()]).parameters()
    trains = sum(p.numel() for p in every if p.requires_grad)
    parts: list[str | Table] = [
        f"Host({type(model).__name__}): {_size(model):,} parameters, {trains:,} train; "
        f"in force: {composition or 'the bare host'}"
    ]
    if len(implants):
        parts.append(modules_table(model, implants, composition))
    if waiting:
        more = f" and {len(waiting) - 8:,} more" if len(waiting) > 8 else ""
        parts.append(f"read at the first use: {', '.join(waiting[:8])}{more}")
    roles = roles_of(model)
    if roles.guessed and roles.patterns:
        parts.append(
            f"{type(model).__name__} is of no known family; roles guessed from names and shapes: "
            f"{', '.join(roles.patterns)}"
        )
    parts.append(sites_table(model))
    return Page(*parts)


def _first_of(values: Iterable[str]) -> str:
    found = list(dict.fromkeys(values))
    return found[0] + (" …" if len(found) > 1 else "")


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
