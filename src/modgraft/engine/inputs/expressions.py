"""What an expression means for input modules: what may be written, and what goes in, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from modgraft.computation.base import Computation, TokenComposition
from modgraft.core.errors import CompositionError
from modgraft.core.expression import Average, Chain, Concat, Expression, Name
from modgraft.core.per_example import Each

T = TypeVar("T")


def check_inputs(expression: Expression, inputs: Mapping[str, Computation]) -> None:
    """Refuse what vectors before an input cannot do: be added, scaled, or joined with effects.

    Args:
        expression: a composition.
        inputs: the input modules in it, by name.

    Raises:
        CompositionError: with what can be written instead.
    """
    match expression:
        case Each(rows):
            for row in rows:
                if row is not None:
                    check_inputs(row, inputs)
        case Name():
            return
        case Chain(parts) | Average(parts):
            if type(expression) is Concat:
                _check_concat(expression, inputs)
            if type(expression) is Average:
                _check_average(expression, inputs)
            for part in parts:
                check_inputs(part, inputs)
        case _:
            if names := [n for n in expression.names() if n in inputs]:
                raise CompositionError(
                    f"{names[0]!r} puts vectors before the input, which cannot be added or scaled "
                    f"in {str(expression)!r}; they follow one another as in 'a >> b' or "
                    f"'concat(a, b)', and 'average(a, b)' is their mean"
                )


def _check_concat(expression: Concat, inputs: Mapping[str, Computation]) -> None:
    others = [n for n in expression.names() if n not in inputs]
    if others:
        raise CompositionError(
            f"{expression}: concat puts tokens together before the input, and "
            f"{others[0]!r} has none; write {' >> '.join(map(str, expression.parts))}"
        )


def _check_average(expression: Average, inputs: Mapping[str, Computation]) -> None:
    names = [n for n in expression.names() if n in inputs]
    if not names:
        return
    kind = isinstance(inputs[names[0]], TokenComposition)
    others = [n for n in expression.names() if n not in inputs]
    others += [n for n in names if isinstance(inputs[n], TokenComposition) != kind]
    if others:
        raise CompositionError(
            f"{expression}: {names[0]!r} puts vectors before the input, where "
            f"{others[0]!r} puts none, so there is no mean of both; average one kind, and "
            f"stack them by >>"
        )
    for part in expression.parts:
        if not isinstance(part, Name | Average):
            raise CompositionError(
                f"{expression}: the mean is of single prompts or prefixes, which "
                f"{str(part)!r} is not; write {part} >> average(…)"
            )


def fold(
    expression: Expression, one: Callable[[str], list[T]], mean: Callable[[list[T]], T]
) -> list[T]:
    """Return what the input modules of ``expression`` put before an input, in order.

    Args:
        expression: one that :func:`check_inputs` lets pass.
        one: a name → what its module puts there; an empty list for any other module.
        mean: several → their mean.
    """
    if isinstance(expression, Name):
        return one(expression.name)
    found: list[T] = []
    if isinstance(expression, Average):
        for part in expression.parts:
            if made := fold(part, one, mean):
                found.append(_single(made, expression))
        return [mean(found)] if found else []
    if isinstance(expression, Chain):
        for part in expression.parts:
            found += fold(part, one, mean)
        return found
    for name in expression.names():  # a switch of compiled code, or effects alone
        found += one(name)
    return found


def _single(made: list[T], expression: Expression) -> T:
    if len(made) != 1:
        raise CompositionError(
            f"{expression}: the mean is of single prompts or prefixes, and one of its parts is "
            f"{len(made)} of them"
        )
    return made[0]
