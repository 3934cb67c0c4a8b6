"""A computation as JSON: its type and the constructor's arguments, computations among them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from modgraft.core.config import C, Configured, resolve
from modgraft.core.errors import CheckpointError


def described(method: Configured) -> dict[str, Any]:
    """``{"type": …, "config": …}``, where a computation in the config is described likewise."""
    config = {
        key: described(value) if isinstance(value, Configured) else value
        for key, value in method.config().items()
    }
    return {"type": type(method).__name__, "config": config}


def understood(card: Any, folder: Path, kind: type[C]) -> C:
    """The computation that :func:`described` gave for ``card``, read from ``folder``.

    Raises:
        CheckpointError: for anything else than a type and its own arguments.
        UnknownNameError: for a type that nobody has defined.
        ModgraftError: for arguments that the type refuses.
    """
    match card:
        case {"type": str() as name, "config": dict() as config} if len(card) == 2:
            found = resolve(name, kind)
        case _:
            raise CheckpointError(
                f"{folder}: a computation is described as {{'type': 'LoRA', 'config': {{…}}}}, "
                f"not as {str(card)[:80]}; save the module again"
            )
    own = [f.name for f in fields(found)]  # type: ignore[arg-type]
    if unknown := config.keys() - set(own):
        raise CheckpointError(
            f"{folder}: {name} takes no {', '.join(sorted(unknown))} (it takes "
            f"{', '.join(own) or 'nothing'}); the module was saved by another version, or changed"
        )
    given = {
        key: understood(value, folder, Configured) if _nested(value) else value
        for key, value in config.items()
    }
    try:
        return found(**given)
    except TypeError as error:
        raise CheckpointError(
            f"{folder}: {name} cannot be made from {sorted(given)}: {error}; save the module again"
        ) from error


def _nested(value: Any) -> bool:
    """Whether it describes a module; a dictionary of lists, as Fixed's sets, is what it is."""
    return isinstance(value, dict) and not all(isinstance(v, list) for v in value.values())
