"""Measures what the layers of a host do in one call, for :mod:`modgraft.host.probe`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from modgraft.core.tensors import is_plain, rebuilt, tensors_in, with_contents
from modgraft.engine.graft import undivide
from modgraft.engine.writes import attributes_of

CLOSE = 1e-3
"""How far a result may be off, as a share of the effect that is looked for."""

ROUNDING = {torch.float64: 1e-9, torch.float32: 3e-5}
"""The same, as a share of the output: what its type loses on the way; another type, 3 %."""

Look = Callable[[str, tuple, dict, Tensor], None]


@dataclass
class Seen:
    """What was seen of one layer in a call of the host.

    Attributes:
        calls: how often it was called.
        output: a copy of the first tensor that it put out at first.
        written: whether something wrote into that tensor later.
    """

    calls: int = 0
    output: Tensor | None = None
    written: bool = False


@contextmanager
def watched(layers: Mapping[str, nn.Module], look: Look | None = None) -> Iterator[dict[str, Seen]]:
    """See what layers do in a ``with`` block.

    Args:
        layers: by path.
        look: is called with a layer's path, its arguments and its output at its first call.
    """
    seen = {path: Seen() for path in layers}
    kept: dict[str, tuple[Tensor, int]] = {}

    def hook(path: str) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            own = seen[path]
            own.calls += 1
            y = first_float(out)
            if own.output is not None or y is None or is_functorch_wrapped_tensor(y):
                return  # a tensor of vmap is not to be seen outside of it
            own.output = y.detach().clone()
            kept[path] = y, y._version
            if look is not None:
                look(path, args, kwargs, own.output)

        return after

    handles = [m.register_forward_hook(hook(p), with_kwargs=True) for p, m in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for path, (y, version) in kept.items():
            seen[path].written = y._version > version


@contextmanager
def as_it_was(model: nn.Module, modules: nn.Module) -> Iterator[None]:
    """Run a ``with`` block in evaluation, and leave everything as it was before it.

    Buffers, attributes that layers set on themselves, what these hold, hooks, parameters of
    ``modules``, what trains, and random numbers are restored, also after an error.
    """
    undivide(model)  # what is found again when it is needed
    every = [*model.modules(), *modules.modules()]
    put_back = [attributes_of(every), _tensors(model, modules), _parameters(modules)]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            for module in every:
                module.training = False
            with torch.no_grad():
                yield
        finally:
            undivide(model)
            for one in put_back:
                one()


def _tensors(model: nn.Module, modules: nn.Module) -> Callable[[], None]:
    """Return what puts back the numbers of buffers, and of tensors that are attributes."""
    own = [b for m in model.modules() for b in m._buffers.values() if b is not None]
    around = [m for one in (model, modules) for m in one.modules()]
    own += [v for m in around for v in m.__dict__.values() if isinstance(v, Tensor)]
    plain = filter(is_plain, [*own, *modules.buffers()])
    tensors = [(t, t.detach().clone()) for t in plain]

    def put_back() -> None:
        with torch.no_grad():
            for tensor, value in tensors:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)

    return put_back


def _parameters(modules: nn.Module) -> Callable[[], None]:
    """Return what puts back the parameters of modules, which are exchanged and never written to."""
    before = [(p, p.data, p.requires_grad) for p in modules.parameters()]

    def put_back() -> None:
        for parameter, value, flag in before:
            parameter.data = value
            parameter.requires_grad_(flag)

    return put_back


def first_float(out: Any) -> Tensor | None:
    """Return the first floating tensor of an output, or None."""
    return next(iter(floats(out)), None)


def floats(out: Any) -> list[Tensor]:
    """Return the floating tensors of an output, in whatever it holds them."""
    return [v for v in tensors_in(out) if v.is_floating_point() and v.dim()]


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors' numbers; infinity for other shapes, or where
    one has no number."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    off = (a.double() - b.double()).abs()
    off = off.masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
    return float(off.nan_to_num(float("inf")).max())


def apart(a: Tensor, b: Tensor, effect: float = 0.0) -> bool:
    """Return whether two results differ by more than rounding explains.

    Args:
        a: one of them.
        b: the other.
        effect: how large the effect is in which they may differ a little.
    """
    share = ROUNDING.get(a.dtype, 3e-2)
    size = float(b.double().nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
    return distance(a, b) > CLOSE * effect + share * size


def moved(before: Tensor, after: Tensor, count: int) -> tuple[int, int] | None:
    """Find the axis of ``count`` examples, of which the first was changed.

    Returns:
        The axis along which only the first rows differ, and how many rows an example has there;
        None where there is no such axis, or where nothing differs.
    """
    if before.shape != after.shape or not before.numel():
        return None
    share = ROUNDING.get(before.dtype, 3e-2)
    size = float(before.double().nan_to_num(0, 0, 0).abs().max())
    off = (before.double() - after.double()).abs().nan_to_num(0, 0, 0) > share * size
    for axis, rows in enumerate(before.shape):
        if rows % count:
            continue
        here = off.movedim(axis, 0).flatten(1).any(1) if off.dim() > 1 else off
        each = rows // count
        if bool(here[:each].any()) and not bool(here[each:].any()):
            return axis, each
    return None


def changed(value: Any, axis: int, count: int, listed: bool = False) -> Any:
    """Return a batch whose first example is its second once more, in every tensor of it.

    Args:
        value: the batch, or a part of it.
        axis: of the examples.
        count: how many they are.
        listed: whether an example is an entry of each list that has ``count``, and no row.
    """

    def part(value: Any) -> Any:
        if listed and isinstance(value, list | tuple) and len(value) == count:
            return with_contents(value, {**dict(enumerate(value)), 0: value[1]})
        if isinstance(value, Tensor) and value.dim() > axis and value.shape[axis]:
            each, odd = divmod(value.shape[axis], count)
            if not odd:
                second = value.narrow(axis, each, each)
                rest = value.narrow(axis, each, value.shape[axis] - each)
                return torch.cat([second, rest], dim=axis)
        return NotImplemented

    return rebuilt(value, part)
