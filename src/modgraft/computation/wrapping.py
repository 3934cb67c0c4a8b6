"""What methods over other methods have in common."""

from __future__ import annotations

from modgraft.computation.base import Computation
from modgraft.core.errors import ModgraftError


class Wrapping(Computation):
    """A method over any other: it says where the tensors of ``module`` come from."""

    module: Computation

    def __post_init__(self) -> None:
        if not isinstance(self.module, Computation):
            raise ModgraftError(
                f"{type(self).__name__}({self.module!r}): it takes a computation by its "
                f"hyper-parameters, as {type(self).__name__}(mg.LoRA(rank=8), …)"
            )

    @property
    def identity(self) -> bool:  # type: ignore[override]
        """Whether the wrapped method leaves the host's output exactly equal at birth."""
        return self.module.identity

    @property
    def side_source(self) -> str | None:  # noqa: D102
        return self.module.side_source

    @property
    def inner(self) -> Computation:  # noqa: D102
        return self.module.inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
