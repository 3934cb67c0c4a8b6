"""Compositions: expressions over module names, and what they mean.

``"fr >> qa"`` stacks, ``"qa + 0.3*(general - toxic)"`` adds effects measured against the bare host,
``"average(a, b)"`` is their mean, ``"concat(a, b)"`` puts the tokens of both before the input, and
``"h['fr']"`` is the task ``fr`` of the module ``h``.
:mod:`modgraft.core.parse` reads them from text; the handles of modules have the same operators,
``host["fr"] >> host["qa"]``.
"""

from __future__ import annotations

import keyword
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

from torch import Tensor

from modgraft.core.errors import CompositionError

T = TypeVar("T")
Weight = float | Tensor  # a tensor [B]: one for each example

#: name, y, total, w → total + w·(the module's result on y − y)
Run = Callable[[str, T, T, Weight], T]

RESERVED = ("host", "average", "concat")

LONGEST_NAME = 1000
"""Characters: a composition of 10,000 is read."""

LARGEST = 3.4028234663852886e38
"""The largest float32: a weight beyond it would be infinite where it is used."""


class Composable(ABC):
    """An operand in a composition: ``a >> b``, ``a + b``, ``a - b``, ``0.5 * a``, ``-a``."""

    @abstractmethod
    def expression(self) -> Expression:
        """Return it as an expression."""

    def __rshift__(self, other: object) -> Expression:
        second = _operand(self, ">>", other)
        return chain(self.expression(), second)  # type: ignore[return-value]

    def __add__(self, other: object) -> Expression:
        return add(self.expression(), _operand(self, "+", other))

    def __sub__(self, other: object) -> Expression:
        return add(self.expression(), scale(-1.0, _operand(self, "-", other)))

    def __neg__(self) -> Expression:
        return scale(-1.0, self.expression())

    def __mul__(self, weight: object) -> Expression:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise CompositionError(
                f"{self.expression()} * {shown(weight)}: an effect is scaled by a number; weights "
                f"that differ between examples are mg.Weighted(names, tensor)"
            )
        return scale(weight, self.expression())

    __rmul__ = __mul__

    def __truediv__(self, weight: object) -> Expression:
        raise CompositionError(
            f"{self.expression()} / {shown(weight)}: write number * {self.expression()}"
        )

    def __radd__(self, other: object) -> Expression:
        return _operand(self, "+", other)  # only called for an operand that is refused

    def __rsub__(self, other: object) -> Expression:
        return _operand(self, "-", other)

    def __rrshift__(self, other: object) -> Expression:
        return _operand(self, ">>", other)


def _operand(first: Composable, sign: str, other: object) -> Expression:
    if isinstance(other, Composable):
        return other.expression()
    raise CompositionError(
        f"{first.expression()} {sign} {shown(other)}: modules and compositions go together, as "
        f'host["fr"] {sign} host["qa"]; a text is read by host.use("fr {sign} qa")'
    )


def shown(other: object) -> str:
    """Write a wrong operand for an error message."""
    shown = str(other.expression()) if isinstance(other, Composable) else repr(other)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


class Expression(Composable):
    """A composition of named modules; immutable, and printed in one canonical form."""

    def expression(self) -> Expression:  # noqa: D102
        return self

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Return the names of its modules, in order, each once."""

    @abstractmethod
    def weights(self) -> dict[str, Weight]:
        """Return the coefficient of each module, which says all where effects add (parameter
        modules)."""

    @abstractmethod
    def apply(self, run: Run[T], y: T) -> T:
        """Apply the modules to an output ``y``, each by ``run``.

        The effect of an expression on ``y`` is its result minus ``y``; a sum adds effects on the
        same ``y``, a chain feeds each result to the next.
        """

    def into(self, run: Run[T], y: T, total: T, weight: Weight) -> T:
        """Add its weighted effect on ``y`` to ``total``."""
        result = self.apply(run, y)
        if result is y:  # nothing in it acts here
            return total
        return total + weighted(weight, result - y)  # type: ignore[operator]

    @abstractmethod
    def mapped(self, to: Callable[[str], str | None]) -> Expression | None:
        """Rename its modules by ``to``; one that becomes None is taken out."""

    def is_line(self, order: Mapping[str, int]) -> bool:
        """Return whether its weights determine it, given the ``order`` in which modules were
        implanted."""
        return False

    def of_example(self, i: int) -> Expression:
        """Return what it is for the example ``i`` of the batch alone."""
        return self

    @property
    def is_data(self) -> bool:
        """Whether it holds weights for one batch, so that nothing may be cached for it."""
        return False

    @property
    def of_batch(self) -> bool:
        """Whether it holds for batches of one size only."""
        return self.is_data


@dataclass(frozen=True)
class Name(Expression):
    """One module, ``"qa"``, or one task of a module that has several, ``"h['fr']"``.

    Attributes:
        name: as it is printed.
        handle: the module it was made from, None where it was read from text.
    """

    name: str
    handle: object = field(default=None, compare=False, repr=False)

    def names(self) -> tuple[str, ...]:  # noqa: D102
        return (self.name,)

    def weights(self) -> dict[str, Weight]:  # noqa: D102
        return {self.name: 1.0}

    def apply(self, run: Run[T], y: T) -> T:  # noqa: D102
        return run(self.name, y, y, 1.0)

    def into(self, run: Run[T], y: T, total: T, weight: Weight) -> T:  # noqa: D102
        return run(self.name, y, total, weight)

    def mapped(self, to: Callable[[str], str | None]) -> Expression | None:  # noqa: D102
        name = to(self.name)
        return None if name is None else Name(name)

    def is_line(self, order: Mapping[str, int]) -> bool:  # noqa: D102
        return True

    def __str__(self) -> str:
        return self.name


class WeightedSum(Expression):
    """y + Σ wᵢ (fᵢ(y) − y): effects of the terms on the same output, weighted and added."""

    @abstractmethod
    def weighted_terms(self) -> Sequence[tuple[Weight, Expression]]:
        """Return the weights wᵢ with their terms."""

    def names(self) -> tuple[str, ...]:  # noqa: D102
        return unique(n for _, term in self.weighted_terms() for n in term.names())

    @cached_property
    def _weights(self) -> dict[str, Weight]:
        return _added(
            (w * v, n) for w, term in self.weighted_terms() for n, v in term.weights().items()
        )

    def weights(self) -> dict[str, Weight]:  # noqa: D102
        return self._weights

    def apply(self, run: Run[T], y: T) -> T:  # noqa: D102
        total = y
        for weight, term in self.weighted_terms():
            total = term.into(run, y, total, weight)
        return total

    @cached_property
    def is_data(self) -> bool:  # type: ignore[override]  # noqa: D102
        return any(isinstance(w, Tensor) or term.is_data for w, term in self.weighted_terms())


@dataclass(frozen=True)
class Sum(WeightedSum):
    """y + Σ wᵢ (fᵢ(y) − y), the weights numbers; a term with the weight 0 is left out."""

    terms: tuple[tuple[float, Expression], ...]

    def weighted_terms(self) -> tuple[tuple[float, Expression], ...]:  # noqa: D102
        return self.terms

    def mapped(self, to: Callable[[str], str | None]) -> Expression | None:  # noqa: D102
        return _sum_of((w, t.mapped(to)) for w, t in self.terms if w != 0)

    def of_example(self, i: int) -> Expression:  # noqa: D102
        return Sum(tuple((weight, term.of_example(i)) for weight, term in self.terms))

    def is_line(self, order: Mapping[str, int]) -> bool:  # noqa: D102
        return len(self.terms) == 1 and isinstance(self.terms[0][1], Name)

    def __str__(self) -> str:
        out = ""
        for weight, term in self.terms:
            sign = (" - " if weight < 0 else " + ") if out else ("-" if weight < 0 else "")
            bare = isinstance(term, Name | Average | Concat)
            text = str(term) if bare else f"({term})"
            out += sign + (text if abs(weight) == 1 else f"{_written(abs(weight))}*{text}")
        return out


@dataclass(frozen=True)
class Average(WeightedSum):
    """y + (1/n) Σ (fᵢ(y) − y): the mean of effects, of deltas, or of prompts of equal length."""

    parts: tuple[Expression, ...]

    def weighted_terms(self) -> tuple[tuple[float, Expression], ...]:  # noqa: D102
        return tuple((1 / len(self.parts), part) for part in self.parts)

    def mapped(self, to: Callable[[str], str | None]) -> Expression | None:  # noqa: D102
        parts = tuple(e for part in self.parts if (e := part.mapped(to)) is not None)
        if len(parts) == len(self.parts):
            return Average(parts)
        # still divided by n: a module that is not at this site has no effect here
        return _sum_of((1 / len(self.parts), part) for part in parts)

    def of_example(self, i: int) -> Expression:  # noqa: D102
        return Average(tuple(part.of_example(i) for part in self.parts))

    def __str__(self) -> str:
        return f"average({', '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class Chain(Expression):
    """f_b(f_a(y)): each part acts on what the one before it left."""

    parts: tuple[Expression, ...]

    def names(self) -> tuple[str, ...]:  # noqa: D102
        return unique(n for part in self.parts for n in part.names())

    @cached_property
    def _weights(self) -> dict[str, Weight]:
        return _added((v, n) for part in self.parts for n, v in part.weights().items())

    def weights(self) -> dict[str, Weight]:  # noqa: D102
        return self._weights

    def apply(self, run: Run[T], y: T) -> T:  # noqa: D102
        for part in self.parts:
            y = part.apply(run, y)
        return y

    def mapped(self, to: Callable[[str], str | None]) -> Expression | None:  # noqa: D102
        return chain(*(part.mapped(to) for part in self.parts))

    def of_example(self, i: int) -> Expression:  # noqa: D102
        return type(self)(tuple(part.of_example(i) for part in self.parts))

    def is_line(self, order: Mapping[str, int]) -> bool:  # noqa: D102
        names = [n for part in self.parts for n in part.names()]
        at = [order.get(n, -1) for n in names]
        rising = all(a < b for a, b in pairwise(at))
        return rising and all(part.is_line(order) for part in self.parts)

    def __str__(self) -> str:
        return " >> ".join(f"({p})" if isinstance(p, Sum) else str(p) for p in self.parts)

    @cached_property
    def is_data(self) -> bool:  # type: ignore[override]  # noqa: D102
        return any(part.is_data for part in self.parts)


@dataclass(frozen=True)
class Concat(Chain):
    """f([φ_a, φ_b, x]): the tokens, or keys and values, of all parts before the input."""

    def mapped(self, to: Callable[[str], str | None]) -> Expression | None:  # noqa: D102
        parts = tuple(e for part in self.parts if (e := part.mapped(to)) is not None)
        return Concat(parts) if parts else None

    def __str__(self) -> str:
        return f"concat({', '.join(map(str, self.parts))})"


def weighted(weight: Weight, effect: Any) -> Any:
    """w · e; a tensor w ``[B]`` or ``[B, n]`` goes along the first axes of e ``[B, …]``."""
    if not isinstance(weight, Tensor):
        return effect if weight == 1.0 else weight * effect
    if isinstance(effect, Tensor):
        weight = weight.to(effect)
        missing = effect.dim() - weight.dim()
        weight = weight[(..., *[None] * missing)] if weight.dim() else weight
    return weight * effect


def plain(terms: tuple[tuple[float, Expression], ...]) -> Expression:
    """Return the sum of the terms; a single term with weight 1 needs no sum."""
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1.0 else Sum(terms)


def _terms(expression: Expression) -> tuple[tuple[float, Expression], ...]:
    return expression.terms if isinstance(expression, Sum) else ((1.0, expression),)


def _sum_of(terms: Iterable[tuple[float, Expression | None]]) -> Expression | None:
    """Add the terms that are not None into one flat sum; None if none is left."""
    flat = tuple((w * v, t) for w, e in terms if e is not None for v, t in _terms(e))
    return plain(flat) if flat else None


def scale(weight: float, expression: Expression) -> Expression:
    """Return ``weight * expression``.

    Raises:
        CompositionError: for a weight that is, or becomes, no finite float32.
    """
    try:
        terms = tuple((float(weight) * w, term) for w, term in _terms(expression))
    except OverflowError:
        terms = ()
    if not terms or not all(abs(w) <= LARGEST for w, _ in terms):  # nor is NaN
        raise CompositionError(
            f"{shown(weight)} * {shown(expression)}: a weight is a finite number, at most "
            f"{LARGEST:g}, the largest float32"
        )
    return plain(terms)


def add(first: Expression, second: Expression) -> Expression:
    """Return ``first + second``."""
    return plain((*_terms(first), *_terms(second)))


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names in order, each once."""
    return tuple(dict.fromkeys(names))


def _added(pairs: Iterable[tuple[Weight, str]]) -> dict[str, Weight]:
    total: dict[str, Weight] = {}
    for weight, name in pairs:
        total[name] = total[name] + weight if name in total else weight
    return total


def _written(weight: float) -> str:
    short = f"{weight:g}"
    return short if float(short) == weight else repr(weight)


def check_name(name: str) -> str:
    """Return ``name`` if it can stand in an expression.

    Raises:
        CompositionError: if it is no identifier, a Python keyword, or a reserved word, if Python
            reads another name there, or if it is too long to be read.
    """
    known = isinstance(name, str) and name.isidentifier()
    if not known or keyword.iskeyword(name) or name in RESERVED:
        raise CompositionError(
            f"{name!r} cannot name a module: a name is a Python identifier other than "
            f"{', '.join(RESERVED)} and the keywords, since it stands in expressions as 'fr >> qa'"
        )
    if len(name) > LONGEST_NAME:
        raise CompositionError(
            f"{name[:40]}… cannot name a module: it has {len(name):,} characters, and compositions "
            f"are read of names of at most {LONGEST_NAME:,}"
        )
    if (read := unicodedata.normalize("NFKC", name)) != name:
        raise CompositionError(
            f"{name!r} cannot name a module: in an expression Python reads {read!r} for it; take "
            f"{read!r}"
        )
    return name


def chain(*parts: Expression | None) -> Expression | None:
    """Return ``a >> b >> …`` without the parts that are None; None if none is left."""
    flat: list[Expression] = []
    for part in parts:
        flat += part.parts if type(part) is Chain else [] if part is None else [part]
    return None if not flat else flat[0] if len(flat) == 1 else Chain(tuple(flat))


def without(expression: Expression | None, name: str) -> Expression | None:
    """Take the module ``name`` out of ``expression``."""
    if expression is None:
        return None
    return expression.mapped(lambda each: None if module_of(each) == name else each)


def module_of(name: str) -> str:
    """Return the module that ``name`` in a composition belongs to: ``"h"`` for ``"h['fr']"``."""
    return name.partition("[")[0]


DEEPEST = 50  # levels that an expression may be nested: each is a few calls at every site


def walk(expression: Expression, depth: int = 0) -> Iterator[Expression]:
    """Yield an expression and all its parts, as often as they occur.

    Raises:
        CompositionError: for an expression nested deeper than a site can run it.
    """
    if depth > DEEPEST:
        raise CompositionError(
            f"an expression nested more than {DEEPEST} deep; write it flat: a + b + c, not "
            f"(a + b) + c"
        )
    yield expression
    parts: Sequence[Expression] = ()
    if isinstance(expression, WeightedSum):
        parts = [term for _, term in expression.weighted_terms()]
    elif isinstance(expression, Chain):
        parts = expression.parts
    for part in parts:
        yield from walk(part, depth + 1)
