"""Compositions that differ between the examples of a batch: by weights, or as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modgraft.errors import CompositionError
from modgraft.expression import Added, Expression, Name, Run, T, Weight, unique


@dataclass(frozen=True, eq=False)
class Weighted(Added):
    """y_b + Σ_j w_bj (f_j(y_b) − y_b): for each example b a weight of each module j.

    Another tensor of weights is no other composition to a compiled host: ``weights`` are data.

    Args:
        modules: N names.
        tensor: ``[B, N]`` floating point; gradients reach it.

    Raises:
        CompositionError: for weights of another shape or type, or NaN or infinity among them.
    """

    modules: tuple[str, ...]
    tensor: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(self.modules))
        w, n = self.tensor, len(self.modules)
        if not isinstance(w, Tensor) or w.dim() != 2 or w.shape[1] != n or n == 0:
            have = list(w.shape) if isinstance(w, Tensor) else type(w).__name__
            raise CompositionError(
                f"weights of {n} modules ({', '.join(self.modules)}) are a tensor [batch, {n}], "
                f"not {have}"
            )
        if not w.is_floating_point():
            raise CompositionError(f"weights are floating point, not {w.dtype}; weights.float()")
        if not torch.compiler.is_compiling() and not bool(w.detach().isfinite().all()):
            row, column = (int(i) for i in (~w.detach().isfinite()).nonzero()[0])
            raise CompositionError(
                f"weights[{row}, {column}] = {float(w[row, column])}, for {self.modules[column]!r}"
            )

    def weighed(self) -> tuple[tuple[Tensor, Expression], ...]:  # noqa: D102
        columns = self.tensor.unbind(1)
        return tuple((w, Name(n)) for w, n in zip(columns, self.modules, strict=True))

    def mapped(self, to: Callable[[str], str | None]) -> Expression | None:  # noqa: D102
        named = [(to(name), j) for j, name in enumerate(self.modules)]
        kept = [(name, j) for name, j in named if name is not None]
        if not kept:
            return None
        modules, columns = zip(*kept, strict=True)
        return Weighted(modules, self.tensor[:, list(columns)])

    def __str__(self) -> str:
        return f"weighted({', '.join(self.modules)})"


@dataclass(frozen=True)
class Each(Expression):
    """One composition for each example of a batch, None the bare host."""

    rows: tuple[Expression | None, ...]

    def names(self) -> tuple[str, ...]:  # noqa: D102
        return self._names

    @cached_property
    def _names(self) -> tuple[str, ...]:
        different = dict.fromkeys(self.rows)
        return unique(n for row in different if row is not None for n in row.names())

    @cached_property
    def different(self) -> dict[Expression | None, list[int]]:
        """The compositions, and the examples of each."""
        found: dict[Expression | None, list[int]] = {}
        for i, row in enumerate(self.rows):
            found.setdefault(row, []).append(i)
        return found

    def weights(self) -> dict[str, Weight]:  # noqa: D102
        return dict.fromkeys(self._names, 1.0)

    def apply(self, run: Run[T], y: T) -> T:  # noqa: D102
        raise NotImplementedError("the examples of each composition are run by themselves")

    def mapped(self, to: Callable[[str], str | None]) -> Expression | None:  # noqa: D102
        return Each(tuple(None if row is None else row.mapped(to) for row in self.rows))

    def __str__(self) -> str:
        return f"[{', '.join('None' if row is None else repr(str(row)) for row in self.rows)}]"
