# ruff: noqa: D102
"""What training and storing need of a host, whose class stands in a later room."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from modgraft.computation.base import Computation
from modgraft.core.expression import Expression
from modgraft.core.sites import At
from modgraft.engine.implant import Implant
from modgraft.training.history import History


class HostLike(Protocol):
    """A :class:`modgraft.Host`; each method is described there."""

    training: bool

    @property
    def model(self) -> nn.Module: ...
    @property
    def composition(self) -> Expression | None: ...

    def __contains__(self, name: str) -> bool: ...
    def __getitem__(self, name: str) -> Implant: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def implant(
        self,
        name: str,
        module: Computation,
        at: At | None = None,
        *,
        expect: int | None = None,
        active: bool = True,
    ) -> Implant: ...
    def remove(self, name: str) -> None: ...
    def read(self, composition: Any) -> Expression | None: ...
    def using(self, composition: Any) -> AbstractContextManager[Any]: ...

    def fit(
        self, loader: Any, *, train: str | Sequence[str] | None = None, **settings: Any
    ) -> History: ...
    def training_only(self, train: str | Sequence[str] | None) -> AbstractContextManager[None]: ...

    def modules(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
