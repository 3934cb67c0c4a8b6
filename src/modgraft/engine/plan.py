"""What a composition comes to at one site, worked out once and kept.

A site runs groups: the examples of each of a batch's compositions, or all of them, with the modules
that act on them there. Modules of one kind and shape, one for each example, become one group over
stacked tensors; a composition of parameter modules alone becomes changes of the layer's weight.
What is planned follows the modules used, not the modules resident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

import torch
from torch import Tensor

from modgraft.computation._borrow import borrows
from modgraft.computation.base import (
    Computation,
    InputComposition,
    KeyValueComposition,
    ParameterComposition,
)
from modgraft.core.context import once_in_a_call
from modgraft.core.expression import Chain, Expression, Name, chain
from modgraft.core.per_example import Each
from modgraft.engine.kernels.batched import Batched, batch_key
from modgraft.engine.kernels.linear import Change, Merged
from modgraft.engine.kernels.tensor_cache import TensorCache
from modgraft.routing.mixture import Routed

_training = attrgetter("training")
KEPT = 64  # how many compositions a site remembers
KEPT_EACH = 4  # and of those with one for each example, which hold copies of the tensors they use


@dataclass
class Entry:
    """One module at one site."""

    name: str
    module: Computation | Batched | Routed
    part: tuple[int, int] | None
    residual: bool = False
    parameter: str | None = None
    axis: int = -1  # of the output's features

    @property
    def changes_weight(self) -> bool:
        """Whether it is f at θ + Δ."""
        return isinstance(self.module, ParameterComposition) or (
            isinstance(self.module, Batched) and self.module.of_weights
        )

    @property
    def changes_output(self) -> bool:
        """Whether it acts on what the site puts out, and not inside it or before its input."""
        return self.parameter is None and not isinstance(self.module, InputComposition)


@dataclass
class Group:
    """Examples of a batch that one composition acts on, or one of its shape.

    Attributes:
        rows: which examples, None for all.
        expression: what acts on them here.
        entries: by the name in the expression.
        changes: what of it comes first and is a change of weights.
        rest: what comes after that.
        merged: the weight with those changes, once it has been made.
        shifts: whether a module acts on the layer's residual input.
        inner: the modules that change weights that only the layer itself can run with.
        attends: the names of those that put keys and values into attention.
        changes_output: whether something acts on what the site puts out.
        before_output: whether all of it acts before that: vectors before an input.
        alone: whether it is one module once.
    """

    rows: list[int] | None
    expression: Expression
    entries: dict[str, list[Entry]]
    changes: list[Change] = field(default_factory=list)
    rest: Expression | None = None
    merged: Merged | None = None
    _index: dict[tuple[torch.device, int, bool], Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        every = [entry for some in self.entries.values() for entry in some]
        self.shifts = any(entry.residual for entry in every)
        self.inner = [entry for entry in every if entry.parameter is not None]
        self.attends = [e.name for e in every if isinstance(e.module, KeyValueComposition)]
        self.changes_output = any(entry.changes_output for entry in every)
        self.alone = len(every) == 1 and isinstance(self.expression, Name)
        self.before_output = all(isinstance(e.module, InputComposition) for e in every)
        if torch.compiler.is_compiling():  # its weights are tensors: nothing comes first
            return
        first, self.rest = _weights_first(self.expression, self.entries)
        self.changes = [
            Change(entry.module, weight, entry.part, entry.parameter)  # type: ignore[arg-type]
            for name, weight in ({} if first is None else first.weights()).items()
            if weight != 0.0
            for entry in self.entries[name]
        ]
        if self.rows is None:
            self.merged = Merged()

    def index(self, like: Tensor, times: int) -> Tensor:
        """The rows in ``like``, where each example has ``times`` of them, side by side."""
        assert self.rows is not None  # noqa: S101
        key = like.device, times, torch.is_inference_mode_enabled()
        if key not in self._index:
            rows = [i * times + k for i in self.rows for k in range(times)]
            self._index[key] = torch.tensor(rows, device=like.device)
        return self._index[key]


@dataclass(eq=False)
class Plan:
    """What a site remembers of one composition.

    Attributes:
        composition: the same object, not an equal one.
        groups: what it comes to there.
        modules: those that some stack only if they do not train.
        training: whether each of them did when that was planned.
        before: the keys and values that go before a layer's own; None: nothing of it can be kept.
    """

    composition: Expression
    groups: list[Group]
    modules: list[Computation]
    training: list[bool]
    before: TensorCache | None = None

    def holds(self) -> bool:
        """Whether it would still be planned like that."""
        return list(map(_training, self.modules)) == self.training


def planned(entries: Mapping[str, list[Entry]], composition: Expression) -> Plan:
    """The plan of ``composition`` where ``entries`` are."""
    names = composition.names()
    used = [e.module for name in names for e in entries.get(name, ())]
    modules = [module for module in used if isinstance(module, Computation)]
    keys_values = [module for module in modules if isinstance(module, KeyValueComposition)]
    own = all(module.side_source is None and not borrows(module) for module in keys_values)
    mixed = any(isinstance(module, Routed) for module in used)
    watched = modules if isinstance(composition, Each) else []
    before = TensorCache(keys_values) if own and not mixed else None
    found = groups(entries, composition, stacks=True)
    return Plan(composition, found, watched, list(map(_training, watched)), before)


def remembered(
    plans: dict[int, Plan], entries: Mapping[str, list[Entry]], composition: Expression
) -> Plan:
    """The plan of ``composition``, made once and kept in ``plans`` for those used last."""
    plan = plans.get(id(composition))
    if plan is not None and plan.composition is composition and once_in_a_call(plan, plan.holds):
        return plan
    plan = planned(entries, composition)
    if composition.is_data:  # it is weights, and what they were computed from
        return plan
    plans.pop(id(composition), None)
    plans[id(composition)] = plan
    for key, old in list(plans.items())[:-KEPT_EACH]:
        if len(plans) > KEPT or isinstance(old.composition, Each):
            plans.pop(key, None)  # another thread may have
    return plan


def groups(
    entries: Mapping[str, list[Entry]], composition: Expression, stacks: bool
) -> list[Group]:
    """What ``composition`` comes to where ``entries`` are.

    Args:
        entries: of the site, by name.
        composition: for the whole batch, or one for each example.
        stacks: whether modules of one shape may become one over stacked tensors.
    """

    def here(name: str) -> str | None:
        return name if name in entries else None

    if not isinstance(composition, Each):
        own = composition.mapped(here)
        return [] if own is None else [Group(None, own, _used(own, entries))]
    found: list[Group] = []
    alike: dict[object, list[tuple[Expression, list[int]]]] = {}
    for whole, rows in composition.different.items():
        own = None if whole is None else whole.mapped(here)
        if own is not None:
            alike.setdefault(_shape(own, entries) if stacks else own, []).append((own, rows))
    for key, some in alike.items():
        rows = [i for _, own_rows in some for i in own_rows]
        every = sorted(rows) == list(range(len(composition.rows)))
        if len({own for own, _ in some}) == 1:
            own = some[0][0]
            found.append(Group(None if every else rows, own, _used(own, entries)))
        elif key is None:  # some of it cannot be stacked
            for own, own_rows in _by_expression(some):
                found.append(Group(own_rows, own, _used(own, entries)))
        else:
            found.append(_stacked(some, entries, every))
    return found


def _used(expression: Expression, entries: Mapping[str, list[Entry]]) -> dict[str, list[Entry]]:
    """The entries that ``expression`` speaks of, and those that they are made of."""
    used: dict[str, list[Entry]] = {}
    for name in expression.names():
        used[name] = entries[name]
        _with_members(entries[name], entries, used)
    return used


def _with_members(
    some: Sequence[Entry], entries: Mapping[str, list[Entry]], used: dict[str, list[Entry]]
) -> None:
    """Add the modules that a mixture is over, and theirs."""
    for entry in some:
        if isinstance(entry.module, Routed):
            for member in entry.module.members:
                if member in entries and member not in used:
                    used[member] = entries[member]
                    _with_members(entries[member], entries, used)


def _by_expression(
    some: Sequence[tuple[Expression, list[int]]],
) -> list[tuple[Expression, list[int]]]:
    found: dict[Expression, list[int]] = {}
    for own, rows in some:
        found.setdefault(own, []).extend(rows)
    return list(found.items())


def _shape(expression: Expression, entries: Mapping[str, list[Entry]]) -> object:
    """What expressions that can be stacked have in common, None for one that cannot be."""
    slots = {name: f"s{i}" for i, name in enumerate(expression.names())}
    kinds = []
    for name in slots:
        for entry in entries[name]:
            if entry.residual or entry.parameter or isinstance(entry.module, Routed | Batched):
                return None
            kind = batch_key(entry.module)
            if kind is None:
                return None
            kinds.append((slots[name], kind, entry.part))
    return expression.mapped(lambda name: slots[name]), tuple(kinds)


def _stacked(
    some: Sequence[tuple[Expression, list[int]]], entries: Mapping[str, list[Entry]], every: bool
) -> Group:
    """One group of expressions of one shape: each slot holds the modules of all of them."""
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
    return Group(None if every else order, expression, slots)


def _weights_first(
    expression: Expression, entries: Mapping[str, list[Entry]]
) -> tuple[Expression | None, Expression | None]:
    """A first part of nothing but changes of weights by numbers, and what comes after it."""

    def simple(part: Expression) -> bool:
        return all(
            isinstance(e.module, ParameterComposition) and not e.residual
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
