"""What a composition comes to at one site, worked out once and kept.

A site runs groups. A group is the examples that one composition acts on (all examples of a batch,
where there is one composition for all), with the modules that act there. Modules of one kind and
shape, one for each example, become one group over stacked tensors. A composition of parameter
modules alone becomes changes of the layer's weight. A plan follows the modules used, not the
modules implanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

import torch
from torch import Tensor

from modgraft.computation._redirect import is_redirected
from modgraft.computation.base import (
    Computation,
    InputComposition,
    KeyValueComposition,
    ParameterComposition,
)
from modgraft.core.expression import Chain, Expression, Name, chain
from modgraft.core.parts import Part
from modgraft.core.per_example import Each
from modgraft.engine.kernels.batched import Batched, batch_key
from modgraft.engine.kernels.linear import Change, MergedWeight
from modgraft.routing.mixture import RoutedMixture

_training = attrgetter("training")
Rows = list[int]


@dataclass(slots=True)  # a thousand modules have ten thousands of them
class Entry:
    """One module at one site.

    Attributes:
        name: what compositions call it.
        module: the computation built for the site, several batched as one, or a routed mixture.
        part: which part of a fused projection; None: the whole output.
        residual: whether it acts on the layer's residual input.
        parameter: which of the layer's weights it changes, where the layer has several.
        axis: the axis of the output's features.
        inside: whether it changes a weight that only the layer itself can run with.
    """

    name: str
    module: Computation | Batched | RoutedMixture
    part: Part | None
    residual: bool = False
    parameter: str | None = None
    axis: int = -1
    inside: bool = False

    @property
    def changes_weight(self) -> bool:
        """Whether it computes f at θ + Δ."""
        return isinstance(self.module, ParameterComposition) or (
            isinstance(self.module, Batched) and self.module.is_weight_change
        )

    @property
    def changes_output(self) -> bool:
        """Whether it acts on the layer's output, not inside the layer or before its input."""
        return self.parameter is None and not isinstance(self.module, InputComposition)


@dataclass
class Group:
    """Examples of a batch that one composition acts on, or compositions of one shape.

    Attributes:
        rows: which examples; None: all.
        expression: the composition, of the modules that are here.
        entries: those modules, by the name in the expression.
        changes: the changes of weights that the expression begins with.
        rest: what comes after them.
        merged: where the weight with those changes is kept.
        residual: whether a module acts on the layer's residual input.
        inside: the modules that change weights which only the layer itself can run with.
        keys_values: the names of the modules that put keys and values into attention.
        changes_output: whether a module acts on the layer's output.
        input_only: whether every module puts vectors before an input.
        single: whether it is one module, once.
        by_example: whether a module has to know which rows are an example's.
        by_weights: whether the weights of modules may differ between examples.
    """

    rows: list[int] | None
    expression: Expression
    entries: dict[str, list[Entry]]
    changes: list[Change] = field(default_factory=list)
    rest: Expression | None = None
    merged: MergedWeight | None = None
    _index: dict[tuple[torch.device, int, bool], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        every = [entry for some in self.entries.values() for entry in some]
        self.residual = any(entry.residual for entry in every)
        self.inside = [entry for entry in every if entry.inside]
        self.keys_values = [e.name for e in every if isinstance(e.module, KeyValueComposition)]
        self.changes_output = any(entry.changes_output for entry in every)
        self.single = len(every) == 1 and isinstance(self.expression, Name)
        self.by_example = any(map(_is_by_example, every))
        self.by_weights = any(map(_is_routed_by_example, every))
        self.input_only = all(isinstance(e.module, InputComposition) for e in every)
        if torch.compiler.is_dynamo_compiling():  # all weights are tensors there, and stay apart
            return
        self.by_weights = self.by_weights or self.expression.is_data
        first, self.rest = _weights_first(self.expression, self.entries)
        self.changes = [
            Change(entry.module, weight, entry.part, entry.parameter)  # type: ignore[arg-type]
            for name, weight in ({} if first is None else first.weights()).items()
            if weight != 0.0
            for entry in self.entries[name]
        ]
        if self.changes and self.rows is None:
            self.merged = MergedWeight()

    def index(self, like: Tensor, times: int) -> Tensor:
        """Return the group's rows of ``like``, where each example has ``times``, side by side."""
        assert self.rows is not None  # noqa: S101
        compiling = torch.compiler.is_dynamo_compiling()
        key = None if compiling else (like.device, times, torch.is_inference_mode_enabled())
        if compiling or key not in self._index:
            rows = [i * times + k for i in self.rows for k in range(times)]
            index = torch.tensor(rows, device=like.device)
            if key is None:
                return index
            self._index[key] = index
        return self._index[key]


def _is_by_example(entry: Entry) -> bool:
    """Return whether the module has to know which rows of an output are one example's."""
    module = entry.module
    if isinstance(module, RoutedMixture | InputComposition | Batched) or entry.changes_weight:
        return False
    return module.side_source is not None or not module.by_token


def _is_routed_by_example(entry: Entry) -> bool:
    module = entry.module
    return isinstance(module, RoutedMixture) and module.mixture.level == "example"


@dataclass(eq=False)
class Plan:
    """What a site remembers of one composition.

    Attributes:
        composition: the same object, not an equal one.
        groups: what it comes to there.
        modules: the modules whose batching depends on whether they train.
        training: whether each of them did when this was planned.
        keeps_keys_values: whether what goes before an attention layer's own keys and values is
            made once in a call.
    """

    composition: Expression
    groups: list[Group]
    modules: list[Computation]
    training: list[bool]
    keeps_keys_values: bool = False

    def holds(self) -> bool:
        """Return whether it would still be planned in this way."""
        return list(map(_training, self.modules)) == self.training


def make_plan(entries: Mapping[str, list[Entry]], composition: Expression) -> Plan:
    """Plan ``composition`` where ``entries`` are."""
    used = [e.module for name in composition.names() for e in entries.get(name, ())]
    modules = [module for module in used if isinstance(module, Computation)]
    keys_values = [module for module in modules if isinstance(module, KeyValueComposition)]
    mixed = any(isinstance(module, RoutedMixture) for module in used)
    fixed = all(m.side_source is None and not is_redirected(m) for m in keys_values) and not mixed
    watched = modules if isinstance(composition, Each) else []
    return Plan(
        composition,
        make_groups(entries, composition, batches=True),
        watched,
        list(map(_training, watched)),
        bool(keys_values) and fixed,
    )


def make_groups(
    entries: Mapping[str, list[Entry]], composition: Expression, batches: bool
) -> list[Group]:
    """Divide the examples of a batch into groups, where ``entries`` are.

    Args:
        entries: the modules at the site, by name.
        composition: for the whole batch, or one for each example.
        batches: whether modules of one kind and shape may become one over stacked tensors.
    """

    def here(name: str) -> str | None:
        return name if name in entries else None

    if not isinstance(composition, Each):
        own = composition.mapped(here)
        return [] if own is None else [Group(None, own, _used(own, entries))]
    # compositions of one shape, with the examples of each
    alike: dict[object, list[tuple[Expression, Rows]]] = {}
    for whole, rows in composition.different.items():
        own = None if whole is None else whole.mapped(here)
        if own is not None:
            key = _shape(own, entries) if batches else own
            alike.setdefault(key, []).append((own, rows))
    found: list[Group] = []
    for key, some in alike.items():
        rows = [i for _, own_rows in some for i in own_rows]
        all_rows = sorted(rows) == list(range(len(composition.rows)))
        by_expression: dict[Expression, Rows] = {}
        for own, own_rows in some:
            by_expression.setdefault(own, []).extend(own_rows)
        if len(by_expression) > 1 and key is not None:
            found.append(_batched_group(some, entries, all_rows))
            continue
        for own, own_rows in by_expression.items():
            everyone = all_rows and len(by_expression) == 1
            found.append(Group(None if everyone else own_rows, own, _used(own, entries)))
    return found


def _used(expression: Expression, entries: Mapping[str, list[Entry]]) -> dict[str, list[Entry]]:
    """Return the entries of the modules in ``expression``, and of those that mixtures are over."""
    used: dict[str, list[Entry]] = {}
    for name in expression.names():
        used[name] = entries[name]
        _with_members(entries[name], entries, used)
    return used


def _with_members(
    some: Sequence[Entry], entries: Mapping[str, list[Entry]], used: dict[str, list[Entry]]
) -> None:
    """Add to ``used`` the modules that mixtures are over, and those that these are over."""
    for entry in some:
        if isinstance(entry.module, RoutedMixture):
            for member in entry.module.members:
                if member in entries and member not in used:
                    used[member] = entries[member]
                    _with_members(entries[member], entries, used)


def _shape(expression: Expression, entries: Mapping[str, list[Entry]]) -> object:
    """Return a key that is equal for expressions that can be batched, None if one cannot be."""
    slots = {name: f"s{i}" for i, name in enumerate(expression.names())}
    kinds = []
    for name in slots:
        for entry in entries[name]:
            if entry.residual or entry.inside or isinstance(entry.module, RoutedMixture | Batched):
                return None
            kind = batch_key(entry.module)
            if kind is None:
                return None
            kinds.append((slots[name], kind, entry.part))
    return expression.mapped(lambda name: slots[name]), tuple(kinds)


def _batched_group(
    some: Sequence[tuple[Expression, Rows]], entries: Mapping[str, list[Entry]], all_rows: bool
) -> Group:
    """Make one group of expressions of one shape: each slot holds the modules of all of them."""
    owner = {i: own for own, rows in some for i in rows}
    order = sorted(owner)
    of_row = [owner[i].names() for i in order]  # the modules of each example, by slot
    slots: dict[str, list[Entry]] = {}
    for s in range(len(of_row[0])):
        first = entries[of_row[0][s]]
        slots[f"s{s}"] = [
            replace(entry, module=Batched([entries[names[s]][k].module for names in of_row]))  # type: ignore[misc]
            for k, entry in enumerate(first)
        ]
    names = {name: f"s{i}" for i, name in enumerate(some[0][0].names())}
    expression = some[0][0].mapped(lambda name: names[name])
    assert expression is not None  # noqa: S101
    return Group(None if all_rows else order, expression, slots)


def _weights_first(
    expression: Expression, entries: Mapping[str, list[Entry]]
) -> tuple[Expression | None, Expression | None]:
    """Split off the first part, all changes of weights by numbers, from what comes after it."""

    def simple(part: Expression) -> bool:
        return all(
            isinstance(e.module, ParameterComposition) and not (e.residual or e.inside)
            for name in part.names()
            for e in entries[name]
        ) and not any(isinstance(w, Tensor) for w in part.weights().values())

    if simple(expression):
        return expression, None
    if type(expression) is not Chain:
        return None, expression
    count = 0
    for part in expression.parts:
        if not simple(part):
            break
        count += 1
    return chain(*expression.parts[:count]), chain(*expression.parts[count:])
