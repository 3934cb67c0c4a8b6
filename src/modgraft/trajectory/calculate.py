"""Arithmetic as notes write it, worked out over a whitelist of syntax: never `eval`.

`18432 / 48`, `2^10`, `1,000 × 3`, `15% * 200`, `sqrt(2)`. Numbers are Python's: whole ones exact,
others double precision. What would take long or grow without bound is refused beforehand.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from modgraft.errors import ModgraftError

Number = int | float

_LONGEST = 500  # characters of an expression
_BITS = 4096  # of a whole number on the way

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "abs": abs, "ceil": math.ceil, "exp": math.exp, "floor": math.floor, "log": math.log,
    "log10": math.log10, "log2": math.log2, "max": max, "min": min, "round": round,
    "sqrt": math.sqrt,
}  # fmt: skip
_NAMES = {"pi": math.pi, "e": math.e}
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "\0"})
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")
_FOREIGN = re.compile(r"[^\w\s+\-*/%().,]|\d[A-DF-Za-df-z_]|[^\W\d][.]")
_PERCENT = re.compile(r"(?<=\d)\s*%(?!\s*[\w(.])")
_VALUE = re.compile(
    r"\s*(?:[≈~=]|about|approximately)?\s*[$€£]?\s*(?P<number>[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?"
    r"(?:\.(?P<decimals>\d+))?(?:[eE](?P<power>[-+]?\d{1,3}))?)\s*(?P<percent>%)?(?P<rest>.*)",
    re.DOTALL,
)


class CalculationError(ModgraftError):
    """An expression that is no arithmetic, has no value, or is too large to work out."""


def calculate(expression: str) -> Number:
    """The value of an expression of numbers, + - * / // % ^, brackets and a few functions.

    Raises:
        CalculationError: for anything else, a division by zero, or a value out of bounds.
    """
    shown = expression if len(expression) <= 60 else expression[:59] + "…"
    if len(expression) > _LONGEST:
        raise CalculationError(f"{shown!r} has more than {_LONGEST} characters; split it")
    text = expression.translate(_SIGNS).replace("\0", "**")
    text = _PERCENT.sub("/100", text)
    if not re.search(r"[A-Za-z]\s*\(", text):  # in max(1,200) the comma is no thousand's
        text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
    if _FOREIGN.search(text):
        raise CalculationError(f"{shown!r} is no arithmetic; write numbers, + - * / ^ and brackets")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, CalculationError):
            raise CalculationError(f"{shown!r}: {error}") from error
        said = "has no value" if isinstance(error, ValueError) else "is no arithmetic"
        raise CalculationError(
            f"{shown!r} {said}; write numbers, + - * / ^ and brackets"
        ) from error
    except ZeroDivisionError as error:
        raise CalculationError(f"{shown!r} divides by zero") from error
    except (OverflowError, TypeError) as error:
        raise CalculationError(f"{shown!r} cannot be worked out: {error}") from error
    return value


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            return _UNARY[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            one, other = _value(left), _value(right)
            if isinstance(sign, ast.Pow):
                _check_power(one, other)
            return _bounded(_BINARY[type(sign)](one, other))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS:
            return _bounded(_CALLS[name](*(_value(arg) for arg in args)))
    raise CalculationError(f"{ast.unparse(node)} is no arithmetic")


def _check_power(base: Number, power: Number) -> None:
    if not (isinstance(base, int) and isinstance(power, int)) or abs(base) <= 1:
        return  # a float overflows by itself
    if power * base.bit_length() > _BITS:
        raise CalculationError(f"a power of more than {_BITS} bits")


def _bounded(value: object) -> Number:
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise CalculationError(f"a number of more than {_BITS} bits")
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CalculationError("the value is no finite real number")
    return value


def split(arguments: str, result: str | None) -> tuple[str, str]:
    """The expression and the value of `calculate(expr) -> value` or `calculate(expr = value)`."""
    if result:
        return arguments, result
    expression, _, value = arguments.rpartition("=")
    return (expression, value) if expression else (arguments, "")


def agrees(value: Number, written: str) -> bool | None:
    """Whether `value`, rounded as `written` is, is what is written; None if that is no number."""
    found = _VALUE.match(written)
    if found is None or not re.search(r"\d", found["number"]):
        return None
    number = float(found["number"].replace(",", "").replace("−", "-"))
    scale = 0.01 if found["percent"] else 1.0
    place = int(found["power"] or 0) - len(found["decimals"] or "")
    if found["decimals"] is None and not found["power"]:
        # 18,000 may be rounded to its last digit that is not 0: only where it says about.
        digits = found["number"].replace(",", "").lstrip("+-−")
        if re.match(r"\s*(?:[≈~]|about|approx)", written):
            place = len(digits) - len(digits.rstrip("0"))
    slack = 0.5 * 10.0**place * scale
    return abs(value - number * scale) <= slack * (1 + 1e-9) + 1e-12 * abs(value)


def shown(value: Number) -> str:
    """A value for people: whole numbers whole, others to six significant digits."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return str(int(value))
    return f"{value:.6g}"
