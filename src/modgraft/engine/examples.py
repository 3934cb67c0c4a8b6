"""Finds where the examples of a batch lie in the outputs of a host's layers, by asking the host.

Most layers put out ``[B, …]``. Others put out ``[n, B, d]``, windows or tokens of all examples in
one axis, or the tokens that a router chose. The numbers of a batch do not tell: 4 steps of 4
examples fit either way. So a copy of the host, which shares its weights, runs on a few examples and
on the same with one of them again behind them. The axis that grew is that of the examples, if the
others come out of it as before, and do so too where the first of them is another; they do not where
the axis is another one, since then what was added or changed is what they attend to. Of the axes of
its input, the host's own output says which one holds the examples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modgraft.core.call import UNSEEN, Layout
from modgraft.core.errors import CompositionError
from modgraft.core.layers import STATE
from modgraft.core.roles import known_models
from modgraft.core.tensors import contents, is_of_a_library, tensors_in, walk
from modgraft.engine.batch import Batch, batches
from modgraft.engine.placing import placed_by_values
from modgraft.engine.twin import REFUSALS, SITE, run_twin, twin_of

Seen = dict[str, list[Tensor]]

TOLERANCE = {4: 1e-3, 8: 1e-6}
"""How far the same example may be off in a larger batch, as a part of the largest number, by the
bytes of a number; products are summed in another order there."""


def signature(args: tuple, kwargs: Mapping[str, Any], count: int | None) -> Hashable | None:
    """Return what calls that lie alike have in common; None for a call that cannot be repeated.

    A cache of transformers, for instance, is written to by every call. Where a tensor has as
    many of the one thing as of the other, calls of its shape alone are alike; and lists whose
    tensors are of one shape are not as others, since the numbers tell less there.

    Args:
        args: what the host is called with.
        kwargs: what it is called with by name.
        count: how many examples this is, None where nothing says.
    """
    if _kept_or_used_up(args, kwargs) is not None:
        return None
    named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    shapes = tuple((name, _shape(value)) for name, value in sorted(named.items()))
    return (count if count in (None, 1) else "several"), shapes


def _shape(value: Any, within: frozenset[int] = frozenset()) -> Hashable:
    if isinstance(value, Tensor) and value.is_nested:  # a strided one has no shape to ask for
        return value.layout, value.dim()
    if isinstance(value, Tensor):
        square = value.dim() > 1 and value.shape[0] == value.shape[1]
        return tuple(value.shape) if square else value.dim()
    held = contents(value)
    if held is None or id(value) in within:
        told = isinstance(value, _TOLD_APART)
        return value if told else getattr(value, "__code__", type(value))
    shapes = {tuple(t.shape for t in tensors_in(each)) for each in held.values()}
    even = isinstance(value, list | tuple) and len(shapes) == 1
    inside = within | {id(value)}
    return type(value), even, tuple((key, _shape(each, inside)) for key, each in held.items())


def ask(
    model: nn.Module, args: tuple, kwargs: Mapping[str, Any], count: int | None
) -> tuple[dict[str, int | None], bool]:
    """Return the axis of the examples in the output of each grafted layer, by its path.

    None stands for a layer where no axis is that of the examples, ``UNSEEN`` for one that did not
    run, as an expert without tokens. A layer whose output has one row for all examples is left out.

    Args:
        model: the host's model.
        args: what it is called with.
        kwargs: what it is called with by name.
        count: how many examples this is; None: as many as the first tensor has, along any axis.

    Returns:
        The axes, and whether they hold for calls that are alike: not where all examples are equal,
        as in a batch of zeros, which shows less, and not where the numbers of the batch decide
        whose rows are which.

    Raises:
        CompositionError: where the host does not run on some of the examples.
    """
    if any(t.is_nested and t.layout is torch.strided for t in tensors_in((args, kwargs))):
        raise CompositionError(
            "a nested tensor with layout=torch.strided does not say where its examples lie, so "
            "that a composition cannot be given for each; make it with layout=torch.jagged, or "
            "pad it: torch.nested.to_padded_tensor(x, 0.0)"
        )
    twin = twin_of(model)
    batch, own, error = _told(twin, args, kwargs, count)
    sites = [path for path, layer in twin.named_modules() if SITE in layer.__dict__]
    by_values = placed_by_values(twin, args, kwargs, sites)
    if batch is not None and by_values:
        own = _told_by_each(twin, batch, own, by_values)
    nested = any(value.is_nested for value in tensors_in((args, kwargs)))  # its layers say more
    if batch is None and not nested and next(batches(args, kwargs, count), None) is not None:
        check_assumed(model, {}, args, kwargs, error)
        own = {**_in_towers(model), **dict.fromkeys(by_values)}
    says = STATE in model.__dict__ or own.get("") == 1  # what the whole host has second, it says
    found = {path: axis for path, axis in own.items() if path or says}
    return found, not by_values and (batch is None or batch.count == 1 or batch.differ)


_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


def prompt_of(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what of the arguments of ``generate`` is of the forward that reads the prompt.

    None for a prompt of text alone, whose examples lie first, and for an encoder's text, with which
    no decoder can run yet.
    """
    config = getattr(model, "config", None)
    takes = inspect.signature(model.forward).parameters
    text = args[0] if args else kwargs.get("inputs")
    named = kwargs if text is None else {**kwargs, "input_ids": text}
    given = {k: v for k, v in named.items() if k in takes and v is not None and _is_data(v)}
    beside = [k for k, v in given.items() if tensors_in(v) and k not in _TEXT]
    if not beside or getattr(config, "is_encoder_decoder", False):
        return None
    return given


def _told(
    twin: nn.Module, args: tuple, kwargs: Mapping[str, Any], count: int | None
) -> tuple[Batch | None, dict[str, int | None], Exception | None]:
    """Return how the arguments are those of examples, what layers say of them then, and what the
    host raised at first where they are not."""
    best: tuple[Batch | None, dict[str, int | None]] = None, {}
    first: Exception | None = None
    for batch in batches(args, kwargs, count):
        if batch.axes and best[0] is not None:  # it runs on fewer examples of all its tensors
            continue
        try:
            found = _ask_along(twin, batch)
        except REFUSALS as error:  # a host that takes no other number cannot be asked so
            first = first or error
            continue
        if batch.listed:
            best = batch, found
            continue
        told = _is_told(found)
        listed = best[0] is not None and best[0].listed
        another = batch.count > 1 and found != best[1] and (told or not batch.several)
        if listed and another and told == _is_told(best[1]):
            raise CompositionError(_EITHER.format(n=batch.count, axis=batch.axis))
        if told:
            return batch, found, first
        if batch.several or batch.axes or listed:
            continue
        if best[0] is None or _untold(found) < _untold(best[1]):
            best = batch, found
    return best[0], best[1], first


def _in_towers(model: nn.Module) -> dict[str, int | None]:
    """Return that the layers of towers are not known to have the examples first.

    A text may have several images, or none, so that the third image is not the third text's.
    """
    towers = [f"{path}." for path, family, _ in known_models(model) if family.sense and path]
    grafted = [path for path, layer in model.named_modules() if STATE in layer.__dict__]
    return {path: None for path in grafted if path.startswith(tuple(towers))}


def _is_told(found: Mapping[str, int | None]) -> bool:
    """Return whether the host itself keeps the examples apart in what it puts out."""
    return found.get("") not in (None, UNSEEN)


_EITHER = (
    "this batch holds a list of {n}, and tensors with {n} along axis {axis}: either may be the "
    "examples, and the host does not tell which; give it another number of the one than of the "
    "other, or call the host once for each composition"
)


def ask_parts(
    model: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    count: int | None,
    paths: Sequence[str],
) -> dict[str, int]:
    """Return the axis of the examples in all that each of some parts of the host puts out.

    A part is left out where it puts out anything that does not have the examples along that axis.

    Args:
        model: the host's model.
        args: what it is called with.
        kwargs: what it is called with by name.
        count: how many examples this is; None: as many as the first tensor has, along any axis.
        paths: the parts.
    """
    twin = twin_of(model)
    batch, _, _ = _told(twin, args, kwargs, count)
    if batch is None:
        return {}
    number, rows = batch.thrice()
    before, more, other = (_all_outputs(twin, *batch.of(some), paths) for some in rows)
    found = {}
    for path, outputs in before.items():
        others = more.get(path, []), other.get(path, [])
        if any(len(some) != len(outputs) for some in others):
            continue
        axes = {_axis(*outs, number) for outs in zip(outputs, *others, strict=True)}
        axis = axes.pop() if len(axes) == 1 else None
        if axis is not None and axis != -1:
            found[path] = axis
    return found


def _all_outputs(
    twin: nn.Module, args: tuple, kwargs: Mapping[str, Any], paths: Sequence[str]
) -> Seen:
    """Run ``twin``; return every tensor that some parts put out, without the features."""
    found: Seen = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found.setdefault(path, []).extend(map(_without_features, tensors_in(out)))

        return hook

    handles = [twin.get_submodule(p).register_forward_hook(keep(p)) for p in paths]
    run_twin(twin, args, kwargs, handles)
    return found


def _untold(found: Mapping[str, int | None]) -> int:
    return sum(axis is None for path, axis in found.items() if path)


def _told_by_each(
    twin: nn.Module, batch: Batch, own: Mapping[str, int | None], by_values: Set[str]
) -> dict[str, int | None]:
    """Ask again, of all the examples and of each alone, where the numbers of the batch decide.

    Args:
        twin: the host's.
        batch: how the examples are taken.
        own: what a few of them have told.
        by_values: the layers where the numbers decide.
    """
    none = {**own, **dict.fromkeys(by_values)}
    try:
        found = _ask_along(twin, batch, whole=True)
        each = [_outputs(twin, *batch.of([i])) for i in range(batch.count)]
        every = _outputs(twin, *batch.of(list(range(batch.count))))
    except REFUSALS:
        return none

    def alike(path: str, axis: int) -> bool:
        rows = [[out.shape[axis] for out in outputs.get(path, ())] for outputs in each]
        whole = [out.shape[axis] / batch.count for out in every.get(path, ())]
        return all(some == whole for some in rows)

    told = {path: axis for path, axis in found.items() if path in by_values and axis is not None}
    return none | {path: axis for path, axis in told.items() if axis < 0 or alike(path, axis)}


def _ask_along(twin: nn.Module, batch: Batch, whole: bool = False) -> dict[str, int | None]:
    count, rows = batch.thrice(whole)
    before, more, other = (_outputs(twin, *batch.of(some)) for some in rows)
    entries, grown = (seen.pop(_ENTRIES, None) for seen in (before, more))
    other.pop(_ENTRIES, None)
    if batch.listed and _shapes(before) == _shapes(more):
        raise ValueError("a list that is not of examples: with one entry more nothing grows")
    found: dict[str, int | None] = {}
    for path, outputs in before.items():
        others = more.get(path, []), other.get(path, [])
        axes = {_axis(*outs, count) for outs in zip(outputs, *others, strict=False)}
        if any(len(some) != len(outputs) for some in others) or len(axes) > 1:
            found[path] = None
        elif (one := axes.pop()) != -1:
            found[path] = one
        elif path and not _stands_for_all(twin, path, outputs[0], batch, before):
            found[path] = None
    if batch.listed and entries and grown and len(entries[0]) == count == len(grown[0]) - 1:
        found[""] = 0  # an entry for each example, as they came
    sites = [path for path, layer in twin.named_modules() if SITE in layer.__dict__]
    return {**{path: UNSEEN for path in sites if path not in before}, **found}


def _shapes(seen: Seen) -> dict[str, list[torch.Size]]:
    return {path: [output.shape for output in outputs] for path, outputs in seen.items()}


def _stands_for_all(twin: nn.Module, path: str, out: Tensor, batch: Batch, before: Seen) -> bool:
    """Return whether ``out`` is one row that the host adds to each example, as of positions.

    The host is the same then with as many rows of it. Layers other than tables compute what it
    shares between examples in its own way.
    """
    layer = twin.get_submodule(path)
    if not isinstance(layer, nn.Embedding) or (out.dim() and out.shape[0] != 1):
        return False
    count, (rows, *_) = batch.thrice()

    def expand(_: nn.Module, __: Any, row: Tensor) -> Tensor:
        return row.expand(count, *row.shape[1:])

    handle = layer.register_forward_hook(expand)
    try:
        after = _outputs(twin, *batch.of(rows))
    except REFUSALS:
        return False
    finally:
        handle.remove()
    pairs = zip(before.get("", ()), after.get("", ()), strict=True)
    return all(one.shape == other.shape and _same(one, other) for one, other in pairs)


def _axis(before: Tensor, more: Tensor, other: Tensor, count: int) -> int | None:
    """Return the axis of the examples, None if none is, -1 if the output does not grow with them.

    Args:
        before: what a layer put out for ``count`` examples.
        more: what it put out for the same and one behind them.
        other: what it put out where the first is another.
        count: how many they are.
    """
    if before.shape == more.shape:
        return -1
    if before.dim() != more.dim() or before.shape != other.shape:
        return None
    grown = [a for a in range(before.dim()) if before.shape[a] != more.shape[a]]
    axis = grown[0]
    each, left = divmod(before.shape[axis], count)
    if len(grown) > 1 or left or more.shape[axis] != each * (count + 1):
        return None
    if axis and each > 1:  # tokens of all examples in one row
        return None
    rest = before.shape[axis] - each
    kept = _same(before, more.narrow(axis, 0, before.shape[axis]))
    kept = kept and _same(before.narrow(axis, each, rest), other.narrow(axis, each, rest))
    return axis if kept else None


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two outputs are one; what is no number is the same as what is none."""
    scale = float(one.nan_to_num(posinf=0.0, neginf=0.0).abs().amax()) if one.numel() else 0.0
    tolerance = TOLERANCE.get(one.dtype.itemsize, 3e-2) * scale
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)


def _outputs(twin: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Seen:
    """Run ``twin``; return what each grafted layer put out, at every call, without the features."""
    found: Seen = {}
    handles = []

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            if not path and isinstance(out, list | tuple):
                found[_ENTRIES] = [torch.empty(len(out))]
            value = next((v for v in tensors_in(out) if v.dim() and v.is_floating_point()), None)
            if value is not None:
                found.setdefault(path, []).append(_without_features(value))

        return hook

    for path, layer in twin.named_modules():
        if SITE in layer.__dict__:
            handles.append(layer.register_forward_hook(keep(path)))
    run_twin(twin, args, kwargs, handles)
    return found


_ENTRIES = "[]"
"""Instead of a path: how many entries the host's own output has."""


def _without_features(value: Tensor) -> Tensor:
    some = value.detach() if value.is_floating_point() else value.detach().float()
    return some.flatten(2).abs().sum(-1) if some.dim() > 2 else some


def check_assumed(
    model: nn.Module,
    layout: Layout,
    args: tuple,
    kwargs: Mapping[str, Any],
    error: Exception | None = None,
) -> None:
    """Refuse a call of which nobody can be asked where its examples lie, and nothing tells.

    Where it was found for another call it is taken to be the same, and transformers' models have it
    first.

    Args:
        model: the host's.
        layout: what was found for another call.
        args: what the host is called with.
        kwargs: what it is called with by name.
        error: what the host raised when it was asked.

    Raises:
        CompositionError: with what cannot be used twice, or taken apart.
    """
    whole = getattr(model, "get_base_model", lambda: model)()  # in a PEFT model
    if layout or isinstance(whole, PreTrainedModel):
        return
    kept = _kept_or_used_up(args, kwargs)
    if kept is not None:
        why = (
            f"it is called with a {type(kept).__name__}, which can be read once or is written to, "
            f"and so cannot be given to it again"
        )
    else:
        every = walk((*args, *kwargs.values()))
        others = [type(v).__name__ for v in every if contents(v) is None and v is not None]
        beside = ", ".join(dict.fromkeys(n for n in others if n not in ("Tensor", "bool")))
        said = "" if error is None else f": {type(error).__name__}: {str(error).strip()!s:.150}"
        why = f"it does not run on some of these{said}"
        why += f" (it is called with {beside} too)" * bool(beside)
    raise CompositionError(
        f"the examples of a batch act by themselves here, and where they lie in the host's layers "
        f"is found by running it on some of them; {why}. Call it with tensors, lists, mappings or "
        f"objects of your own that hold them and nothing that counts them, or call it once for "
        f"each composition"
    ) from error


def _kept_or_used_up(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Return the first of the arguments, or of what they hold, that is not to be used twice."""
    return next((each for each in walk((args, kwargs)) if not _is_data(each)), None)


def _is_data(value: Any) -> bool:
    """Return whether ``value`` is the same at its next use, apart from what it holds."""
    known = (Tensor, np.ndarray, *_TOLD_APART)
    if contents(value) is not None or isinstance(value, known) or callable(value):
        return True
    return not isinstance(value, Iterator) and not is_of_a_library(value)


_TOLD_APART = (
    type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, np.generic,
)  # fmt: skip
"""What calls that differ in it are not alike."""
