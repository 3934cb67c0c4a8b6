"""What the engine keeps at a layer with modules, and what it knows of one call of that layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.base import TokenComposition
from modgraft.core.call import UNSEEN, Call, Layout
from modgraft.core.context import Context, kept_in_call
from modgraft.core.embeddings import Reading
from modgraft.core.errors import CompositionError, SiteError, UndividedError
from modgraft.core.expression import Expression, Weight
from modgraft.core.layers import STATE as STATE
from modgraft.core.per_example import Each
from modgraft.core.tensors import tensor_of
from modgraft.engine import own_forward
from modgraft.engine.dispatch import ExpertBatch
from modgraft.engine.kernels.batched import Batched
from modgraft.engine.kernels.functional_call import new_weights
from modgraft.engine.kernels.linear import Change
from modgraft.engine.plan import Entry, Group, Plan, make_groups, make_plan
from modgraft.engine.served_weight import Shells
from modgraft.routing.mixture import RoutedMixture

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
        relays: the modules whose tokens come in or leave here, inside the host.
        reading: at the host itself, what it reads, where modules put tokens before that.
        relink: there, works it out anew and grafts the layers where tokens come in or leave.
        by_weight: what computes the layer by its weight; None where it has to run itself.
        called: whether the layer has run.
        read: whether its weight was read by others, as modules change it.
        served: its weight and bias as others read them.
        serves: of a layer of several weights, whether others read these as modules change them.
        compiled_bare: whether compiled code runs the layer's own forward, which reads θ.
        axis: where the examples lie in its output, if nobody has asked.
        divides: of a part of the host that runs once for each composition of a batch, the layers in
            it that ask for that.
    """

    path: str
    context: Context
    entries: dict[str, list[Entry]] = field(default_factory=dict)
    attended: int = 0
    plans: dict[int, Plan] = field(default_factory=dict)
    experts: dict[RoutedMixture, tuple[Any, ExpertBatch | None]] = field(default_factory=dict)
    same_input: tuple[nn.Module, ...] = ()
    relays: set[str] = field(default_factory=set)
    reading: Reading | None = None
    relink: Callable[[], Reading] | None = None
    by_weight: Callable[..., Tensor] | None = None
    called: bool = False
    read: bool = False
    served: Shells = field(default_factory=Shells)
    serves: bool = False
    compiled_bare: bool = False
    axis: int = 0
    divides: tuple[State, ...] = ()

    def add(self, entry: Entry) -> None:
        """Add a module."""
        self.entries.setdefault(entry.name, []).append(entry)
        self.plans.clear()

    def remove(self, name: str) -> list[Entry]:
        """Remove a module, and let go of everything that was kept."""
        self.plans.clear()
        self.experts.clear()
        self.relays.discard(name)
        return self.entries.pop(name, [])

    def every(self) -> list[Entry]:
        """Return the modules here."""
        return [entry for some in self.entries.values() for entry in some]

    def of_kind(self, kind: type[Any], names: Iterable[str] | None = None) -> list[Entry]:
        """Return the modules here of one kind, or those of some names in their order.

        What is asked for by name costs nothing for the modules that are here beside.
        """
        found = self.every() if names is None else self.named(names)
        return [entry for entry in found if isinstance(entry.module, kind)]

    def named(self, names: Iterable[str]) -> list[Entry]:
        """Return the modules here of some names, in their order."""
        return [entry for name in names for entry in self.entries.get(name, ())]

    def token_modules(self, names: Sequence[str]) -> list[Entry]:
        """Return those of ``names`` that put tokens before the host's input, in that order."""
        return self.of_kind(TokenComposition, names)

    def groups(self, composition: Expression) -> list[Group]:
        """Return what ``composition`` comes to here: compiled code plans while it is traced."""
        if torch.compiler.is_dynamo_compiling():
            return make_groups(self.entries, composition, batches=False)
        return self.plan(composition).groups

    def plan(self, composition: Expression) -> Plan:
        """Return the plan of ``composition``, made once and kept for the ones used last."""
        plans = self.plans
        plan = plans.get(id(composition))
        if (
            plan is not None
            and plan.composition is composition
            and (not plan.modules or kept_in_call(plan, plan.holds))
        ):
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

    # -- the weight as others read it -------------------------------------------------------------

    def changes_now(self) -> bool:
        """Return whether a module of the composition under way acts at this layer."""
        composition = self.context.current().composition
        return composition is not None and bool(self.groups(composition))

    def changed(self, layer: nn.Module, name: str, theta: Tensor) -> Tensor:
        """Return the tensor ``theta`` of ``layer``, as the composition under way changes it.

        Raises:
            UndividedError: where the examples of the batch have different compositions.
        """
        call = self.context.now()
        composition = call.composition
        groups = [] if composition is None else self.groups(composition)
        if composition is None or not groups:
            return theta
        entries = [entry for some in groups[0].entries.values() for entry in some]
        weights, mixtures = with_choices(call, entries, composition.weights())
        entries = [entry for entry in entries if entry.name not in mixtures]
        used = [e for e in entries if e.changes_weight and e.name in weights]
        if _differs(groups, entries, [weights[e.name] for e in used]):
            if torch.compiler.is_dynamo_compiling() and self.called:
                return theta  # the layer is called, and what reads its type leaves the graph
            raise UndividedError(
                f"the examples of this batch have different modules at {self.path}, whose weight "
                f"another module computes with, for the whole batch at once; call the host once "
                f"for each composition",
                self.path,
            )
        # a graph is bound to nothing that is not the same at its next run
        eager = not torch.compiler.is_dynamo_compiling()
        if eager:
            self.read = True
        if eager and len(used) < len(entries) and not self.called:
            call.reads.append(partial(self._check_called, entries))
        return self.with_changes(
            layer,
            name,
            theta,
            [Change(e.module, weights[e.name], e.part, e.parameter) for e in used],  # type: ignore[arg-type]
        )

    def with_changes(
        self, layer: nn.Module, name: str, theta: Tensor, changes: Sequence[Change]
    ) -> Tensor:
        """Return the tensor ``theta`` that ``layer`` stores as ``name``, with ``changes``."""
        return new_weights(layer, changes).get(name, theta)

    def _check_called(self, entries: Sequence[Entry]) -> None:
        """Refuse modules on the output of a layer that the host has run without calling it.

        Raises:
            SiteError: with what acts there.
        """
        if self.called:
            return
        first = next(e for e in entries if not e.changes_weight)
        raise SiteError(
            f"{first.name!r} acts on the output of {self.path}, which this host never calls: "
            f"another module computes with its weight. A change of the weight acts there, such as "
            f"LoRA(rank=8); for an effect on activations choose the layer around it"
        )


def with_choices(
    call: Call, entries: Sequence[Entry], weights: Mapping[str, Weight]
) -> tuple[dict[str, Weight], set[str]]:
    """Return the weights of modules with those that mixtures gave them, and these mixtures' names.

    Left out are mixtures that choose by token, or whose results are no weighted sum.

    Args:
        call: of the host, which knows the choices.
        entries: the modules at a layer, the mixtures' among them.
        weights: by the composition.
    """
    found, mixtures = dict(weights), set()
    for entry in entries:
        routed = entry.module
        if not isinstance(routed, RoutedMixture) or entry.name not in weights:
            continue
        choice = call.choices.get(routed.key)
        if choice is None or not routed.mixture.aggregate.is_weighted_sum:
            continue
        mixtures.add(entry.name)
        for j, member in enumerate(routed.members):
            w = weights[entry.name] * choice.weights[..., j]
            found[member] = found[member] + w if member in found else w
    return found, mixtures


def _differs(groups: Sequence[Group], entries: Sequence[Entry], weights: Sequence[Weight]) -> bool:
    """Return whether the examples of a batch have different modules, or weights of them."""
    if len(groups) > 1 or groups[0].rows is not None:
        return True
    batched = any(isinstance(entry.module, Batched) for entry in entries)
    return batched or any(isinstance(w, Tensor) and w.dim() > 0 for w in weights)


@dataclass
class SiteCall:
    """One call of a layer with modules.

    Attributes:
        layer: the grafted layer.
        state: what is implanted in it.
        call: the call of the host that it is part of.
        args: what the layer is called with.
        kwargs: what it is called with by name.
        axis: where the examples lie in its output.
    """

    layer: nn.Module
    state: State
    call: Call
    args: tuple
    kwargs: dict[str, Any]
    axis: int = 0

    @property
    def layout(self) -> Layout:
        """Where the examples lie, as far as it is known."""
        if torch.compiler.is_dynamo_compiling():
            return self.state.context.odd
        own = self.call.layout
        return self.state.context.layout if own is None else own

    def find_axis(self, names: str, by_weights: bool) -> None:
        """Find out on which axis of the layer's output the examples lie.

        Args:
            names: the modules that have to know, for the error.
            by_weights: whether only their weights differ between examples.

        Raises:
            CompositionError: where they lie on none; an UndividedError where a part of the host
                around it could run once for each of the weights.
        """
        axis = self.layout.get(self.state.path, self.state.axis)
        if axis is None or axis == UNSEEN:
            words = (
                f"{names} acts on each example by itself, and the output of {self.state.path} "
                f"({type(self.layer).__name__}) has no axis of the examples: run on one example "
                f"more, it did not put out the same as before and as much again for that one. "
                f"Implant at a layer that puts out something for each example"
            )
            if by_weights:
                words = f"{words}, or call the host once for each composition"
                raise UndividedError(words, self.state.path)
            raise CompositionError(words)
        self.axis = axis

    def examples_first(self, value: Tensor) -> Tensor:
        """Return an output of the layer, or what is shaped as one, with the examples first."""
        return value.movedim(self.axis, 0) if self.axis else value

    def run(
        self,
        changes: Sequence[Change] = (),
        args: tuple | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the layer itself, with changed weights or its own.

        Args:
            changes: of its weights.
            args: what it takes; None: what it is called with.
            kwargs: by name; None: what it is called with.
        """
        return own_forward.run(
            self.layer,
            changes,
            self.args if args is None else args,
            self.kwargs if kwargs is None else kwargs,
        )

    def output(self, changes: Sequence[Change]) -> Tensor:
        """Return the tensor that the layer puts out with changed weights."""
        return self.examples_first(tensor_of(self.run(changes)))

    def per_row(self, weight: Weight, y: Tensor) -> Weight:
        """Return ``weight`` ``[B]`` for the rows of ``y``: an example's beams have its weight."""
        if not isinstance(weight, Tensor) or not weight.dim():
            return weight
        times = self.rows_each(len(weight), y, "there are weights for {} examples")
        return weight if times == 1 else weight.repeat_interleave(times)

    def rows_each(
        self, examples: int, y: Tensor, given: str = "modules=[…] gives {} compositions"
    ) -> int:
        """Return how many rows of ``y`` each example has: in ``generate``, one for each beam.

        Raises:
            CompositionError: where the rows cannot be those of so many examples.
        """
        rows = y.shape[0]
        if rows == examples or (rows == 1 and isinstance(self.layer, nn.Embedding)):
            return 1  # a table may have one row for all, as of positions
        known = self.layout.get(self.state.path) == 0
        if (self.call.generating or known) and rows % examples == 0:
            return rows // examples
        where = f"{self.state.path}, a {type(self.layer).__name__}," if self.state.path else "host"
        raise CompositionError(
            f"{given.format(examples)}, and the output of the {where} is {list(y.shape)}, whose "
            f"rows are not as many: pass one for each example where the batch is of another size, "
            f"else implant where the output is [batch, …]"
        )
