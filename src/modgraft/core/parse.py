"""Compositions from text, read with ``ast`` and never evaluated; their means and concatenations."""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence
from difflib import get_close_matches

from modgraft.core.errors import CompositionError
from modgraft.core.expression import (
    Average,
    Composable,
    Concat,
    Expression,
    Name,
    add,
    chain,
    module_of,
    scale,
    shown,
)


def parse(text: str, known: Collection[str]) -> Expression:
    """Read a composition.

    Args:
        text: names with ``>>``, ``+``, ``-``, ``number *``, ``average(a, b)``, ``concat(a, b)`` and
            brackets; a task of a module as ``name['task']``, which may be left out where it has
            only one.
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
        why = str(error) if isinstance(error, SyntaxError | ValueError) else "nested too deep"
        raise CompositionError(
            f"{text[:80]!r} is not a composition ({why}); write 'fr >> qa' or 'qa + 0.3*style'"
        ) from error


def _read(node: ast.expr, text: str, known: Collection[str]) -> Expression:
    match node:
        case ast.Name(id=name):
            return _name(name, None, text, known)
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str() as task)):
            return _name(name, task, text, known)
        case ast.BinOp(left=left, op=ast.RShift(), right=right):
            return chain(_read(left, text, known), _read(right, text, known))  # type: ignore[return-value]
        case ast.BinOp(left=left, op=(ast.Add() | ast.Sub()) as op, right=right):
            first, second = _read(left, text, known), _read(right, text, known)
            return add(first, second if isinstance(op, ast.Add) else scale(-1.0, second))
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            if _number(left) is None:
                left, right = right, left
            weight = _number(left)
            if weight is not None:
                return scale(weight, _read(right, text, known))
        case ast.Call(func=ast.Name(id="average" | "concat" as kind), args=args, keywords=[]) if (
            args
        ):
            parts = [_read(arg, text, known) for arg in args]
            return (average if kind == "average" else concat)(*parts)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return scale(-1.0, _read(operand, text, known))
    raise CompositionError(
        f"{ast.unparse(node)!r} means nothing in the composition {text!r}; "
        f"names go with '>>', '+', '-', 'number *', average(a, b), concat(a, b) and brackets"
    )


def _name(module: str, task: str | None, text: str, known: Collection[str]) -> Name:
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
    near = get_close_matches(module, dict.fromkeys(map(module_of, known)), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"implanted: {_listed(known)}"
    raise CompositionError(f"no module {module!r} in {text!r}; {hint}")


def _listed(known: Collection[str]) -> str:
    """List names for an error: all, or the first of very many."""
    first = list(known)[:12]
    return (", ".join(first) + (f" … ({len(known)})" if len(known) > 12 else "")) or "—"


def _number(node: ast.expr) -> int | float | None:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _number(operand)
            return None if value is None else -value
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
    return None


def average(*parts: Composable) -> Expression:
    """Average the effects of modules or compositions, or prompts of equal length.

    The same as ``average(a, b)`` in a text::

        host.use(mg.average(host["fr"], host["de"]) >> host["qa"])

    Raises:
        CompositionError: for none, or for what is no module or composition.
    """
    operands = _operands("average", parts)
    return operands[0] if len(operands) == 1 else Average(operands)


def concat(*parts: Composable) -> Expression:
    """Concatenate the tokens, or the keys and values, of input modules, in that order.

    The same as ``concat(a, b)`` in a text.

    Raises:
        CompositionError: for none, or for what is no module or composition.
    """
    return Concat(_operands("concat", parts))


def _operands(kind: str, parts: Sequence[object]) -> tuple[Expression, ...]:
    operands = tuple(part.expression() for part in parts if isinstance(part, Composable))
    if not operands or len(operands) < len(parts):
        raise CompositionError(
            f"{kind}({', '.join(map(shown, parts))}): it is of modules or compositions, as "
            f'mg.{kind}(host["a"], host["b"]); a text is read by host.use("{kind}(a, b)")'
        )
    return operands
