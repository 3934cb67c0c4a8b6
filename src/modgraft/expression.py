"""Compositions: expressions over module names, read with ``ast`` and never evaluated.

``"fr >> qa"`` stacks, ``"qa + 0.3*(general - toxic)"`` adds effects measured against the bare host,
``"h['fr']"`` is the module ``h`` as it was generated for the task ``fr``.
"""

from __future__ import annotations

import ast
import keyword
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import TypeVar

from modgraft.errors import CompositionError

T = TypeVar("T")

RESERVED = ("host", "average", "concat")


class Expression(ABC):
    """A composition of named modules; immutable, and printed in one canonical form."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The modules it speaks of, in order, each once."""

    @abstractmethod
    def weights(self) -> dict[str, float]:
        """The coefficient of each module where effects add up (parameter modules: exactly so)."""

    @abstractmethod
    def apply(self, run: Callable[[str, T], T], y: T) -> T:
        """Fold function modules over an output: ``run(name, y)`` is one module's result.

        The effect of an expression on ``y`` is its result minus ``y``; a sum adds effects on the
        same ``y``, a chain feeds each result to the next.
        """

    def is_line(self, order: Sequence[str]) -> bool:
        """Whether weights in the order of implanting say all there is to know of it."""
        return False


@dataclass(frozen=True)
class Name(Expression):
    """One module, ``"qa"``, or one task of a module that has several, ``"h['fr']"``."""

    name: str

    def names(self) -> tuple[str, ...]:  # noqa: D102
        return (self.name,)

    def weights(self) -> dict[str, float]:  # noqa: D102
        return {self.name: 1.0}

    def apply(self, run: Callable[[str, T], T], y: T) -> T:  # noqa: D102
        return run(self.name, y)

    def is_line(self, order: Sequence[str]) -> bool:  # noqa: D102
        return True

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Sum(Expression):
    """y + Σ wᵢ (fᵢ(y) − y): effects of the terms on the same output, weighted and added."""

    terms: tuple[tuple[float, Expression], ...]

    def names(self) -> tuple[str, ...]:  # noqa: D102
        return _unique(n for _, term in self.terms for n in term.names())

    @cached_property
    def _weights(self) -> dict[str, float]:
        return _added((w * v, n) for w, term in self.terms for n, v in term.weights().items())

    def weights(self) -> dict[str, float]:  # noqa: D102
        return self._weights

    def apply(self, run: Callable[[str, T], T], y: T) -> T:  # noqa: D102
        total = y
        for weight, term in self.terms:
            result = term.apply(run, y)
            if result is not y:  # a module that does not act here leaves y as it is
                total = total + weight * (result - y)  # type: ignore[operator]
        return total

    def is_line(self, order: Sequence[str]) -> bool:  # noqa: D102
        return len(self.terms) == 1 and isinstance(self.terms[0][1], Name)

    def __str__(self) -> str:
        out = ""
        for weight, term in self.terms:
            sign = (" - " if weight < 0 else " + ") if out else ("-" if weight < 0 else "")
            text = str(term) if isinstance(term, Name) else f"({term})"
            out += sign + (text if abs(weight) == 1 else f"{_written(abs(weight))}*{text}")
        return out


@dataclass(frozen=True)
class Chain(Expression):
    """f_b(f_a(y)): each part acts on what the one before it left."""

    parts: tuple[Expression, ...]

    def names(self) -> tuple[str, ...]:  # noqa: D102
        return _unique(n for part in self.parts for n in part.names())

    @cached_property
    def _weights(self) -> dict[str, float]:
        return _added((v, n) for part in self.parts for n, v in part.weights().items())

    def weights(self) -> dict[str, float]:  # noqa: D102
        return self._weights

    def apply(self, run: Callable[[str, T], T], y: T) -> T:  # noqa: D102
        for part in self.parts:
            y = part.apply(run, y)
        return y

    def is_line(self, order: Sequence[str]) -> bool:  # noqa: D102
        names = [n for part in self.parts for n in part.names()]
        in_order = [n for n in order if n in names]
        return names == in_order and all(part.is_line(order) for part in self.parts)

    def __str__(self) -> str:
        return " >> ".join(f"({p})" if isinstance(p, Sum) else str(p) for p in self.parts)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _added(pairs: Iterable[tuple[float, str]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for weight, name in pairs:
        total[name] = total[name] + weight if name in total else weight
    return total


def check_name(name: str) -> str:
    """``name`` itself, if it can stand in an expression.

    Raises:
        CompositionError: if it is no identifier, a Python keyword, or a reserved word.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED:
        raise CompositionError(
            f"{name!r} cannot name a module: a name is a Python identifier other than "
            f"{', '.join(RESERVED)} and the keywords, since it stands in expressions as 'fr >> qa'"
        )
    return name


def chain(*parts: Expression | None) -> Expression | None:
    """``a >> b >> …`` of those that are there; None if none is."""
    flat: list[Expression] = []
    for part in parts:
        flat += part.parts if isinstance(part, Chain) else [] if part is None else [part]
    return None if not flat else flat[0] if len(flat) == 1 else Chain(tuple(flat))


def without(expression: Expression | None, name: str) -> Expression | None:
    """``expression`` with every mention of the module ``name`` taken out."""
    match expression:
        case Chain(parts):
            return chain(*(without(part, name) for part in parts))
        case Sum(terms):
            kept = tuple((w, e) for w, t in terms if (e := without(t, name)) is not None)
            return _sum(kept) if kept else None
        case Name(own) if module_of(own) == name:
            return None
    return expression


def in_chain(expression: Expression, name: str) -> bool:
    """Whether ``name`` stands in ``expression`` with nothing but ``>>`` around it."""
    match expression:
        case Name():
            return True
        case Chain(parts):
            return all(in_chain(p, name) for p in parts if name in p.names())
    return False


def module_of(name: str) -> str:
    """The module that ``name`` in a composition speaks of: ``"h"`` for ``"h['fr']"``."""
    return name.partition("[")[0]


def parse(text: str, known: Sequence[str]) -> Expression:
    """Read a composition.

    Args:
        text: names with ``>>``, ``+``, ``-``, ``number *`` and brackets; a task of a module as
            ``name['task']``, which a module of one task need not say.
        known: the names that may stand in it.

    Raises:
        CompositionError: for anything else, and for an unknown name (the nearest is suggested).
    """
    if len(text) > 10_000:
        raise CompositionError(
            f"a composition of {len(text):,} characters; at most 10,000 are read"
        )
    try:
        return _read(ast.parse(text.strip(), mode="eval").body, text, known)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, CompositionError):
            raise
        raise CompositionError(
            f"{text[:80]!r} is not a composition ({error}); write 'fr >> qa' or 'qa + 0.3*style'"
        ) from error


def _read(node: ast.expr, text: str, known: Sequence[str]) -> Expression:
    match node:
        case ast.Name(id=name):
            return _name(name, None, text, known)
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str() as task)):
            return _name(name, task, text, known)
        case ast.BinOp(left=left, op=ast.RShift(), right=right):
            return chain(_read(left, text, known), _read(right, text, known))  # type: ignore[return-value]
        case ast.BinOp(left=left, op=(ast.Add() | ast.Sub()) as op, right=right):
            sign = 1.0 if isinstance(op, ast.Add) else -1.0
            first, second = _read(left, text, known), _read(right, text, known)
            return _sum((*_terms(first), *_scaled(sign, second)))
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            if _number(left) is None:
                left, right = right, left
            weight = _number(left)
            if weight is not None:
                return _sum(_scaled(weight, _read(right, text, known)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _sum(_scaled(-1.0, _read(operand, text, known)))
    raise CompositionError(
        f"{ast.unparse(node)!r} means nothing in the composition {text!r}; "
        f"names go with '>>', '+', '-', 'number *' and brackets"
    )


def _name(module: str, task: str | None, text: str, known: Sequence[str]) -> Name:
    name = module if task is None else f"{module}[{task!r}]"
    if name in known:
        return Name(name)
    tasks = [n for n in known if n != module and module_of(n) == module]
    if task is None and len(tasks) == 1:
        return Name(tasks[0])
    if tasks and task is None:
        raise CompositionError(
            f"{module!r} has {len(tasks)} tasks and {text!r} does not say which; write {tasks[0]}, "
            f"or another of {', '.join(tasks)}"
        )
    if tasks:
        near = get_close_matches(name, tasks, n=1, cutoff=0.0)[0]
        raise CompositionError(
            f"{module!r} knows no task {task!r}; in {text!r} did you mean {near}? "
            f"There are {', '.join(tasks)}"
        )
    if module in known:
        raise CompositionError(f"{module!r} has no tasks; in {text!r} write {module}, not {name}")
    near = get_close_matches(module, _unique(map(module_of, known)), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"implanted: {', '.join(known) or '—'}"
    raise CompositionError(f"no module {module!r} in {text!r}; {hint}")


def _terms(expression: Expression) -> tuple[tuple[float, Expression], ...]:
    return expression.terms if isinstance(expression, Sum) else ((1.0, expression),)


def _scaled(weight: float, expression: Expression) -> tuple[tuple[float, Expression], ...]:
    return tuple((weight * w, term) for w, term in _terms(expression))


def _sum(terms: tuple[tuple[float, Expression], ...]) -> Expression:
    """The terms added; one term as it is, is itself."""
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1.0 else Sum(terms)


def _written(weight: float) -> str:
    short = f"{weight:g}"
    return short if float(short) == weight else repr(weight)


def _number(node: ast.expr) -> float | None:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _number(operand)
            return None if value is None else -value
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return float(value)
    return None
