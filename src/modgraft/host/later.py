"""What a forward leaves to be run when it has returned, which is run in its call all the same."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial, wraps
from types import FunctionType, GeneratorType, MethodType
from typing import Any

from modgraft.core.errors import ModgraftError
from modgraft.core.tensors import rebuilt

Within = Callable[[], AbstractContextManager[Callable[[Any], Any]]]
"""Begins the call once more; in it, a function completes what was computed there."""

_LATER = (Iterator, AsyncIterator, Awaitable)


def run_within(out: Any, within: Within, in_force: bool) -> Any:
    """Return what a forward has returned, to be run in its call where it runs layers later.

    Args:
        out: a generator, whose steps are, a function, or what holds such; anything else is
            returned as it is.
        within: begins the call once more.
        in_force: whether what runs later would run as in the call.

    Raises:
        ModgraftError: for what runs later and has another protocol, unless it is in force.
    """
    found = False

    def part(value: Any) -> Any:
        nonlocal found
        if isinstance(value, GeneratorType | map | filter | zip):
            found = True
            return _steps(value, within, in_force)
        if isinstance(value, FunctionType | MethodType | partial):
            found = True
            return _function(value, within, in_force)
        if isinstance(value, _LATER) and not in_force:
            raise ModgraftError(
                f"the host's forward returns a {type(value).__name__}, which runs when the call "
                f"with its modules= or side= has ended; put the modules in force before it, "
                f"host.use(…), or let the forward return a generator"
            )
        return NotImplemented

    made = rebuilt(out, part)
    return made if found else out


def _steps(out: Any, within: Within, in_force: bool) -> Iterator[Any]:
    """Take the steps of a generator, each within the call; what is sent to it goes to it."""
    send = getattr(out, "send", lambda _: next(out))
    sent = None
    while True:
        with within() as completed:
            try:
                value = completed(send(sent))
            except StopIteration as end:
                return end.value
        sent = yield run_within(value, within, in_force)


def _function(out: Callable[..., Any], within: Within, in_force: bool) -> Callable[..., Any]:
    named = out.func if isinstance(out, partial) else out

    @wraps(named)
    def run(*args: Any, **kwargs: Any) -> Any:
        with within() as completed:
            value = completed(out(*args, **kwargs))
        return run_within(value, within, in_force)

    return run
