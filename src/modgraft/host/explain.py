"""The table of ``host.plan("…")``: how a composition is computed at each kind of site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from modgraft.computation.base import KeyValueComposition, ParameterComposition, TokenComposition
from modgraft.core.expression import Expression
from modgraft.core.layers import weight_matrix
from modgraft.core.patterns import starred
from modgraft.core.per_example import Each
from modgraft.core.tables import Page, table
from modgraft.engine.kernels.batched import Batched
from modgraft.engine.plan import Entry, Group, Plan
from modgraft.engine.state import STATE, State
from modgraft.host.describe import rows_of
from modgraft.routing.mixture import RoutedMixture

COLUMNS = ("sites at", "number", "examples", "without gradients", "with gradients")


class Way(NamedTuple):
    """How a step is computed, in words."""

    without_gradients: str
    with_gradients: str


def _same(text: str) -> Way:
    return Way(text, text)


_READ = _same("the weight, changed where it is read")


def explain(model: nn.Module, composition: Expression | None) -> Page:
    """Explain ``composition`` by a table with a row for sites of one role that compute alike."""
    title = f"{'the bare host' if composition is None else composition}"
    if composition is None:
        return Page(f"{title}: every site runs as it is")
    roles: dict[tuple[str, object], str] = {
        (site.path, site.part): row.at for row in rows_of(model)[::-1] for site in row.sites
    }
    sites: dict[tuple[str, str, Way], int] = {}
    for path, layer in model.named_modules():
        state: State | None = layer.__dict__.get(STATE)
        if state is None:
            continue
        examples: dict[tuple[str, Way], int] = {}
        plan = state.plan(composition)
        for group in plan.groups:
            entries = [e for some in group.entries.values() for e in some]
            key = _role(path, entries, roles), _way(layer, state, group, plan)
            examples[key] = examples.get(key, 0) + _count(group, composition)
        for (at, way), count in examples.items():
            row = at, f"{count}" if isinstance(composition, Each) else "all", way
            sites[row] = sites.get(row, 0) + 1
    cells = [(at, f"{number}", rows, *way) for (at, rows, way), number in sites.items()]
    return Page(title, table(COLUMNS, cells))


def _count(group: Group, composition: Expression) -> int:
    if group.rows is not None:
        return len(group.rows)
    return len(composition.rows) if isinstance(composition, Each) else 0


def _role(path: str, entries: Sequence[Entry], roles: dict[tuple[str, object], str]) -> str:
    """Return a selection of the sites of ``entries``: their roles, or the path with ``*`` for
    numbers."""
    found = dict.fromkeys(roles.get((path, entry.part)) for entry in entries)
    known = [role for role in found if role is not None]
    return ", ".join(known) or starred(path) or "the input"


def _way(layer: nn.Module, state: State, group: Group, plan: Plan) -> Way:
    each = isinstance(plan.composition, Each)
    first = None if each or not group.changes else _changed(layer, group)
    left = group.expression if first is None else group.rest
    steps = [] if first is None else [first]
    for name in () if left is None else left.names():
        for entry in group.entries.get(name, ()):
            read = entry.inside and type(layer).__mro__[1].forward is nn.Module.forward
            steps.append(_READ if read else _step(entry, state, plan, group))
    return Way(*("; ".join(dict.fromkeys(texts)) for texts in zip(*steps, strict=True)))


def _changed(layer: nn.Module, group: Group) -> Way | None:
    """Say how the first changes of weights are computed together; None if each alone."""
    changes = group.changes
    only = changes[0]
    alone = type(only.module).fused_forward is not ParameterComposition.fused_forward
    if alone and len(changes) == 1 and only.weight == 1 and only.part is None:
        return _same("the layer once, rescaled")
    if not isinstance(layer, nn.Linear | Conv1D) or not all(
        c.module.is_weight_change for c in changes
    ):
        return None
    outs, ins = weight_matrix(layer).shape
    low = all(change.module.factors() is not None for change in changes)
    one = "one product, factorised," if low else "one product with θ + Δ"
    product = f"{one} from {-(-outs * ins // (outs + ins))} tokens on, effects below"
    merged = f"{product}; from the second step of a generate on, one product"
    return Way(product if low or group.merged is None else merged, product)


def _routed(entry: Entry, state: State, group: Group) -> Way:
    """Say how a mixture is computed: in one batch where few modules are picked, else in turn."""
    routed = entry.module
    assert isinstance(routed, RoutedMixture)  # noqa: S101
    mixture, members = routed.mixture, [group.entries.get(n, ()) for n in routed.members]
    here = sum(map(bool, members))
    text = f"{entry.name}: routed over {here} modules"
    if mixture.router is None or mixture.router.level == "task":
        return _same(f"{text}, one after another")
    stacked = mixture.aggregate.is_weighted_sum and state.expert_batch(routed, members) is not None
    batch = "picked by few, in one batch over stacked tensors; by more than half, one after another"
    picked = batch if stacked else "those picked, one after another"
    with torch.enable_grad():
        all_run = not mixture.route.sparse
    return Way(
        f"{text}, {picked}",
        f"{text}, all of them one after another" if all_run else f"{text}, {picked}",
    )


def _step(entry: Entry, state: State, plan: Plan, group: Group) -> Way:
    module = entry.module
    if isinstance(module, Batched):
        kind = "effects" if module.is_weight_change else "functions"
        batched = f"{kind} of {len(module.different)} modules, one batch over stacked tensors"
        return Way(f"{batched} once a call", batched)
    if isinstance(module, RoutedMixture):
        return _routed(entry, state, group)
    if isinstance(module, TokenComposition):
        return _same("tokens before the input")
    if isinstance(module, KeyValueComposition):
        before = "keys and values before the layer's own"
        return Way(f"{before}, made once a call" if plan.keeps_keys_values else before, before)
    if entry.inside:
        return _same("the layer, run with changed weights")
    kind = "effect" if isinstance(module, ParameterComposition) else "function"
    kind += " in the residual" if entry.residual else ""
    by_turns = isinstance(plan.composition, Each)
    return _same(
        f"{kind}, one composition after another" if by_turns else f"{kind} of {entry.name}"
    )
