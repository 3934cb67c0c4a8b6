"""The card of a module, or of several that travel together: what they are, and for which host.

It is kept in the header of ``module.safetensors``; ``module.json`` is written from it for people.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import modgraft
from modgraft.computation.base import Computation
from modgraft.core.config import C, Configured, public, resolve
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.store.file import CARD, broken, read_json

FORMAT = 2
CARD_FILE = "module.json"


ABOUT = (
    "task", "metrics", "data", "licence", "description", "command", "base_model", "provenance",
)  # fmt: skip
"""What :meth:`Card.described` takes, from whoever saves."""


class Saved(BaseModel):
    """One module.

    Attributes:
        name: its name.
        type: the class of its computation.
        config: the arguments of that class; a computation among them has a type and config too.
        sites: the labels of its sites.
        beside: the names of the host's weights and buffers that trained with it.
        trained_in: the fingerprint of the host it was trained in, if it was then loaded into
            another one and saved from there.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    type: str
    config: dict[str, Any]
    sites: list[str]
    beside: list[str] = []
    trained_in: dict[str, Any] | None = None

    def method(self, folder: Path) -> Computation:
        """Return the computation, without parameters."""
        return from_json({"type": self.type, "config": self.config}, folder, Computation)


class Card(BaseModel):
    """What is known of the modules in one file.

    Attributes:
        format: the version of this format.
        names: the modules that were asked for; those that they need are beside them.
        modules: each module, after those that it needs.
        composition: what was in force, if all of it is here.
        together: whether they were saved as several, or as all of a host: they then bring that
            composition, where one module joins what is in force.
        beside: the names of the host's weights and buffers that are in the file too; those that no
            module has beside itself belong to the last of ``names``.
        labels: what the host calls its classes, in their order, where a head is in the file and
            somebody has named them.
        host: the fingerprint of the host, without those, and that in half precision.
        tensors: the SHA-256 of the tensors.
        versions: of what they were saved with.
        made: when, in UTC.
        base_model: the host's name on a hub.
        task: what it does, as a hub names it: ``question-answering``.
        metrics: what was measured, by name.
        data: what it was trained and measured on.
        licence: under which it is shared, as an SPDX identifier.
        description: what it is for.
        command: what made it.
        provenance: where else it comes from, such as the modules that it was merged from.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    format: Literal[2] = FORMAT
    names: list[str] = Field(min_length=1)
    modules: list[Saved] = Field(min_length=1)
    composition: str | None = None
    together: bool = False
    beside: list[str] = []
    labels: list[str] = []
    host: dict[str, Any] = {}
    tensors: str = ""
    versions: dict[str, str] = Field(
        default_factory=lambda: {
            "modgraft": modgraft.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    )
    made: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    base_model: str | None = None
    task: str | None = None
    metrics: dict[str, float] = {}
    data: str | None = None
    licence: str | None = None
    description: str | None = None
    command: str | None = None
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _names_its_modules(self) -> Card:
        have = [saved.name for saved in self.modules]
        if len(set(have)) < len(have) or not set(self.names).issubset(have):
            raise ValueError("names that are not those of its modules, or the same name twice")
        return self

    def described(self, about: Mapping[str, Any]) -> Card:
        """Return the card with what somebody says of the modules.

        Raises:
            ModgraftError: for what a card has no place for, or a value of another type.
        """
        unknown = about.keys() - ABOUT
        if unknown:
            raise ModgraftError(
                f"a module's card has no {', '.join(sorted(unknown))}; it has {', '.join(ABOUT)}"
            )
        try:
            json.dumps(dict(about), ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError) as error:  # NaN, half a character, no JSON
            raise ModgraftError(
                f"{dict(about)!r:.200} cannot stand in a card ({error}); leave out what is NaN, or "
                f"no text or number"
            ) from error
        try:
            return type(self).model_validate({**self.model_dump(), **about})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ModgraftError(f"{where}={first['input']!r:.80}: {first['msg']}") from error

    def to_text(self) -> str:
        """Write the card as JSON, with its own hash."""
        said = self._said() | {"sha256": self.sha256}
        return json.dumps(said, ensure_ascii=False, allow_nan=False)

    @property
    def sha256(self) -> str:
        """The hash of the card, with that of the tensors in it: what the modules are known by."""
        return card_digest(self._said())

    def _said(self) -> dict[str, Any]:
        """Return what is not left open, so that a later version's new fields change no hash."""
        always = self.model_dump(include={"format", "versions", "made"})  # defaults of the moment
        return {**always, **self.model_dump(exclude_defaults=True)}

    @classmethod
    def from_text(cls, text: str, path: object) -> Card:
        """Read a card from what :meth:`to_text` wrote.

        Raises:
            CheckpointError: for anything but a whole card of this format.
        """
        try:
            said = read_json(text)
        except ValueError as error:
            raise CheckpointError(
                f"{path} is not a module's card ({error}); save the module again"
            ) from error
        if not isinstance(said, dict):
            raise CheckpointError(f"{path}: the card is no JSON object; save the module again")
        if (made_as := said.get("format", FORMAT)) != FORMAT:
            raise CheckpointError(
                f"{path}: format {made_as!r:.40}, this version reads {FORMAT}; load it with the "
                f"version of modgraft that wrote it"
            )
        said, digest = dict(said), said.get("sha256")
        said.pop("sha256", None)
        if digest != card_digest(said):
            raise CheckpointError(
                f"{path}: the card was changed after it was written (its hash is another one); "
                f"copy the folder again"
            )
        return validated(cls, said, path)

    @classmethod
    def in_header(cls, metadata: Mapping[str, str], path: object) -> Card | None:
        """Read the card in the header of a file; None where it has none.

        Raises:
            CheckpointError: for anything but a whole card of this format, and nothing beside it.
        """
        if CARD not in metadata:
            return None
        card = cls.from_text(metadata[CARD], path)
        if metadata != {"format": "pt", CARD: metadata[CARD]}:
            raise broken(path, "its metadata are more than a card")
        return card


def validated(kind: type[Any], said: Any, path: object) -> Any:
    """Return ``said`` as a card of class ``kind``.

    Raises:
        CheckpointError: with what is wrong, and where.
    """
    try:
        return kind.model_validate(said)
    except (ValidationError, RecursionError) as error:
        errors = error.errors() if isinstance(error, ValidationError) else []
        why = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in errors[:4])
        raise CheckpointError(
            f"{path} is not a module's card ({why or 'nested too deep'}); save the module again"
        ) from error


def card_digest(said: Mapping[str, Any]) -> str:
    """Hash a card without its hash."""
    text = json.dumps(said, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def to_json(method: Configured) -> dict[str, Any]:
    """Describe a computation by its type and its constructor's arguments, nested ones likewise.

    Returns:
        ``{"type": "LoRA", "config": {"rank": 8, …}}``.

    Raises:
        ModgraftError: for a class of one's own that is called as a public one is.
    """
    kind = type(method)
    if public(kind.__name__) not in (None, kind):
        raise ModgraftError(
            f"{kind.__module__}.{kind.__qualname__} is a class of your own with the name of "
            f"modgraft's {kind.__name__}, as which it would be read again; call it otherwise"
        )
    config = {
        key: to_json(value) if isinstance(value, Configured) else value
        for key, value in method.config().items()
    }
    return {"type": kind.__name__, "config": config}


def from_json(said: Any, folder: Path, kind: type[C]) -> C:
    """Make the computation that :func:`to_json` described.

    Args:
        said: the description.
        folder: where it was read, for error messages.
        kind: the base class it must have.

    Raises:
        CheckpointError: for a description that is not a type and its arguments.
        UnknownNameError: for a type that nobody has defined.
        ModgraftError: for arguments that the type refuses.
    """
    match said:
        case {"type": str() as name, "config": dict() as config} if len(said) == 2:
            found = resolve(name, kind)
        case _:
            raise CheckpointError(
                f"{folder}: a computation is described as {{'type': 'LoRA', 'config': {{…}}}}, "
                f"not as {str(said)[:80]}; save the module again"
            )
    takes = [f.name for f in fields(found)]  # type: ignore[arg-type]
    if unknown := config.keys() - set(takes):
        raise CheckpointError(
            f"{folder}: {name} takes no {', '.join(sorted(unknown))} (it takes "
            f"{', '.join(takes) or 'nothing'}); the module was saved by another version, or changed"
        )
    given = {
        key: from_json(value, folder, Configured) if _nested(value) else value
        for key, value in config.items()
    }
    try:
        return found(**given)
    except TypeError as error:
        raise CheckpointError(
            f"{folder}: {name} cannot be made from {sorted(given)}: {error}; save the module again"
        ) from error


def _nested(value: Any) -> bool:
    """Return whether ``value`` describes a computation, and is no dictionary of other things."""
    return isinstance(value, dict) and not value.keys().isdisjoint({"type", "config"})
