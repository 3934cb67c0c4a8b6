"""Means and concatenations of handles and expressions; what an expression is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modgraft.core.errors import CompositionError
from modgraft.core.expression import Added, Average, Chain, Composable, Concat, Expression, shown

DEEPEST = 50  # how deep an expression may be nested: each level is a few calls at every site


def average(*parts: Composable) -> Expression:
    """The mean of the effects of some modules or compositions, or of prompts of equal length.

    The same as ``average(a, b)`` in a text::

        host.use(mg.average(host["fr"], host["de"]) >> host["qa"])

    Raises:
        CompositionError: for none, or for what is no module or composition.
    """
    some = _operands("average", parts)
    return some[0] if len(some) == 1 else Average(some)


def concat(*parts: Composable) -> Expression:
    """The tokens, or keys and values, of some input modules together, in that order.

    The same as ``concat(a, b)`` in a text.

    Raises:
        CompositionError: for none, or for what is no module or composition.
    """
    return Concat(_operands("concat", parts))


def _operands(kind: str, parts: Sequence[object]) -> tuple[Expression, ...]:
    some = tuple(part.expression() for part in parts if isinstance(part, Composable))
    if not some or len(some) < len(parts):
        raise CompositionError(
            f"{kind}({', '.join(map(shown, parts))}): it is of modules or compositions, as "
            f'mg.{kind}(host["a"], host["b"]); a text is read by host.use("{kind}(a, b)")'
        )
    return some


def inside(expression: Expression) -> tuple[Expression, ...]:
    """The expressions that it is made of; none for a name."""
    match expression:
        case Added():
            return tuple(term for _, term in expression.weighed())
        case Chain(parts):
            return parts
    return ()


def walk(expression: Expression, depth: int = 0) -> Iterator[Expression]:
    """It and every expression in it, as often as it stands there.

    Raises:
        CompositionError: for an expression nested deeper than a site can run it.
    """
    if depth > DEEPEST:
        raise CompositionError(
            f"an expression nested more than {DEEPEST} deep; write it flat: a + b + c, not "
            f"(a + b) + c"
        )
    yield expression
    for part in inside(expression):
        yield from walk(part, depth + 1)
