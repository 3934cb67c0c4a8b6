"""Random generators: those of the process, and those that data sets and samplers have of their own.

A run seeds all of them from positions, such as (seed, "batch", epoch, batch), so that what is drawn
there is a function of the position alone, and no state has to be saved.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

FEW = 1000
"""Items of a list or dictionary that is looked through; a longer one holds data."""


@dataclass(frozen=True)
class _Kind:
    """How the generators of a class are read, set, seeded and drawn from."""

    of: type
    read: Callable[[Any], Any]
    set: Callable[[Any, Any], object]
    seed: Callable[[Any, int], object]
    draw: Callable[[Any], float]


_KINDS = (
    _Kind(
        torch.Generator,
        lambda g: g.get_state(),
        lambda g, state: g.set_state(state),
        lambda g, seed: g.manual_seed(seed),
        lambda g: torch.rand((), generator=g, device=g.device).item(),
    ),
    _Kind(
        random.Random,
        lambda g: g.getstate(),
        lambda g, state: g.setstate(state),
        lambda g, seed: g.seed(seed),
        lambda g: g.random(),
    ),
    _Kind(
        np.random.Generator,
        lambda g: g.bit_generator.state,
        lambda g, state: setattr(g.bit_generator, "state", state),
        lambda g, seed: setattr(g.bit_generator, "state", type(g.bit_generator)(seed).state),
        lambda g: g.random(),
    ),
    _Kind(
        np.random.RandomState,
        lambda g: g.get_state(legacy=False),
        lambda g, state: g.set_state(state),
        lambda g, seed: g.set_state(
            getattr(np.random, g.get_state(legacy=False)["bit_generator"])(seed).state
        ),
        lambda g: g.random_sample(),
    ),
)
_NO_STATE = (random.SystemRandom,)
_LEAVES = (str, bytes, int, float, complex, Tensor, np.ndarray, type, ModuleType, logging.Logger)


# a set has another order in another process; the __iter__ of a class of one's own reads data
_ITEMS: tuple[tuple[Any, Any], ...] = (
    (list, list.__iter__),
    (tuple, tuple.__iter__),
    (dict, dict.values),
)


def _kind(value: object) -> _Kind | None:
    known = (kind for kind in _KINDS if isinstance(value, kind.of))
    return None if isinstance(value, _NO_STATE) else next(known, None)


def generators_in(*owners: object) -> list[Any]:
    """Return the random generators that objects hold, each once.

    Those of torch, python and numpy are found in attributes, in lists and dictionaries of at most
    ``FEW`` items, and in what functions are closed over, at any depth.
    """
    found: list[Any] = []
    seen: dict[int, object] = {}  # keeps what it names alive, so that no number is used twice
    queue = deque(owners)
    while queue:
        value = queue.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen[id(value)] = value
        if _kind(value) is not None:
            found.append(value)
        else:
            queue.extend(_inside(value))
    return found


def _inside(value: object) -> Iterator[object]:
    """Yield what an object is made of."""
    for kind, items in _ITEMS:
        if isinstance(value, kind) and kind.__len__(value) <= FEW:
            yield from items(value)
    if isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a name that is not bound yet
                continue
        yield from value.__defaults__ or ()
    for slots in (getattr(kind, "__slots__", ()) for kind in type(value).__mro__):
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(value, name, None)
    yield from list(getattr(value, "__dict__", {}).values())


def fold(*numbers: int | str) -> int:
    """Return a 63-bit seed that depends on all of `numbers` and nothing else, equal on every
    machine."""
    return int.from_bytes(sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


def seed_everything(*position: int | str, own: Iterable[Any] = ()) -> None:
    """Seed torch (every device), numpy, python and the generators of `own` from a position, such as
    (seed, "step", 12)."""
    seed = fold(*position)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    for i, generator in enumerate(own):
        kind = _kind(generator)
        assert kind is not None  # noqa: S101
        kind.seed(generator, fold(*position, i))


#: held by whoever seeds the generators of the process, so that two threads do not share a seed
_SEEDED = threading.RLock()


@contextmanager
def own_randomness(own: Sequence[Any] = ()) -> Iterator[None]:
    """Leave the caller's torch, numpy and python generators, and those of `own`, as they were.

    No other thread is in such a block at the same time: all of them draw from one generator.
    """
    with _SEEDED:
        before = states(own)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        try:
            yield
        finally:
            set_states(before, own)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)


def states(own: Sequence[Any] = ()) -> list[Any]:
    """Return the states of the process's generators on the CPU, and of those of `own`."""
    every = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    return [*every, *(kind.read(g) for g in own if (kind := _kind(g)))]


def set_states(states: Sequence[Any], own: Sequence[Any] = ()) -> None:
    """Set what :func:`states` has returned."""
    for generator, state in zip(own, states[3:], strict=True):
        if kind := _kind(generator):
            kind.set(generator, state)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def next_numbers(own: Sequence[Any] = ()) -> list[float]:
    """Draw a number from each generator: equal ones show that nothing was drawn in between."""
    every = [torch.rand(()).item(), random.random(), float(np.random.random_sample())]
    return every + [kind.draw(g) for g in own if (kind := _kind(g))]
