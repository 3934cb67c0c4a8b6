"""Runs a part of the host once for each composition of a batch, where a layer in it runs for all.

A table of relative positions, a convolution whose weight its parent reads, or attention with
weights of its own runs once for all examples of a batch, so nothing can give each of them another
weight there. The smallest part around it whose output has the examples along one axis can: it runs
once for each composition, on the whole batch, and of each run the examples of that composition are
taken. Which part that is, the host is asked (``parts.py``) the first time that such a layer
refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from modgraft.core.call import Call
from modgraft.core.context import Context
from modgraft.core.errors import CompositionError
from modgraft.core.expression import Expression, walk
from modgraft.core.per_example import Each, Weighted
from modgraft.core.side import EXAMPLE
from modgraft.core.tensors import contents
from modgraft.engine.capturing import add_captured, captured_apart
from modgraft.engine.state import STATE, State
from modgraft.routing.mixture import RoutedMixture

PART = "part "
"""What a layout calls a part by: this, and its path."""


def axis_of(state: State, call: Call, composition: Expression) -> int | None:
    """Return along which axis of its output the part at ``state`` is divided; None: it is not."""
    if call.alike or call.generating or call.layout is None or not call.in_forward:
        return None
    axis = call.layout.get(PART + state.path)
    if axis is None or not _differs(state.context, composition):
        return None
    here = any(name in some.entries for some in state.divides for name in composition.names())
    return axis if here else None


def _differs(context: Context, composition: Expression) -> bool:
    return composition.of_batch or any(
        context.side_sources.get(name) == EXAMPLE for name in composition.names()
    )


def run(
    layer: nn.Module, state: State, call: Call, axis: int, again: Callable[..., Any], of: tuple
) -> Any:
    """Run a part once for each composition, and put together what it puts out.

    Args:
        layer: the part.
        state: what is kept there.
        call: the call of the host.
        axis: of the examples in what it puts out.
        again: runs it, under the call under way.
        of: what it is called with, ``args`` and ``kwargs``.

    Raises:
        CompositionError: where routers in it learn by a loss of their own, once for every run, or
            where it leaves more than what it puts out.
    """
    runs = list(_runs(layer, call))
    if len(runs) == 1:
        with state.context.call(runs[0][0]):
            out = again(layer, *of)
        call.routings.extend(runs[0][0].routings)
        return out
    outs, copies, captured, left = [], [], [], []
    before = _kept(layer)
    for inner, _ in runs:
        given = _copied(of)
        as_given = _marks(given)
        with state.context.call(inner), captured_apart() as seen:
            outs.append(again(layer, *given))
        if _marks(given) != as_given:
            raise CompositionError(_LEAVES.format(path=state.path, what="what it is given"))
        left.append({key: kept for key, kept in _kept(layer).items() if before.get(key) != kept})
        if inner.routings:
            raise CompositionError(
                f"routers in {state.path} learn by a loss of their own, and it runs once for each "
                f"composition of this batch; call the host once for each composition"
            )
        copies.append(given)
        captured.append(seen)
    _check_left(left, state.path)
    at = _Rows([rows for _, rows in runs], axis, state.path)
    _check_captured(captured[0], at, state.path)
    add_captured(at.join(captured))
    for old, *new in zip(_caches(of), *map(_caches, copies), strict=True):
        old.__dict__.update(at.join(new).__dict__)
        at.known[id(new[0])] = old
    return at.join(outs)


_LEAVES = (
    "{path} runs once for each composition of this batch, and writes to {what}, which would be "
    "that of one composition for all examples; call the host once for each composition"
)


def _marks(value: Any, within: frozenset[int] = frozenset()) -> Any:
    """Return what tells whether a value was written to: a tensor, or what holds such."""
    if isinstance(value, Tensor):
        return id(value), value._version if not value.is_inference() else 0
    held = dict(enumerate(value)) if isinstance(value, set) else contents(value)
    if held is None or id(value) in within:
        return value if isinstance(value, _PLAIN) else id(value)
    within |= {id(value)}
    return id(value), [(key, _marks(one, within)) for key, one in held.items()]


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _kept(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """Return the marks of what the modules of a part keep from call to call."""
    return {
        (path, name): _marks(value)
        for path, module in layer.named_modules()
        for name, value in {**module.__dict__, **module._buffers, **module._parameters}.items()
        if name not in _TORCHS and name != STATE
    }


_TORCHS = nn.Module().__dict__.keys()


def _check_left(left: Sequence[Mapping[tuple[str, str], Any]], path: str) -> None:
    """Refuse a part that keeps something else of each run.

    Raises:
        CompositionError: with what it keeps.
    """
    for key in {key for one in left for key in one}:
        if any(one.get(key) != left[0].get(key) for one in left):
            where = ".".join(filter(None, (path, *key)))
            raise CompositionError(_LEAVES.format(path=path or "the host", what=where))


def _check_captured(captured: Mapping[str, list[Any]], at: _Rows, path: str) -> None:
    """Refuse to capture what does not have a row for each example.

    Raises:
        CompositionError: with its name.
    """
    for name, values in captured.items():
        for value in _tensors(values):
            if value.dim() <= at.axis or value.shape[at.axis] != at.count:
                raise CompositionError(
                    f"output_{name} asks for {list(value.shape)} of a layer in {path}, which runs "
                    f"once for each composition of this batch, and {at.count} examples have not a "
                    f"row each there; leave output_{name} out, or call the host once for each "
                    f"composition"
                )


def _runs(layer: nn.Module, call: Call) -> Iterator[tuple[Call, list[int]]]:
    """Yield a call for each composition of the batch, with the examples of that composition."""
    composition = call.composition
    assert composition is not None  # noqa: S101

    def anew(composition: Expression | None, choices: Mapping[Hashable, Any]) -> Call:
        kept = None if call.kept is None else {}
        given = {
            "routings": [],
            "outputs": {},
            "kept": kept,
            "choices": {**call.choices, **choices},
        }
        return replace(call, composition=composition, alike=True, **given)

    if isinstance(composition, Each):
        groups = list(composition.different.items())
    else:
        groups = [(composition, list(range(_count(composition, call))))]
    for one, rows in groups:
        chosen = {} if one is None else _choices(layer, call, one)
        if one is None or not (one.is_data or chosen):
            yield anew(one, {}), rows
            continue
        for i in rows:
            choices = {k: replace(v, weights=v.weights[i]) for k, v in chosen.items()}  # [N]
            yield anew(one.of_example(i), choices), [i]


def _count(composition: Expression, call: Call) -> int:
    for part in walk(composition):
        if isinstance(part, Weighted):
            return len(part.tensor)
    return len(call.side[EXAMPLE].tensor)


def _choices(layer: nn.Module, call: Call, composition: Expression) -> dict[Any, Any]:
    """Return what the mixtures of ``composition`` have chosen for each example, ``[B, N]``."""
    found = {}
    for each in layer.modules():
        entries = each.__dict__[STATE].entries if STATE in each.__dict__ else {}
        for name in composition.names():
            for entry in entries.get(name, ()):
                if isinstance(entry.module, RoutedMixture) and entry.module.side_source == EXAMPLE:
                    key = entry.module.key
                    found[key] = call.choices[key]
    return found


class _Rows:
    """Puts together what several runs put out: of each, the rows of its examples.

    Args:
        rows: the examples of each run.
        axis: of the examples.
        path: the part's, for errors.
    """

    def __init__(self, rows: Sequence[Sequence[int]], axis: int, path: str) -> None:
        self.rows, self.axis, self.path = rows, axis, path
        self.count = sum(map(len, rows))
        self.known: dict[int, Any] = {}

    def join(self, values: Sequence[Any]) -> Any:
        """Return one value in place of that of each run: tensors, and what is made of them."""
        first = values[0]
        if id(first) in self.known:
            return self.known[id(first)]
        if isinstance(first, Tensor):
            return self._tensor(values, self.axis)
        if isinstance(first, Cache):
            return _rebuilt(first, self._inside([value.__dict__ for value in values]))
        if isinstance(first, Mapping):
            new = {key: self.join([value[key] for value in values]) for key in first}
            return type(first)(**new) if type(first) is not dict else new
        if isinstance(first, tuple | list):
            if len({len(value) for value in values}) > 1:
                return self._one(values)
            new = [self.join(some) for some in zip(*values, strict=True)]
            named = isinstance(first, tuple) and type(first) is not tuple
            return type(first)(*new) if named else type(first)(new)
        return self._one(values)

    def _one(self, values: Sequence[Any]) -> Any:
        """Return what every run has put out, the same."""
        first = values[0]
        plain = isinstance(first, _PLAIN) and all(value == first for value in values)
        if plain or all(value is first for value in values):
            return first
        raise CompositionError(
            f"{self.path} runs once for each composition of this batch, and puts out a "
            f"{type(first).__name__}, another one each time; call the host once for each "
            f"composition"
        )

    def _tensor(self, values: Sequence[Tensor], axis: int) -> Tensor:
        first = values[0]
        if first.dim() <= axis or not first.shape[axis] or first.shape[axis] % self.count:
            if all(torch.equal(first, value) for value in values):
                return first
            raise CompositionError(
                f"{self.path} runs once for each composition of this batch, and puts out "
                f"{list(first.shape)}, in which {self.count} examples have not a row each, as in a "
                f"loss; call the host once for each composition"
            )
        times = first.shape[axis] // self.count
        new = first
        for value, rows in zip(values[1:], self.rows[1:], strict=True):
            index = torch.tensor([i * times + k for i in rows for k in range(times)])
            index = index.to(value.device)
            new = new.index_copy(axis, index, value.index_select(axis, index))
        return new

    def _inside(self, values: Sequence[Any]) -> Any:
        """Join what caches hold, whose tensors have the examples first where they have any."""
        first = values[0]
        if isinstance(first, Tensor):
            grows = first.dim() and first.shape[0] % self.count == 0
            return self._tensor(values, 0) if grows else first
        if isinstance(first, dict):
            return {key: self._inside([value[key] for value in values]) for key in first}
        if isinstance(first, tuple | list):
            return type(first)([self._inside(some) for some in zip(*values, strict=True)])
        if _holds_tensors(first):
            return _rebuilt(first, self._inside([value.__dict__ for value in values]))
        return self._one(values)


def _rebuilt(like: Any, own: dict[str, Any]) -> Any:
    made = copy.copy(like)
    made.__dict__.update(own)
    return made


def _holds_tensors(value: Any) -> bool:
    """Return whether this is a cache, or a layer of one."""
    return type(value).__module__ == Cache.__module__ or isinstance(value, Cache)


def _copied(arguments: tuple) -> tuple:
    """Return what a part is called with, with copies of the caches that it writes to."""
    known: dict[int, Any] = {}

    def own(value: Any) -> Any:
        if isinstance(value, Cache):
            memo: dict[int, Any] = {id(t): t.clone() for t in _tensors(value)}
            return known.setdefault(id(value), copy.deepcopy(value, memo))
        if type(value) in (tuple, list):
            return type(value)(map(own, value))
        return {k: own(v) for k, v in value.items()} if type(value) is dict else value

    return own(arguments)


def _caches(value: Any) -> Iterator[Cache]:
    if isinstance(value, Cache):
        yield value
    elif type(value) in (tuple, list, dict):
        for each in value.values() if type(value) is dict else value:
            yield from _caches(each)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif _holds_tensors(value):
        yield from _tensors(value.__dict__)
