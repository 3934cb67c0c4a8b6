"""What a caller says a composition is, read and checked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from modgraft import expression as ex
from modgraft.computation.base import Computation, InputComposition
from modgraft.context import Context
from modgraft.errors import CompositionError
from modgraft.examples import Each, Weighted
from modgraft.inlet import check_inputs
from modgraft.reading import parse
from modgraft.tensors import first_tensor

Composition = str | ex.Composable | None
Compositions = Composition | Sequence[Composition]  # one for each example

KEPT = 256  # how many compositions a host remembers how it read


class Reader:
    """Reads the compositions of one host, and remembers what it has read.

    The same composition is the same object, so that a site finds again what it has planned for it.

    Args:
        context: the host's.
        acts: the computation that a name speaks of.
    """

    def __init__(self, context: Context, acts: Callable[[str], Computation]) -> None:
        self._names = context.weights
        self._acts = acts
        self._known: dict[Any, ex.Expression | None] = {}

    def forget(self) -> None:
        """Forget what has been read: modules have come or gone."""
        self._known.clear()

    def read(self, composition: Compositions) -> ex.Expression | None:
        """The expression that is meant, the same object for the same composition."""
        if composition is None or isinstance(composition, Weighted):
            return None if composition is None else self._checked(composition)
        several = isinstance(composition, list | tuple)
        key = tuple(composition) if several else composition
        if not isinstance(composition, list | tuple | str | ex.Composable):
            raise CompositionError(
                f"a composition is a text or an expression of handles, as 'fr >> qa', or a list of "
                f"them, one for each example; not {composition!r}"
            )
        if key in self._known:
            return self._known[key]
        if several:
            if not composition:
                raise CompositionError("modules=[]: one composition for each example of the batch")
            rows = tuple(self.read(one) for one in composition)
            if nested := [row for row in rows if isinstance(row, Each | Weighted)]:
                raise CompositionError(
                    f"{nested[0]} is for a whole batch; a list has one composition an example"
                )
            read: ex.Expression = Each(rows)
        elif isinstance(composition, Each):
            read = Each(tuple(self.read(row) for row in composition.rows))
        elif isinstance(composition, str):
            read = self._checked(parse(composition, self._names))
        else:
            assert isinstance(composition, ex.Composable)  # noqa: S101
            read = self._checked(parse(str(composition.expression()), self._names))
        if len(self._known) >= KEPT:
            del self._known[next(iter(self._known))]
        self._known[key] = read
        return read

    def _checked(self, read: ex.Expression) -> ex.Expression:
        """``read`` itself, if it means something here."""
        names = read.names()
        for name in names:
            if name not in self._names:
                parse(name, self._names)  # raises with the nearest name
        inputs = {n for n in names if isinstance(self._acts(n), InputComposition)}
        if inputs or "concat" in str(read):
            check_inputs(read, inputs)
        return read


def check_batch(composition: ex.Expression | None, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse compositions, one for each example, for a call with another number of examples.

    Raises:
        CompositionError: with both numbers.
    """
    match composition:
        case Each(rows):
            have, what = len(rows), "modules=[…] gives {} compositions"
        case Weighted(tensor=tensor):
            have, what = tensor.shape[0], "mg.Weighted gives {} rows of weights"
        case _:
            return
    batch = first_tensor(args, kwargs)
    if batch is not None and batch.dim() and batch.shape[0] != have:
        raise CompositionError(
            f"{what.format(have)} for a batch of {batch.shape[0]} examples; pass one for each"
        )
