"""Compositions that differ between the examples of a batch: in their weights, or altogether."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modgraft.core.errors import CompositionError
from modgraft.core.expression import Expression, Name, Run, T, Weight, WeightedSum, chain, unique


@dataclass(frozen=True, eq=False)
class Weighted(WeightedSum):
    """y_b + Σ_j w_bj (f_j(y_b) − y_b): for each example b a weight of each module j.

    The weights are data: a compiled host runs another tensor of them without compiling anew. It is
    an operand as any other, ``host["fr"] >> mg.Weighted(…)``.

    Args:
        modules: N names.
        tensor: ``[B, N]`` floating point; gradients reach it.
        columns: each module's column of the tensor; None: in order.

    Raises:
        CompositionError: for weights of another shape or type, or NaN or infinity among them.

    Example:
        >>> import modgraft as mg, torch
        >>> host = mg.Host(torch.nn.Linear(4, 2))
        >>> for name in ("math", "code"):
        ...     handle = host.implant(name, mg.LoRA(rank=1), at="", active=False)
        >>> weights = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 0.0]], requires_grad=True)
        >>> out = host(torch.randn(3, 4), modules=mg.Weighted(["math", "code"], weights))
        >>> out.square().sum().backward()
        >>> weights.grad.shape
        torch.Size([3, 2])
    """

    modules: tuple[str, ...]
    tensor: Tensor
    columns: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        names = () if isinstance(self.modules, str) else tuple(self.modules)
        if not names or not all(isinstance(name, str) for name in names):
            raise CompositionError(
                f"the modules of mg.Weighted are a list of names, as ['fr', 'qa'], not "
                f"{self.modules!r:.80}"
            )
        object.__setattr__(self, "modules", names)
        if self.columns is None:  # else a part of an expression that was checked
            _check(names, self.tensor)
            object.__setattr__(self, "columns", tuple(range(len(names))))

    def weighted_terms(self) -> tuple[tuple[Tensor, Expression], ...]:  # noqa: D102
        assert self.columns is not None  # noqa: S101
        named = zip(self.modules, self.columns, strict=True)
        return tuple((self.tensor[..., j], Name(name)) for name, j in named)

    def mapped(self, to: Callable[[str], str | None]) -> Expression | None:  # noqa: D102
        assert self.columns is not None  # noqa: S101
        named = [(to(name), j) for name, j in zip(self.modules, self.columns, strict=True)]
        kept = [(name, j) for name, j in named if name is not None]
        if not kept:
            return None
        modules, columns = zip(*kept, strict=True)
        return Weighted(modules, self.tensor, columns)  # the tensor whole: it may be trained

    def of_example(self, i: int) -> Expression:  # noqa: D102
        return Weighted(self.modules, self.tensor[i], self.columns)  # one weight of each module

    def __str__(self) -> str:
        return f"weighted({', '.join(self.modules)})"


def _check(names: tuple[str, ...], w: Tensor) -> None:
    """Refuse a ``w`` that is no finite weight of each name for each example."""
    n = len(names)
    if not isinstance(w, Tensor) or w.dim() != 2 or w.shape[1] != n:
        have = list(w.shape) if isinstance(w, Tensor) else type(w).__name__
        raise CompositionError(
            f"weights of {n} modules ({', '.join(names)}) are a tensor [batch, {n}], not {have}"
        )
    if not w.is_floating_point():
        raise CompositionError(f"weights are floating point, not {w.dtype}; weights.float()")
    if not torch.compiler.is_dynamo_compiling() and not bool(w.detach().isfinite().all()):
        row, column = (int(i) for i in (~w.detach().isfinite()).nonzero()[0])
        raise CompositionError(
            f"weights[{row}, {column}] = {float(w[row, column])}, for {names[column]!r}; a weight "
            f"is a finite number"
        )


@dataclass(frozen=True)
class Each(Expression):
    """One composition for each example of a batch, None the bare host.

    Attributes:
        rows: the compositions.
        different: the different ones, each with the indices of its examples.
    """

    rows: tuple[Expression | None, ...]
    different: dict[Expression | None, list[int]] = field(init=False, compare=False, repr=False)
    _names: tuple[str, ...] = field(init=False, compare=False, repr=False)

    @property
    def of_batch(self) -> bool:  # noqa: D102
        return True

    def __post_init__(self) -> None:
        different: dict[Expression | None, list[int]] = {}
        for i, row in enumerate(self.rows):
            different.setdefault(row, []).append(i)
        names = unique(n for row in different if row is not None for n in row.names())
        # at once: torch.compile does not follow a property that is computed when it is asked for
        object.__setattr__(self, "different", different)
        object.__setattr__(self, "_names", names)

    def names(self) -> tuple[str, ...]:  # noqa: D102
        return self._names

    def weights(self) -> dict[str, Weight]:  # noqa: D102
        return dict.fromkeys(self._names, 1.0)

    def apply(self, run: Run[T], y: T) -> T:  # noqa: D102
        raise NotImplementedError("the examples of each composition are run by themselves")

    def mapped(self, to: Callable[[str], str | None]) -> Expression | None:  # noqa: D102
        return Each(tuple(None if row is None else row.mapped(to) for row in self.rows))

    def of_example(self, i: int) -> Expression:  # noqa: D102
        raise NotImplementedError("a list has a composition for each example, which may be None")

    def __str__(self) -> str:
        return f"[{', '.join('None' if row is None else repr(str(row)) for row in self.rows)}]"


def joined(now: Expression | None, name: str) -> Expression | None:
    """Append the module ``name`` to a composition, or to that of each example."""
    if isinstance(now, Each):
        return Each(tuple(chain(row, Name(name)) for row in now.rows))
    return chain(now, Name(name))
