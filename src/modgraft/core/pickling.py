"""Pickles and copies objects of a class that was made on the fly: what made it makes it again."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

from modgraft.core.errors import ModgraftError


def reduced_by(make: Callable[..., type], original: type, *arguments: Any) -> Callable[..., Any]:
    """Return the ``__reduce_ex__`` of the class that ``make(original, *arguments)`` has made.

    Args:
        make: a function of a module, which pickle finds by its name.
        original: the class that was subclassed, with the same name.
        *arguments: further ones of ``make``.
    """

    def reduce_ex(self: Any, protocol: int) -> tuple[Any, ...]:
        how, given, *rest = original.__reduce_ex__(self, max(2, protocol))  # type: ignore[misc]
        if how is _made_again:  # of a class that was made on the fly itself
            given = (None, *given[2])
        elif how is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise ModgraftError(
                f"a {original.__name__} with modules in it cannot be pickled or copied: its class "
                f"has a way of its own to do that; host.save writes the modules, and "
                f"host.model.state_dict() has the weights"
            )
        return _made_again, (make, (original, *arguments), given[1:]), *rest

    return reduce_ex


def _made_again(make: Callable[..., type], arguments: tuple[Any, ...], given: tuple) -> Any:
    made = make(*arguments)
    return made.__new__(made, *given)
