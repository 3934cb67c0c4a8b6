"""Expressions: parsed, printed, and evaluated."""

from __future__ import annotations

import ast
import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modgraft.core.errors import CompositionError
from modgraft.core.expression import (
    Chain,
    Composable,
    Expression,
    Name,
    Sum,
    chain,
    check_name,
    module_of,
    walk,
    without,
)
from modgraft.core.parse import average, concat, parse

TASK = "h['q\\'a b\"']"  # any string is a task's name; this is how it is printed
NAMES = ["fr", "qa", "toxic", "a1", "h['fr']", TASK, "one['only']"]
names = st.sampled_from(NAMES)
weights = st.sampled_from([0.5, 2.0, 0.3, 1.0, 0.25])


def texts(depth: int = 3) -> st.SearchStrategy[str]:
    inner = names if depth == 0 else st.deferred(lambda: texts(depth - 1))
    return st.one_of(
        names,
        st.tuples(inner, st.sampled_from([" + ", " - ", " >> "]), inner).map(
            lambda t: f"({t[0]}){t[1]}({t[2]})"
        ),
        st.tuples(weights, inner).map(lambda t: f"{t[0]}*({t[1]})"),
        inner.map(lambda t: f"-({t})"),
        st.tuples(
            st.sampled_from(["average", "concat"]), st.lists(inner, min_size=1, max_size=3)
        ).map(lambda t: f"{t[0]}({', '.join(t[1])})"),
    )


def effect(expression: Expression, y: float) -> float:
    """Evaluate with functions of a number as modules: fr doubles, qa adds 3, …"""
    functions = {"fr": lambda v: 2 * v, "qa": lambda v: v + 3, "toxic": lambda v: v * v, "a1": abs}
    functions |= {"h['fr']": lambda v: v - 1, TASK: lambda v: 3 - v, "one['only']": lambda v: -v}
    return expression.apply(lambda name, v, total, w: total + w * (functions[name](v) - v), y)


@given(texts())
def test_printed_then_parsed_is_equal(text: str) -> None:
    read = parse(text, NAMES)
    again = parse(str(read), NAMES)
    assert again == read
    assert hash(again) == hash(read)
    assert str(again) == str(read)
    assert again.weights() == pytest.approx(read.weights())
    assert effect(again, 1.5) == pytest.approx(effect(read, 1.5))


@given(texts(), st.sets(st.sampled_from(NAMES)))
def test_without_some_modules_it_still_is_one_that_can_be_read(text: str, gone: set[str]) -> None:
    left = parse(text, NAMES).mapped(lambda name: None if name in gone else name)
    if left is None:
        assert set(parse(text, NAMES).names()) <= gone
        return
    assert left == parse(str(left), NAMES)
    assert not set(left.names()) & gone


class Handle(Composable):
    """Stand for a module of any host."""

    def __init__(self, name: str) -> None:
        self.name = name

    def expression(self) -> Expression:
        return Name(self.name, handle=self)


def by_operators(node: ast.expr) -> Any:
    """Build the expression of a text with the operators of handles."""
    match node:
        case ast.Name() | ast.Subscript():
            return Handle(parse(ast.unparse(node), NAMES).names()[0])
        case ast.BinOp(left=ast.Constant(value=weight), right=right):
            return weight * by_operators(right)
        case ast.BinOp(left=left, op=op, right=right):
            sign = {ast.Add: operator.add, ast.Sub: operator.sub, ast.RShift: operator.rshift}
            return sign[type(op)](by_operators(left), by_operators(right))
        case ast.UnaryOp(operand=operand):
            return -by_operators(operand)
        case ast.Call(func=ast.Name(id=kind), args=args):
            return {"average": average, "concat": concat}[kind](*map(by_operators, args))
    raise AssertionError(ast.dump(node))


@given(texts())
def test_the_operators_of_handles_write_what_the_text_says(text: str) -> None:
    written = by_operators(ast.parse(text, mode="eval").body).expression()
    read = parse(text, NAMES)
    assert written == read
    assert str(written) == str(read)
    assert all(part.handle is not None for part in walk(written) if isinstance(part, Name))


@given(texts(2), texts(2))
def test_algebra(one: str, other: str) -> None:
    a, b = parse(one, NAMES), parse(other, NAMES)
    total = parse(f"({one}) + ({other})", NAMES)
    difference = parse(f"({one}) - ({other})", NAMES)
    y = 1.5
    assert effect(total, y) - y == pytest.approx((effect(a, y) - y) + (effect(b, y) - y))
    assert effect(difference, y) - y == pytest.approx((effect(a, y) - y) - (effect(b, y) - y))
    stacked = parse(f"({one}) >> ({other})", NAMES)
    assert effect(stacked, y) == pytest.approx(effect(b, effect(a, y)))


def test_meaning() -> None:
    read = parse("qa + 0.3*(fr - toxic)", NAMES)
    assert read.weights() == {"qa": 1.0, "fr": 0.3, "toxic": -0.3}
    assert str(read) == "qa + 0.3*fr - 0.3*toxic"
    assert parse("fr >> qa >> a1", NAMES) == Chain((Name("fr"), Name("qa"), Name("a1")))
    assert str(parse("-fr", NAMES)) == "-fr"
    assert str(parse("(fr + qa) >> a1", NAMES)) == "(fr + qa) >> a1"
    assert effect(parse("fr >> qa", NAMES), 2.0) == 7.0
    assert effect(parse("fr + qa", NAMES), 2.0) == 2.0 + 2.0 + 3.0
    assert without(read, "fr") == Sum(((1.0, Name("qa")), (-0.3, Name("toxic"))))
    assert without(parse("fr >> qa", NAMES), "fr") == Name("qa")
    assert without(Name("fr"), "fr") is None
    assert chain(None, None) is None


def test_a_task_of_a_module() -> None:
    read = parse("""0.5*h["fr"] - (h['fr'] >> fr)""", NAMES)
    assert str(read) == "0.5*h['fr'] - (h['fr'] >> fr)"
    assert read.weights() == {"h['fr']": -0.5, "fr": -1.0}
    assert parse("one >> fr", NAMES) == Chain((Name("one['only']"), Name("fr")))
    assert module_of("h['fr']") == module_of("h") == "h"
    assert str(without(read, "h")) == "-fr"
    assert without(parse("h['fr'] >> one", NAMES), "fr") == parse("h['fr'] >> one", NAMES)


@given(st.text(min_size=1, max_size=20))
def test_any_text_names_a_task(task: str) -> None:
    name = f"h[{task!r}]"
    read = parse(f"2*{name} >> fr", ["fr", name])
    assert read.names() == (name, "fr")
    assert parse(str(read), ["fr", name]) == read


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("frr", "did you mean 'fr'"),
        ("zzz", "implanted: fr, qa"),
        ("h", r"has 2 tasks and 'h' does not say which; write h\['fr'\]"),
        ("h['fx']", r"knows no task 'fx'; in .* did you mean h\['fr'\]"),
        ("one['two']", r"did you mean one\['only'\]"),
        ("fr['de']", r"'fr' has no tasks; .* write fr, not fr\['de'\]"),
        ("hh['fr']", "did you mean 'h'"),
        ("h[fr]", "means nothing"),
        ("h[0]", "means nothing"),
        ("h['fr':'de']", "means nothing"),
        ("h[b'fr']", "means nothing"),
        ("h['fr']['de']", "means nothing"),
        ("h[f'{fr}']", "means nothing"),
        ("fr @ qa", "means nothing"),
        ("fr * qa", "means nothing"),
        ("fr + 1", "means nothing"),
        ("fr.x", "means nothing"),
        ("fr(qa)", "means nothing"),
        ("__import__('os').system('x')", "means nothing"),
        ("fr if qa else a1", "means nothing"),
        ("True * fr", "means nothing"),
        ("fr >>", "not a composition"),
        ("", "not a composition"),
        ("fr; qa", "not a composition"),
        ("(" * 4000 + "fr" + ")" * 4000, "not a composition"),
        ("fr + " * 3000 + "fr", "at most 10,000"),
        ("fr\0", "not a composition"),
    ],
)
def test_nonsense_is_refused_with_a_reason(text: str, says: str) -> None:
    with pytest.raises(CompositionError, match=says):
        parse(text, NAMES)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read = parse(text, NAMES)
    except CompositionError:
        return
    assert set(read.names()) <= set(NAMES)


def test_names() -> None:
    assert check_name("qa_2") == "qa_2"
    for bad in ("", "a b", "2a", "for", "host", "average", "a.b"):
        with pytest.raises(CompositionError, match="cannot name a module"):
            check_name(bad)


def test_a_name_that_no_composition_could_be_read_with() -> None:
    assert check_name("x" * 1000)
    with pytest.raises(CompositionError, match=r"x… cannot name a module: it has 1,001 char"):
        check_name("x" * 1001)
