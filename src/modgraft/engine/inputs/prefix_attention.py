"""Puts keys and values of modules before those of an attention layer.

transformers asks one registry for the function that attends, and calls it with the layer first and
with the keys and values that the KV cache gave back. :func:`hook_attention` puts :func:`_attend`
around every function that the registry hands out, once a process. Where modules are in force on a
layer, their keys and values go before the layer's own; so a cache never holds them, and each step
sees them once. Any other layer gets the function that it asked for, with the arguments it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.computation.base import KeyValueComposition
from modgraft.core.compiled import switched
from modgraft.core.context import kept_in_call
from modgraft.core.errors import CompositionError, ModgraftError, UndividedError
from modgraft.core.expression import Expression, weighted
from modgraft.core.per_example import Each
from modgraft.engine.inputs.expressions import fold
from modgraft.engine.kernels import decode_attention
from modgraft.engine.plan import Entry
from modgraft.engine.state import STATE, State
from modgraft.routing.mixture import RoutedMixture

KeysValues = tuple[Tensor, Tensor]

SUPPORTED = ("eager", "sdpa")
_COUNT_OWN_KEYS = ("cache", "indices", "block_indices")  # arguments that number a layer's own keys
_INSTALLED = "_modgraft_installed"
_observed: ContextVar[dict[nn.Module, tuple[Tensor, Tensor]] | None] = ContextVar(
    "modgraft_observed", default=None
)


def hook_attention() -> None:
    """Hook transformers' attention functions, once a process."""
    from transformers.modeling_utils import AttentionInterface

    original = AttentionInterface.get_interface
    if _INSTALLED in original.__dict__:
        return

    @wraps(original)
    def get_interface(self: Any, attn_implementation: str | None, default: Callable) -> Callable:
        function = original(self, attn_implementation, default)  # type: ignore[arg-type]
        return partial(_attend, function, attn_implementation or "eager")

    get_interface.__dict__[_INSTALLED] = True
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


@contextmanager
def observed() -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Collect the keys and values ``[B, h, n, d]`` of layers that attend in a ``with`` block."""
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    token = _observed.set(found)
    try:
        yield found
    finally:
        _observed.reset(token)


def _attend(
    function: Callable[..., Any],
    kind: str,
    /,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call ``function`` with what is in force at ``module`` before its keys ``[B, h, n, d]``."""
    state: State | None = module.__dict__.get(STATE)
    before = None if state is None else _kept_before(state, key, value)
    if not torch.compiler.is_dynamo_compiling() and (found := _observed.get()) is not None:
        found[module] = key, value
    if state is None or before is None:
        return function(module, query, key, value, attention_mask, *args, **kwargs)
    _check_supported(before, state, kind, kwargs)
    if before.keys.shape[0] != key.shape[0]:
        raise UndividedError(
            f"{before.names} gives each example keys and values of its own, and {state.path} "
            f"attends in {key.shape[0]} row(s) for {before.keys.shape[0]} examples, all of them in "
            f"one as a tower of packed images does; call the host once for each composition",
            state.path,
        )
    count = before.keys.shape[2]
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    # no mask means to an eager function that all is seen, and to sdpa what the layer says
    causal = causal and kind == "sdpa" and query.shape[2] > 1
    mask = _extended(attention_mask, query, key, count, causal, before.seen, kind)
    if kwargs.get("position_bias") is not None:  # [1, h, q, n]: of the layer's own keys alone
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (count, 0))
    state.attended += 1
    if decode_attention.applies(function, query, kwargs):
        own = before.keys, before.values
        scaling = kwargs.get("scaling")
        return decode_attention.attend(query, own, (key, value), mask, scaling), None
    key = torch.cat([before.keys, key], dim=2)  # [B, h, k + n, d]
    value = torch.cat([before.values, value], dim=2)
    return function(module, query, key, value, mask, *args, **kwargs)


def _check_supported(before: Before, state: State, kind: str, kwargs: dict[str, Any]) -> None:
    """Refuse attention functions that keys and values cannot be put into.

    Raises:
        ModgraftError: with one that can.
    """
    odd = [name for name in _COUNT_OWN_KEYS if kwargs.get(name) is not None]
    if kind not in SUPPORTED or odd:
        what = " with ".join([repr(kind), *odd])
        raise ModgraftError(
            f"{before.names} puts keys and values before those of {state.path}, which can be "
            f"done for attention by {' and '.join(SUPPORTED)}, not by {what}; "
            f"host.model.set_attn_implementation('sdpa')"
        )


@dataclass(frozen=True)
class Before:
    """Keys and values ``[B, h, k, d]`` that go before a layer's own.

    Attributes:
        names: the modules' names, for errors.
        keys: the keys.
        values: the values.
        seen: ``[k]`` or ``[B, k]`` bool, which of them are seen; None: all.
    """

    names: str
    keys: Tensor
    values: Tensor
    seen: Tensor | None = None


def _kept_before(state: State, key: Tensor, value: Tensor) -> Before | None:
    """Return what goes before a layer's keys and values ``[B, h, n, d]``, made once in a call."""
    composition = state.context.now().composition
    if torch.compiler.is_dynamo_compiling() or composition is None:
        return _before(state, key, value)
    plan = state.plan(composition)
    if not plan.keeps_keys_values:
        return _before(state, key, value)
    alike = key.shape[0], key.shape[1], key.shape[3], key.dtype, key.device
    return kept_in_call((plan, alike), lambda: _before(state, key, value))


def _before(state: State, key: Tensor, value: Tensor) -> Before | None:
    """Return what goes before keys and values ``[B, h, n, d]``, in the order of the composition.

    Compiled code puts in what every module of the host has there: switching the composition writes
    weights, which say what is seen, and changes no graph.
    """
    call = state.context.now()
    composition = call.composition
    if composition is None:
        return None
    asked = None if switched(composition) else composition.names()
    mixed = _mixtures(state, asked)
    if asked is not None:
        asked = (*asked, *(member for mixture in mixed.values() for member in mixture.members))
    entries = {entry.name: entry for entry in state.of_kind(KeyValueComposition, asked)}
    if not any(name in entries or name in mixed for name in composition.names()):
        return None
    names = ", ".join(map(repr, entries))

    def one(name: str, rows: Tensor | None) -> list[KeysValues]:
        if name in entries:
            return [_keys_values(entries[name], state, (key, value), rows)]
        if name not in mixed:
            return []
        each = [one(member, rows) for member in mixed[name].members]
        weights = mixed[name].weights(call, None, key, rows).unbind(-1)
        pairs = [(w, own[0]) for w, own in zip(weights, each, strict=True) if own]
        return _weighted_mean(name, pairs)

    def of(expression: Expression, rows: Tensor | None) -> list[KeysValues]:
        return fold(expression, lambda name: one(name, rows), partial(_mean, expression))

    if switched(composition):
        made, seen, weights = [], [], composition.weights()
        for name in (*entries, *mixed):
            for own in one(name, None):
                made.append(own)
                seen.append((weights[name] != 0).expand(own[0].shape[2]))  # type: ignore[union-attr]
        return Before(names, *_joined(made), seen=torch.cat(seen))
    if not isinstance(composition, Each):
        made = of(composition, None)
        return Before(names, *_joined(made)) if made else None
    return _by_example(names, composition, (key, value), of)


def _mixtures(state: State, names: Iterable[str] | None) -> dict[str, RoutedMixture]:
    """Return those of some names, or all, that are mixtures of modules with keys and values."""
    found: dict[str, RoutedMixture] = {}
    for entry in state.every() if names is None else state.named(names):
        module = entry.module
        if isinstance(module, RoutedMixture) and state.of_kind(KeyValueComposition, module.members):
            found[entry.name] = module
    return found


def _by_example(
    names: str,
    composition: Each,
    own: KeysValues,
    of: Callable[[Expression, Tensor | None], list[KeysValues]],
) -> Before:
    """Return what goes before each example's own keys, padded to the longest and masked.

    Args:
        names: the modules' names, for errors.
        composition: one for each example.
        own: the layer's own, ``[B, h, n, d]``.
        of: an expression and the rows that it is for → what goes before theirs.
    """
    key = own[0]
    batch = key.shape[0]
    times = max(1, batch // len(composition.rows))
    made_of: list[tuple[list[int], KeysValues | None]] = []
    for row, examples in composition.different.items():
        rows = [i * times + k for i in examples for k in range(times)]
        index = torch.tensor(rows, device=key.device)
        made = [] if row is None else of(row, index)
        made_of.append((rows, _joined(made) if made else None))
    counts = {i: 0 if some is None else some[0].shape[2] for rows, some in made_of for i in rows}
    most = max(counts.values())
    order = torch.tensor([i for rows, _ in made_of for i in rows], device=key.device).argsort()

    def whole(of: int) -> Tensor:
        """Pad the keys (0) or values (1) of all examples on the left, ``[B, h, most, d]``."""
        none = key.new_zeros(1, key.shape[1], most, own[of].shape[3])
        padded = [
            none.expand(len(rows), -1, -1, -1)
            if some is None
            else F.pad(some[of], (0, 0, most - some[of].shape[2], 0))
            for rows, some in made_of
        ]
        return torch.cat(padded)[order]

    lengths = torch.tensor([counts[i] for i in range(batch)], device=key.device)
    seen = torch.arange(most, device=key.device) >= most - lengths[:, None]  # [B, most]
    return Before(names, whole(0), whole(1), None if bool(seen.all()) else seen)


def _joined(made: list[KeysValues]) -> KeysValues:
    if len(made) == 1:
        return made[0]
    return torch.cat([keys for keys, _ in made], 2), torch.cat([values for _, values in made], 2)


def _mean(expression: Expression, several: list[KeysValues]) -> KeysValues:
    """Return the mean of the keys and that of the values, one by one."""
    lengths = [keys.shape[2] for keys, _ in several]
    if len(set(lengths)) > 1:
        raise CompositionError(
            f"{expression}: the mean of prefixes is of as many keys each, and there are "
            f"{', '.join(map(str, lengths))}"
        )
    keys, values = zip(*several, strict=True)
    return torch.stack(keys).mean(0), torch.stack(values).mean(0)


def _weighted_mean(name: str, several: list[tuple[Tensor, KeysValues]]) -> list[KeysValues]:
    """Return a mixture's Σ α_j (K_j, V_j), α_j a number or ``[B]``."""
    lengths = [keys.shape[2] for _, (keys, _) in several]
    if len(set(lengths)) > 1:
        raise CompositionError(
            f"{name!r} mixes prefixes of {', '.join(map(str, lengths))} keys; their mean is of as "
            f"many each"
        )
    both = [sum(weighted(w, own[k]) for w, own in several) for k in (0, 1)]
    return [(both[0], both[1])] if several else []  # type: ignore[list-item]


def _keys_values(entry: Entry, state: State, own: KeysValues, rows: Tensor | None) -> KeysValues:
    """Return what a module puts before keys and values ``[B, h, n, d]``, or some rows of them."""
    module, (batch, heads, *_) = entry.module, own[0].shape
    assert isinstance(module, KeyValueComposition)  # noqa: S101
    side = None
    if module.side_source is not None:
        side = state.context.now().resolve(module.side_source, entry.name, batch, rows)
    batch = batch if rows is None else len(rows)
    keys, values = module.keys_values(batch, side)
    for made, width in zip((keys, values), (own[0].shape[3], own[1].shape[3]), strict=True):
        if made.shape[:2] != (batch, heads) or made.shape[3] != width:
            raise ModgraftError(
                f"{entry.name!r} made keys or values {list(made.shape)} for {state.path}, which "
                f"attends to [{batch}, {heads}, n, {width}]; choose another attention layer with "
                f"at=, or leave this one out"
            )
    return keys.to(own[0].dtype), values.to(own[0].dtype)


def _extended(
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    count: int,
    causal: bool,
    seen: Tensor | None,
    kind: str,
) -> Tensor | None:
    """Put ``count`` columns, seen by every query, before a layer's mask.

    Args:
        mask: ``[B or 1, h or 1, q or 1, n]``, bool (True is seen) or added to the scores.
        query: ``[B, h, q, d]``.
        key: ``[B, h, n, d]``, the layer's own.
        count: how many keys go before them.
        causal: whether no mask means that a query sees the keys up to its own position.
        seen: ``[count]`` or ``[B, count]`` bool, which of them are seen; None: all.
        kind: the attention function, which takes a bool mask (sdpa) or an added one (eager).
    """
    q, n = query.shape[2], key.shape[2]
    if mask is None:
        if seen is None and not causal:
            return None
        if kind == "sdpa":
            mask = torch.ones(1, 1, q, n, dtype=torch.bool, device=key.device)
            mask = mask.tril() if causal else mask
        else:
            mask = torch.zeros(1, 1, q, n, dtype=query.dtype, device=key.device)
    if mask.shape[-1] not in (1, n):
        raise ModgraftError(
            f"an attention mask {list(mask.shape)} for {n} keys: a prefix cannot tell which of its "
            f"columns are whose; pass one column a key, as transformers' models do"
        )
    if seen is not None and seen.dim() == 2:
        mask = mask.expand(len(seen), *mask.shape[1:])
        seen = seen[:, None, None]  # [B, 1, 1, count]
    mask = mask.expand(*mask.shape[:-1], n)
    shape = (*mask.shape[:-1], count)
    if mask.dtype == torch.bool:
        columns = mask.new_ones(shape) if seen is None else seen.expand(shape)
    else:
        columns = mask.new_zeros(shape)
        if seen is not None:  # −inf, where a text's own columns may all be the least number
            columns = columns.masked_fill(~seen, -torch.inf)
    return torch.cat([columns, mask], dim=-1)  # [.., .., q or 1, k + n]
