"""Read and check the compositions that a caller gives."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from modgraft.core import expression as ex
from modgraft.core.call import Layout
from modgraft.core.context import Context
from modgraft.core.errors import CompositionError, SideError
from modgraft.core.parse import parse
from modgraft.core.per_example import Each, Weighted
from modgraft.core.side import EXAMPLE, Side, missing_side
from modgraft.core.tensors import first_tensor, tensors_in
from modgraft.engine.batch import lists_in
from modgraft.engine.implant import Implants
from modgraft.engine.inputs.expressions import check_inputs

Composition = str | ex.Composable | None
Compositions = Composition | Sequence[Composition]  # one for each example

CACHED = 256  # compositions that a host remembers having read


class Reader:
    """Reads the compositions of one host, and caches them.

    Equal compositions become one object, under which each site caches its plan.

    Args:
        implants: the host's modules.
        context: the host's, which knows their names.
    """

    def __init__(self, implants: Implants, context: Context) -> None:
        self._implants, self._context = implants, context
        self._known: dict[Any, ex.Expression | None] = {}

    def forget(self) -> None:
        """Clear the cache, when modules have been implanted or removed."""
        self._known.clear()

    def read(self, composition: Compositions) -> ex.Expression | None:
        """Read a composition; an equal one gives the same object.

        Raises:
            CompositionError: for an unknown name, another host's handle, or no composition at all.
        """
        rows = composition if isinstance(composition, list | tuple) else None
        key: Any
        try:
            if rows is None:
                key = self._as_expression(composition)
            else:
                key = tuple(map(self._as_expression, rows))
            known = key in self._known
        except TypeError:  # not hashable and so no composition: refused below
            key, known = None, False
        except RecursionError as error:
            raise CompositionError("an expression nested too deep to be read") from error
        if known:
            return self._known[key]
        if isinstance(key, Each):
            rows = key.rows
        read = self._one(composition) if rows is None else self._each(rows)  # type: ignore[arg-type]
        if read is not None and read.is_data:
            return read
        if len(self._known) >= CACHED:
            self._known.pop(next(iter(list(self._known))), None)
        self._known[key] = read
        return read

    def _as_expression(self, composition: Any) -> Any:
        """Turn a handle into its expression; other compositions are returned as they are.

        Raises:
            CompositionError: for a handle of another host, or of a module that was removed.
        """
        if composition is None or not isinstance(composition, ex.Composable):
            return composition
        expression = composition.expression()
        for part in ex.walk(expression):
            if isinstance(part, Each) and part is not expression:
                raise CompositionError(
                    f"{part} has one composition for each example, and is no part of another; "
                    f"write what is to follow in each of them"
                )
            if not isinstance(part, ex.Name) or part.handle is None:
                continue
            module = ex.module_of(part.name)
            if module in self._implants and self._implants[module] is not part.handle:
                raise CompositionError(
                    f"{part.name!r} in {str(expression)!r} is the handle of another host's module, "
                    f"or of one that was removed; this host's own is host[{module!r}]"
                )
        return expression

    def _one(self, composition: Composition) -> ex.Expression | None:
        if composition is None:
            return None
        if isinstance(composition, str):
            return self._checked(parse(composition, self._context.names))
        if isinstance(composition, ex.Composable):
            return self._checked(composition.expression())
        raise CompositionError(
            f"a composition is a text or an expression of handles, as 'fr >> qa', or a list of "
            f"them, one for each example; not {composition!r:.200}"
        )

    def _each(self, rows: Sequence[Composition]) -> Each:
        if not rows:
            raise CompositionError("modules=[]: one composition for each example of the batch")
        read = tuple(self.read(row) for row in rows)
        if nested := [row for row in read if row is not None and row.of_batch]:
            raise CompositionError(
                f"{nested[0]} is for a whole batch; a list has one composition an example"
            )
        return Each(read)

    def check_known(self, composition: ex.Expression | None) -> None:
        """Refuse a composition of modules that are not in this host (any more).

        Raises:
            CompositionError: with the nearest name.
        """
        self._check_names(() if composition is None else composition.names())

    def _check_names(self, names: Sequence[str]) -> None:
        known = self._context.names
        for name in names:
            if name not in known:
                self._implants.computation(name)  # raises with the nearest name

    def _checked(self, read: ex.Expression) -> ex.Expression | None:
        """Return ``read`` if its names are known and its modules go together.

        It is returned without its handles, and without what has the weight 0.
        """
        joins = [
            part for part in ex.walk(read) if isinstance(part, ex.Concat)
        ]  # raises if too deep
        names = read.names()
        self._check_names(names)
        for name, weight in read.weights().items():
            if not isinstance(weight, Tensor) and abs(weight) > ex.LARGEST:
                raise CompositionError(
                    f"{str(read)!r:.80}: the weights of {name!r} add up to {weight:g}, and the "
                    f"largest float32 is {ex.LARGEST:g}"
                )
        before = self._context.inputs  # the modules that put something before the input
        inputs = {n: self._implants.computation(n) for n in names if n in before} if before else {}
        if inputs or joins:
            check_inputs(read, inputs)
        return read.mapped(str)


def named(composition: Compositions, names: Collection[str]) -> list[str]:
    """Return those of ``names`` that a composition may mean, before it is read."""
    if isinstance(composition, list | tuple):
        return list(dict.fromkeys(n for each in composition for n in named(each, names)))
    if isinstance(composition, str):
        words = re.findall(r"\w+", composition)
    elif isinstance(composition, ex.Composable):
        words = [ex.module_of(name) for name in composition.expression().names()]
    else:
        words = []
    return [word for word in dict.fromkeys(words) if word in names]


def check_one(composition: ex.Expression | None) -> None:
    """Refuse to merge a composition that differs between examples.

    Raises:
        CompositionError: for such a composition.
    """
    if composition is not None and composition.of_batch:
        raise CompositionError(
            f"{composition} differs between the examples of a batch, and a merged model has one "
            f"set of weights; merge the composition of one example"
        )


def check_sides(
    composition: ex.Expression | None, given: Mapping[str, Side], sources: Mapping[str, str]
) -> None:
    """Refuse a call without a side input that an active module needs.

    Args:
        composition: what is in force.
        given: the call's side inputs.
        sources: for each module that reads one, its name.

    Raises:
        SideError: with the module's name.
    """
    if composition is None:
        return
    for name in composition.names():
        source = sources.get(name)
        if source in (None, EXAMPLE) or source in given:
            continue
        weight = composition.weights()[name]
        if isinstance(weight, Tensor) or weight != 0.0:
            raise missing_side(name, source)


def check_generated(sides: Mapping[str, Side], args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse to generate for another number of texts than a side input has examples.

    Beams and returned sequences of one text share its side input later, so that no layer sees it.

    Args:
        sides: those of the call.
        args: what ``generate`` is called with.
        kwargs: what it is called with by name.

    Raises:
        SideError: with both numbers.
    """
    named = (kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))
    texts = next((each for each in (*args, *named) if isinstance(each, Tensor)), None)
    every = tensors_in((args, kwargs)) if texts is None else [texts]
    rows = [each.shape[0] for each in every if each.dim()]
    for name, side in sides.items():
        have = side.tensor.shape[0]
        if rows and have not in rows:
            raise SideError(
                f"side input {name!r} has {have} examples for a batch of {rows[0]}; pass one row "
                f"for each example, with an all-False mask row for one without it. The beams and "
                f"returned sequences of an example share its row by themselves"
            )


def examples_of(composition: ex.Expression, sides: Mapping[str, Side]) -> int | None:
    """Return how many examples a call has, as far as its compositions or side inputs say."""
    if isinstance(composition, Each):
        return len(composition.rows)
    for part in ex.walk(composition):
        if isinstance(part, Weighted):
            return len(part.tensor)
    return next((len(side.tensor) for side in sides.values()), None)


def check_batch(
    composition: ex.Expression, args: tuple, kwargs: dict[str, Any], layout: Layout
) -> None:
    """Refuse a call whose batch has another number of examples than its compositions.

    Args:
        composition: what is in force, for batches of one size.
        args: what the host is called with.
        kwargs: what it is called with by name.
        layout: where the examples are known to lie inside the host.

    Raises:
        CompositionError: with both numbers.
    """
    if isinstance(composition, Each):
        have, what = len(composition.rows), "modules=[…] gives {} compositions"
    else:
        weights = next(part for part in ex.walk(composition) if isinstance(part, Weighted))
        have, what = len(weights.tensor), "mg.Weighted gives {} rows of weights"
    tensors = tensors_in((args, kwargs))
    batch = first_tensor(args, kwargs)
    known = {0, 1} if batch is None else {0, 1}.intersection(layout.values())
    batch = next(iter(tensors), None) if batch is None else batch
    if batch is not None and batch.dim() and batch.shape[0] != have:
        if any(v.dim() > axis and v.shape[axis] == have for axis in known for v in tensors):
            return
        if any(len(one) == have and tensors_in(one) for one in lists_in(args, kwargs)):
            return
        raise CompositionError(
            f"{what.format(have)} for a batch of {batch.shape[0]} examples (the first axis of the "
            f"first tensor); pass one for each"
        )
