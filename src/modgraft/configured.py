"""Modules whose constructor's signature is their configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Self, dataclass_transform

from torch import nn


@dataclass_transform(eq_default=False, field_specifiers=(field,))
class Configured(nn.Module):
    """An ``nn.Module`` that declares its hyper-parameters as annotated fields.

    What is saved is derived from them: ``type(self)(**self.config())`` is a fresh equal.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make a dataclass of the subclass."""
        super().__init_subclass__(**kwargs)
        dataclass(eq=False, repr=False)(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An ``nn.Module`` before any field is assigned, which a dataclass does not see to."""
        self = super().__new__(cls)
        nn.Module.__init__(self)
        return self

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def extra_repr(self) -> str:  # noqa: D102
        return ", ".join(f"{k}={v!r}" for k, v in self.config().items())
