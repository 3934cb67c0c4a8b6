"""Public names that are imported when they are first used, from the homes that a stub lists."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import lazy_loader


def attach_stub(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package, by its ``__init__.pyi``.

    Args:
        package: its name.
        file: its ``__init__.py``.
    """
    find, _, public = lazy_loader.attach_stub(package, file)

    def get(name: str) -> Any:
        try:
            return find(name)
        except AttributeError as error:
            if name not in public:
                raise
            # of a module that failed: Python would take it for a name that the package has not
            raise ImportError(f"{package}.{name} cannot be imported: {error}") from error

    def names() -> list[str]:
        own = vars(sys.modules[package])
        return sorted({*public, *(name for name in own if name.startswith("__"))})

    return get, names, public
