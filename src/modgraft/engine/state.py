"""What the engine keeps at a layer with modules, and what it knows of one call of that layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.base import Computation, TokenComposition
from modgraft.core.context import Call, Context, kept_in_call
from modgraft.core.errors import CompositionError
from modgraft.core.expression import Expression, Weight
from modgraft.core.per_example import Each
from modgraft.engine.dispatch import ExpertBatch
from modgraft.engine.plan import Entry, Group, Plan, make_groups, make_plan
from modgraft.routing.mixture import RoutedMixture

STATE = "_modgraft_state"
"""The attribute of a grafted layer that holds its :class:`State`; it is no child of the layer."""

MAX_PLANS = 64
"""How many compositions a layer remembers its plan of."""

MAX_PER_EXAMPLE_PLANS = 4
"""How many of those may differ between examples: such plans hold copies of the tensors they use."""

_training = attrgetter("training")


@dataclass
class State:
    """What is implanted at one layer, and what is kept from call to call.

    Attributes:
        path: the layer's path in the host, "" for the host itself.
        context: the host's.
        entries: the modules here, by the name that compositions call them.
        attended: how often the layer's attention function ran with keys and values of modules.
        plans: what compositions come to here, by the identity of the expression.
        experts: for each mixture here, the modules it was made of and those modules as one batch.
        same_input: the grafted layers that read the same input as this one, itself among them.
    """

    path: str
    context: Context
    entries: dict[str, list[Entry]] = field(default_factory=dict)
    attended: int = 0
    plans: dict[int, Plan] = field(default_factory=dict)
    experts: dict[RoutedMixture, tuple[Any, ExpertBatch | None]] = field(default_factory=dict)
    same_input: tuple[nn.Module, ...] = ()

    def add(self, entry: Entry) -> None:
        """Add a module."""
        self.entries.setdefault(entry.name, []).append(entry)
        self.plans.clear()

    def remove(self, name: str) -> list[Entry]:
        """Remove a module, and let go of everything that was kept."""
        self.plans.clear()
        self.experts.clear()
        return self.entries.pop(name, [])

    def of_kind(self, kind: type[Computation]) -> list[Entry]:
        """Return the modules here of one kind."""
        return [e for some in self.entries.values() for e in some if isinstance(e.module, kind)]

    def token_modules(self, names: Sequence[str]) -> list[Entry]:
        """Return those of ``names`` that put tokens before the host's input, in that order."""
        return [e for name in names for e in self.of_kind(TokenComposition) if e.name == name]

    def groups(self, composition: Expression) -> list[Group]:
        """Return what ``composition`` comes to here: compiled code plans while it is traced."""
        if torch.compiler.is_compiling():
            return make_groups(self.entries, composition, batches=False)
        return self.plan(composition).groups

    def plan(self, composition: Expression) -> Plan:
        """Return the plan of ``composition``, made once and kept for the ones used last."""
        plans = self.plans
        plan = plans.get(id(composition))
        if plan is not None and plan.composition is composition and kept_in_call(plan, plan.holds):
            return plan
        plan = make_plan(self.entries, composition)
        if composition.is_data:  # it holds weights, and the graph that they were computed by
            return plan
        plans.pop(id(composition), None)
        plans[id(composition)] = plan
        for key, old in list(plans.items())[:-MAX_PER_EXAMPLE_PLANS]:
            if len(plans) > MAX_PLANS or isinstance(old.composition, Each):
                plans.pop(key, None)  # another thread may have
        return plan

    def expert_batch(
        self, routed: RoutedMixture, members: Sequence[Sequence[Entry]]
    ) -> ExpertBatch | None:
        """Return a mixture's modules as one batch, made anew once they are others, or train.

        None where their kinds or shapes differ.
        """
        modules = [entry.module for some in members for entry in some]
        made_of = modules, list(map(_training, modules))
        kept = self.experts.get(routed)
        if kept is None or kept[0] != made_of:
            kept = self.experts[routed] = made_of, ExpertBatch.of(members)
        return kept[1]


@dataclass
class SiteCall:
    """One call of a layer with modules.

    Attributes:
        layer: the grafted layer.
        state: what is implanted in it.
        call: the call of the host that it is part of.
        forward: the layer's own forward, of the class that it had before.
    """

    layer: nn.Module
    state: State
    call: Call
    forward: Callable[..., Any]

    def per_row(self, weight: Weight, y: Tensor) -> Weight:
        """Return ``weight`` ``[B]`` for the rows of ``y``: an example's beams have its weight."""
        if not isinstance(weight, Tensor) or not weight.dim():
            return weight
        times = self.rows_each(len(weight), y, "mg.Weighted gives {} rows of weights")
        return weight if times == 1 else weight.repeat_interleave(times)

    def rows_each(
        self, examples: int, y: Tensor, given: str = "modules=[…] gives {} compositions"
    ) -> int:
        """Return how many rows of ``y`` each example has: in ``generate``, one for each beam.

        Raises:
            CompositionError: where the rows cannot be those of so many examples.
        """
        rows = y.shape[0]
        if rows == 1:
            return 1
        if rows == examples or (self.call.generating and rows % examples == 0):
            return rows // examples
        raise CompositionError(
            f"{given.format(examples)} where {self.state.path or 'the host'} works on {rows} "
            f"examples; pass one for each example of the batch"
        )
