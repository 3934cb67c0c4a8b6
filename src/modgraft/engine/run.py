"""Runs a layer with its active modules: Algorithm 1 of the survey at one site.

A call of the layer goes through these stages, each only where the composition asks for it:

1. tokens before the host's input            ``inputs/tokens.py``
2. a shift of the layer's residual input     ``residual.py``
3. the layer, with changed weights           ``own_forward.py``, ``kernels/``
4. the composition, applied to its output    ``apply.py``

Compiled code goes the same way, with every implanted module in it behind a switch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.base import FunctionComposition
from modgraft.core.call import Call
from modgraft.core.errors import ModgraftError, UndividedError
from modgraft.core.expression import Expression, Weight, weighted
from modgraft.core.per_example import Each
from modgraft.core.precision import as_the_layer
from modgraft.core.tensors import first_tensor, tensor_input, tensor_of, with_tensor
from modgraft.engine import divided, own_forward, shared_input
from modgraft.engine.apply import Applier, pick
from modgraft.engine.capturing import uncaptured
from modgraft.engine.inputs.tokens import call_with_tokens, relayed
from modgraft.engine.kernels.linear import Change, one_product
from modgraft.engine.plan import Entry, Group, make_groups
from modgraft.engine.residual import Step, shifted
from modgraft.engine.state import STATE, SiteCall, State, with_choices
from modgraft.routing.mixture import RoutedMixture


def run(layer: nn.Module, args: tuple, kwargs: dict) -> Any:
    """Run a layer with its active modules.

    Args:
        layer: the grafted layer.
        args: what it is called with.
        kwargs: what it is called with by name.
    """
    state: State = layer.__dict__[STATE]
    if not torch.compiler.is_dynamo_compiling():
        state.called = True
    call = state.context.now()
    composition = call.composition
    if composition is None:
        return own_forward.run(layer, (), args, kwargs)
    if state.divides and not torch.compiler.is_dynamo_compiling():
        axis = divided.axis_of(state, call, composition)
        if axis is not None:
            return divided.run(layer, state, call, axis, run, (args, kwargs))
    if state.relays:
        inside = partial(_run, layer, state, call, composition)
        return relayed(layer, state, call, inside, args, kwargs)
    return _run(layer, state, call, composition, args, kwargs)


def _run(
    layer: nn.Module,
    state: State,
    call: Call,
    composition: Expression,
    args: tuple,
    kwargs: dict,
) -> Any:
    groups = state.groups(composition)
    if not groups:
        return own_forward.run(layer, (), args, kwargs)
    if call.spliced is None and state.context.token_modules:
        inputs = state.token_modules(state.context.token_modules_in(composition))
        if inputs:
            run_inside = partial(run, layer)
            return call_with_tokens(layer, state, call, inputs, run_inside, args, kwargs)

    site = SiteCall(layer, state, call, args, kwargs)
    whole = None if isinstance(composition, Each) else groups[0]
    if any(group.residual for group in groups):
        site.args, site.kwargs = _shift_residual(site, composition)
    x = first_tensor(site.args, site.kwargs)
    if x is not None and x.is_nested:
        with _nested(site, composition):
            return _act(site, groups, whole, composition, x)
    return _act(site, groups, whole, composition, x)


@contextmanager
def _nested(site: SiteCall, composition: Expression) -> Iterator[None]:
    """Say of an error in a ``with`` block that a module cannot act on texts of unequal length.

    Raises:
        ModgraftError: with the remedy.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, ModgraftError):
            raise
        each = ", a composition for each example," if isinstance(composition, Each) else ""
        raise ModgraftError(
            f"{composition}{each} does not act at {site.state.path} on a nested tensor, or the "
            f"{type(site.layer).__name__} does not: {error!s:.200}. Give the host a padded "
            f"one, torch.nested.to_padded_tensor(x, 0.0), or one example after the other"
        ) from error


def _act(
    site: SiteCall,
    groups: Sequence[Group],
    whole: Group | None,
    composition: Expression,
    x: Tensor | None,
) -> Any:
    """Run the layer, and apply the composition to its output; the arguments are those of
    :func:`_run_layer`."""
    out, left = _run_layer(site, groups, whole, composition, x)
    if whole is not None and left is None:
        return out
    if not any(group.changes_output for group in groups):
        return out
    before = tensor_of(out)
    if whole is None or whole.by_example or (whole.by_weights and not site.call.alike):
        names = ", ".join(map(repr, composition.names()))
        site.find_axis(names, whole is None or not whole.by_example)
    y = start = site.examples_first(before)
    if site.axis and x is not None and x.shape[: site.axis + 1] == before.shape[: site.axis + 1]:
        x = site.examples_first(x)
    if whole is None:
        y = _per_example(site, groups, composition, x, y)
    elif left is not None:
        bare = y if left is whole.expression else None
        y = left.apply(Applier(site, whole.entries, x, bare=bare), y)
    if y is start:
        return out
    if site.axis:  # as the layer laid it out: the host may view it
        y = y.movedim(0, site.axis).contiguous()
    return with_tensor(out, y)


# -- the layer and its weights --------------------------------------------------------------------


def _run_layer(
    site: SiteCall,
    groups: Sequence[Group],
    whole: Group | None,
    composition: Expression,
    x: Tensor | None,
) -> tuple[Any, Expression | None]:
    """Run the layer with its changed weights; return also what of the composition is left to do.

    Args:
        site: the call of the layer.
        groups: what the composition comes to there.
        whole: the one group that is for the whole batch; None where the batch has one composition
            for each example, which is left to do whole.
        composition: the composition.
        x: the layer's input.
    """
    if whole is not None and whole.changes:
        y = _with_changed_weight(site, whole, x)
        if y is not None:
            return y, whole.rest
    attended = _attended(site.state)
    changes = [] if whole is None else _inside(site, whole, composition)
    out = site.run(changes)
    if whole is None or len(changes) < len(whole.inside):  # others' differ between examples
        _check_inside(site, groups, out)
    _check_attended(site, groups, attended)
    return out, None if whole is None else whole.expression


def _with_changed_weight(site: SiteCall, group: Group, x: Tensor | None) -> Tensor | None:
    """Run a layer whose one weight a group changes, None where each effect is added instead."""
    changes = group.changes
    x = tensor_input(x, site.state.path)
    if site.state.same_input:
        y = shared_input.run(site, group, x)
        if y is not None:
            return y
    return one_product(site.layer, lambda x: site.run((), (x,), {}), x, changes, group.merged)


def _inside(site: SiteCall, group: Group, composition: Expression) -> list[Change]:
    """Return the changes of weights that only the layer itself can run with.

    Those whose weights differ between examples, or that a mixture chooses, are left out: their
    effects are added to the output.
    """
    if not group.inside:
        return []
    weights: Mapping[str, Weight] = composition.weights()
    if site.call.alike:
        every = [entry for some in group.entries.values() for entry in some]
        weights, _ = with_choices(site.call, every, weights)
    changes = []
    for entry in group.inside:
        weight = weights.get(entry.name)
        if weight is not None and not (isinstance(weight, Tensor) and weight.dim()):
            changes.append(Change(entry.module, weight, entry.part, entry.parameter))  # type: ignore[arg-type]
    return changes


def _check_inside(site: SiteCall, groups: Sequence[Group], out: Any) -> None:
    """Refuse different weights for the examples of one call of a layer that puts out more than one
    tensor, as attention, an RNN or a router does.

    Raises:
        UndividedError: with the module's name.
    """
    several = not isinstance(out, Tensor)
    entries = [e for group in groups for e in group.inside if several or e.parameter is not None]
    if entries:
        raise UndividedError(
            f"{entries[0].name!r} changes weights inside {site.state.path}, a "
            f"{type(site.layer).__name__}, which runs with one set of weights a call; call the "
            f"host once for each composition",
            site.state.path,
        )


# -- the output -----------------------------------------------------------------------------------


def _per_example(
    site: SiteCall, groups: Sequence[Group], composition: Expression, x: Tensor | None, y: Tensor
) -> Tensor:
    """Apply each group's composition to the rows of ``y`` that are its examples."""
    assert isinstance(composition, Each)  # noqa: S101
    count = len(composition.rows)
    times = site.rows_each(count, y)
    fresh = not (torch.is_grad_enabled() or y.shape[0] == 1)
    if y.shape[0] != times * count:  # one row that stands for all examples
        y = y.expand(count, *y.shape[1:])
        x = None if x is None or len(x) > 1 else x.expand(count, *x.shape[1:])
    if x is not None and len(x) != y.shape[0]:  # not what the examples are in, as positions
        x = None
    new = y
    for group in groups:
        if group.input_only:
            continue
        changes = _inside(site, group, group.expression)
        changed = site.output(changes).expand_as(y) if changes else y
        if group.rows is None:
            at = Applier(site, group.entries, x, bare=y, in_place=fresh and group.single)
            return group.expression.apply(at, changed)
        rows = group.index(y, times)
        bare = y[rows]
        own = changed[rows] if changes else bare
        at = Applier(site, group.entries, pick(x, rows), rows, bare, y.shape[0])
        result = group.expression.apply(at, own)
        if result is not bare:
            new = new.index_copy(0, rows, result)
    return new


# -- the residual ---------------------------------------------------------------------------------


def _shift_residual(site: SiteCall, composition: Expression) -> tuple[tuple, dict]:
    """Return the layer's arguments with the modules' effects added to its residual input."""
    entries = site.state.entries

    def f(args: tuple, kwargs: dict) -> Tensor:
        with uncaptured():
            return tensor_of(site.run((), args, kwargs))

    def fold(step: Step, e: Tensor) -> Tensor:
        def add(name: str, base: Tensor, total: Tensor, weight: Weight) -> Tensor:
            for entry in entries.get(name, ()):
                if entry.residual:
                    new = step(lambda y, r, entry=entry: _in_residual(site, entry, y, r), base)
                    weight = site.per_row(weight, base)
                    if total is base and not isinstance(weight, Tensor) and weight == 1.0:
                        total = new
                    else:
                        total = total + weighted(weight, new - base)
            return total

        for group in make_groups(entries, composition, batches=False):
            new = group.expression.apply(add, e)
            if group.rows is None or new is e:
                e = new
            else:  # all examples have gone through it, and the group's keep what came of it
                rows = group.index(e, max(1, e.shape[0] // len(composition.rows)))  # type: ignore[attr-defined]
                e = e.index_copy(0, rows, new[rows])
        return e

    return shifted(f, site.args, site.kwargs, fold, site.state.path)


def _in_residual(site: SiteCall, entry: Entry, y: Tensor, r: Tensor) -> Tensor:
    """Return the result of a module that acts in the residual ``r``, on the output ``y``."""
    module = entry.module
    if isinstance(module, RoutedMixture):
        return _mixed_in_residual(site, module, y, r)
    assert isinstance(module, FunctionComposition)  # noqa: S101
    side = Applier(site, site.state.entries, r).side(entry, y.shape[0])
    with as_the_layer(y):
        if entry.part is None:
            return module(y, r, side).to(y.dtype)
        return entry.part.replaced(y, entry.axis, lambda own: module(own, r, side).to(y.dtype))


def _mixed_in_residual(site: SiteCall, routed: RoutedMixture, y: Tensor, r: Tensor) -> Tensor:
    """Return what a mixture without a router makes of its modules there; see above."""

    def apply(j: int, y: Tensor, total: Tensor, weight: Weight) -> Tensor:
        for entry in site.state.entries.get(routed.members[j], ()):
            if entry.residual:
                effect = _in_residual(site, entry, y, r) - y
                total = total + weighted(site.per_row(weight, y), effect)
        return total

    with as_the_layer(y):
        return routed.mixture.combine(apply, [], y).to(y.dtype)


# -- attention ------------------------------------------------------------------------------------


def _attended(state: State) -> int:
    """Return how often the layer's attention function ran with keys and values of modules."""
    if (
        torch.compiler.is_dynamo_compiling()
    ):  # written before it is read: no graph is bound to a count
        state.attended = 0
    return state.attended


def _check_attended(site: SiteCall, groups: Sequence[Group], attended: int) -> None:
    """Refuse a forward in which active keys and values met no attention function.

    Raises:
        ModgraftError: with the remedy.
    """
    names = [name for group in groups for name in group.keys_values]
    if names and site.state.attended == attended:
        raise ModgraftError(
            f"{', '.join(names)} had no effect at {site.state.path}: this "
            f"{type(site.layer).__name__} did not send its attention through transformers' "
            f"registry of attention functions; host.remove({names[0]!r}), or set the option of "
            f"the model's config that by-passes it"
        )
