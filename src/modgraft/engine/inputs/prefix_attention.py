"""Keys and values of modules before those of an attention layer, at the one place all layers pass.

transformers asks one registry for the function that attends, and calls it with the layer first and
with the keys and values that the KV cache gave back. ``serve`` puts :func:`_attend` around every
function the registry hands out, once a process: where modules are in force on that layer, theirs go
before the layer's own; so a cache never holds them, and each step sees them once. A layer without
any gets the function it asked for, with the arguments it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.computation.base import Computation, KeyValueComposition
from modgraft.core.context import missing_side, switched
from modgraft.core.errors import CompositionError, ModgraftError
from modgraft.core.expression import Expression, weighted
from modgraft.core.per_example import Each
from modgraft.engine.inputs.tokens import fold
from modgraft.engine.kernels import decode_attention as one_query
from modgraft.engine.plan import Entry
from modgraft.engine.run import STATE, State
from modgraft.routing.mixture import Routed

KeysValues = tuple[Tensor, Tensor]

SERVED = ("eager", "sdpa")
_OF_OWN_KEYS = ("cache", "indices", "block_indices")  # arguments that count a layer's own keys
_INSTALLED = "_modgraft_installed"
_observed: ContextVar[dict[nn.Module, tuple[Tensor, Tensor]] | None] = ContextVar(
    "modgraft_observed", default=None
)


def serve(module: Computation) -> None:
    """See to it that ``module`` reaches the attention functions, if it is of keys and values."""
    if not isinstance(module, KeyValueComposition):
        return
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
    """The keys and values ``[B, h, n, d]`` of the layers that attend inside a ``with`` block."""
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
    """``function`` of what is in force at ``module`` before its own keys ``[B, h, n, d]``."""
    state: State | None = module.__dict__.get(STATE)
    before = None if state is None else _kept_before(state, key)
    if not torch.compiler.is_compiling() and (found := _observed.get()) is not None:
        found[module] = key, value
    if state is None or before is None:
        return function(module, query, key, value, attention_mask, *args, **kwargs)
    odd = [name for name in _OF_OWN_KEYS if kwargs.get(name) is not None]
    if kind not in SERVED or odd:
        what = " with ".join([repr(kind), *odd])
        raise ModgraftError(
            f"{before.names} puts keys and values before those of {state.path}, which can be "
            f"done for attention by {' and '.join(SERVED)}, not by {what}; "
            f"host.model.set_attn_implementation('sdpa')"
        )
    count = before.keys.shape[2]
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    # an eager function takes no mask to mean that all is seen, sdpa that the layer knows
    causal = causal and kind == "sdpa" and query.shape[2] > 1
    mask = _extended(attention_mask, query, key, count, causal, before.seen, kind)
    if kwargs.get("position_bias") is not None:  # [1, h, q, n]: of the layer's own keys alone
        kwargs["position_bias"] = F.pad(kwargs["position_bias"], (count, 0))
    state.attended += 1
    if one_query.applies(function, query, kwargs):
        own = before.keys, before.values
        return one_query.attend(query, own, (key, value), mask, kwargs.get("scaling")), None
    key = torch.cat([before.keys, key], dim=2)  # [B, h, k + n, d]
    value = torch.cat([before.values, value], dim=2)
    return function(module, query, key, value, mask, *args, **kwargs)


@dataclass(frozen=True)
class Before:
    """Keys and values ``[B, h, k, d]`` that go before a layer's own; ``seen`` None: all of them."""

    names: str
    keys: Tensor
    values: Tensor
    seen: Tensor | None = None


def _kept_before(state: State, key: Tensor) -> Before | None:
    """What goes before keys like ``key`` ``[B, h, n, d]``, kept while no module of it changes."""
    call = state.context.now()
    if torch.compiler.is_compiling() or call.composition is None:
        return _before(state, key)
    kept = state.remembered(call.composition).before
    if kept is None:
        return _before(state, key)
    alike = key.shape[0], key.shape[1], key.shape[3], key.dtype, key.device
    return kept.get(alike, lambda: _before(state, key))


def _before(state: State, key: Tensor) -> Before | None:
    """What goes before keys like ``key`` ``[B, h, n, d]``, in the order of the composition.

    In compiled code all that is resident: a switch of composition writes weights, which say what is
    seen, and changes no graph.
    """
    call = state.context.now()
    composition = call.composition
    if composition is None:
        return None
    entries = {entry.name: entry for entry in state.of(KeyValueComposition)}
    if not entries:
        return None
    batch = key.shape[0]
    names = ", ".join(map(repr, entries))
    mixed = {
        entry.name: entry.module
        for some in state.named.values()
        for entry in some
        if isinstance(entry.module, Routed) and any(m in entries for m in entry.module.members)
    }
    if not any(name in entries or name in mixed for name in composition.names()):
        return None

    def one(name: str, rows: Tensor | None) -> list[KeysValues]:
        if name in entries:
            return [_keys_values(entries[name], state, key, batch, rows)]
        if name not in mixed:
            return []
        each = [one(member, rows) for member in mixed[name].members]
        weights = mixed[name].weights(call, key, rows)
        pairs = [(w, own[0]) for w, own in zip(weights, each, strict=True) if own]
        return _weighted_mean(name, pairs)

    if switched(composition):
        weights = state.context.compiled.weights
        made, seen = [], []
        for name in (*entries, *mixed):
            for own in one(name, None):
                made.append(own)
                seen.append((weights[name] != 0).expand(own[0].shape[2]))
        return Before(names, *_joined(made), seen=torch.cat(seen))

    def of(expression: Expression, rows: Tensor | None) -> list[KeysValues]:
        return fold(expression, lambda name: one(name, rows), partial(_mean, expression))

    if not isinstance(composition, Each):
        made = of(composition, None)
        return Before(names, *_joined(made)) if made else None
    return _by_example(names, composition, key, of)


def _by_example(
    names: str,
    composition: Each,
    key: Tensor,
    of: Callable[[Expression, Tensor | None], list[KeysValues]],
) -> Before:
    """What goes before each example's own keys, as many for all: the rest is not seen.

    Args:
        names: for errors.
        composition: one for each example.
        key: ``[B, h, n, d]``, the layer's own.
        of: an expression and the rows that it is for → what goes before theirs.
    """
    batch = key.shape[0]
    times = max(1, batch // len(composition.rows))
    some: list[tuple[list[int], KeysValues | None]] = []
    for row, examples in composition.different.items():
        rows = [i * times + k for i in examples for k in range(times)]
        index = torch.tensor(rows, device=key.device)
        made = [] if row is None else of(row, index)
        some.append((rows, _joined(made) if made else None))
    counts = {i: 0 if own is None else own[0].shape[2] for rows, own in some for i in rows}
    most = max(counts.values())
    order = torch.tensor([i for rows, _ in some for i in rows], device=key.device).argsort()

    def whole(of: int) -> Tensor:
        """Keys (0) or values (1) ``[B, h, most, d]`` of all examples, at the end of their room."""
        none = key.new_zeros(1, key.shape[1], most, key.shape[3])
        padded = [
            none.expand(len(rows), -1, -1, -1)
            if own is None
            else F.pad(own[of], (0, 0, most - own[of].shape[2], 0))
            for rows, own in some
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
    """The mean of keys and of values, one by one."""
    lengths = [keys.shape[2] for keys, _ in several]
    if len(set(lengths)) > 1:
        raise CompositionError(
            f"{expression}: the mean of prefixes is of as many keys each, and there are "
            f"{', '.join(map(str, lengths))}"
        )
    keys, values = zip(*several, strict=True)
    return torch.stack(keys).mean(0), torch.stack(values).mean(0)


def _weighted_mean(name: str, several: list[tuple[Tensor, KeysValues]]) -> list[KeysValues]:
    """Σ α_j (K_j, V_j) of a mixture, α_j a number or ``[B]``."""
    lengths = [keys.shape[2] for _, (keys, _) in several]
    if len(set(lengths)) > 1:
        raise CompositionError(
            f"{name!r} mixes prefixes of {', '.join(map(str, lengths))} keys; their mean is of as "
            f"many each"
        )
    both = [sum(weighted(w, own[k]) for w, own in several) for k in (0, 1)]
    return [(both[0], both[1])] if several else []  # type: ignore[list-item]


def _keys_values(
    entry: Entry, state: State, key: Tensor, batch: int, rows: Tensor | None
) -> KeysValues:
    """What a module puts before keys like ``key`` ``[B, h, n, d]``, or before some rows of them."""
    module, (_, heads, _, width) = entry.module, key.shape
    assert isinstance(module, KeyValueComposition)  # noqa: S101
    side = None
    if module.side_source is not None:
        compiling = torch.compiler.is_compiling()
        call = state.context.compiled.call if compiling else state.context.current()
        side = call.side_input(module.side_source, batch)
        if side is None:
            raise missing_side(entry.name, module.side_source)
        side = side if rows is None else side.picked(rows)
    batch = batch if rows is None else len(rows)
    keys, values = module.keys_values(batch, side)
    for made in (keys, values):
        if made.shape[:2] != (batch, heads) or made.shape[3] != width:
            raise ModgraftError(
                f"{entry.name!r} made keys or values {list(made.shape)} for {state.path}, which "
                f"attends to [{batch}, {heads}, n, {width}]; choose another attention layer with "
                f"at=, or leave this one out"
            )
    return keys.to(key.dtype), values.to(key.dtype)


def _extended(
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    count: int,
    causal: bool,
    seen: Tensor | None,
    kind: str,
) -> Tensor | None:
    """A layer's mask with ``count`` columns before it, seen by every query.

    Args:
        mask: ``[B or 1, h or 1, q or 1, n]``, bool (True is seen) or added to the scores.
        query: ``[B, h, q, d]``.
        key: ``[B, h, n, d]``, the layer's own.
        count: how many keys go before them.
        causal: what no mask means: a query sees the keys up to its own position, else all.
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
