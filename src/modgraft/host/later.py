"""What a forward leaves to be run when it has returned, which is run in its call all the same."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial, wraps
from types import FunctionType, GeneratorType, MethodType
from typing import Any

from modgraft.core.errors import ModgraftError

Within = Callable[[], AbstractContextManager[Any]]

_LATER = (Iterator, AsyncIterator, Awaitable)


def run_within(out: Any, within: Within, is_in_force: Callable[[], bool]) -> Any:
    """Return what a forward has returned, to be run in its call where it runs layers later.

    Args:
        out: a generator, whose steps are, or a function; anything else is returned as it is.
        within: begins the call once more.
        is_in_force: whether what runs later would run as in the call.

    Raises:
        ModgraftError: for what runs later and has another protocol, unless it is in force.
    """
    if isinstance(out, GeneratorType | map | filter | zip):
        return _steps(out, within)
    if isinstance(out, FunctionType | MethodType | partial):
        return _function(out, within)
    if isinstance(out, _LATER) and not is_in_force():
        raise ModgraftError(
            f"the host's forward returns a {type(out).__name__}, which runs when the call with its "
            f"modules= or side= has ended; put the modules in force before it, host.use(…), or let "
            f"the forward return a generator"
        )
    return out


def _steps(out: Any, within: Within) -> Iterator[Any]:
    """Take the steps of a generator, each within the call; what is sent to it goes to it."""
    send = getattr(out, "send", lambda _: next(out))
    sent = None
    while True:
        with within():
            try:
                value = send(sent)
            except StopIteration as end:
                return end.value
        sent = yield value


def _function(out: Callable[..., Any], within: Within) -> Callable[..., Any]:
    named = out.func if isinstance(out, partial) else out

    @wraps(named)
    def run(*args: Any, **kwargs: Any) -> Any:
        with within():
            return out(*args, **kwargs)

    return run
