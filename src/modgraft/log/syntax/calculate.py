"""Evaluate the arithmetic in notes over a whitelist of syntax, never with `eval`.

`18432 / 48`, `2^10`, `1,000 × 3`, `15% * 200`, `sqrt(2)`. Integers are exact, other
numbers double precision. Expressions that would take long or grow without bound are refused.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from modgraft.core.errors import ModgraftError

Number = int | float

_LONGEST = 500  # characters of an expression
_BITS = 1024  # of an integer on the way; a float holds numbers of this size


def _round(number: Number, places: int = 0) -> Number:
    if abs(places) > _BITS:  # a whole number rounded to 10^9 places takes minutes
        raise CalculationError(f"a rounding to more than {_BITS} places")
    return round(number, places) if places else round(number)


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
    "log10": math.log10, "log2": math.log2, "max": max, "min": min, "round": _round,
    "sqrt": math.sqrt,
}  # fmt: skip
_NAMES = {"pi": math.pi, "e": math.e}
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "\0"})
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")
_FOREIGN = re.compile(r"[^\w\s+\-*/%().,]|\d[A-DF-Za-df-z_]|[^\W\d][.]")
_PERCENT = re.compile(r"(?<=\d)\s*%(?!\s*[\w(.])")
_SCALES = {
    "%": 0.01,
    "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
    "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12,
}  # fmt: skip
_VALUE = re.compile(
    r"\s*(?:(?P<about>[≈~]|about|approx(?:imately)?)|=)?\s*[$€£]?\s*"
    r"(?P<number>[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?"
    r"(?:\.(?P<decimals>\d+))?(?:[eE](?P<power>[-+]?\d{1,3}))?)"
    # 12k, 3 million, 20 MiB, 5 kB; in "5 Mbit" and "3 km" the letter scales nothing
    rf"(?P<scale>\s*(?:%|(?:{'|'.join(_SCALES)})(?=B?(?![^\W\d_]))))?"
)


class CalculationError(ModgraftError):
    """An expression that is no arithmetic, has no value, or is too large to evaluate."""


def calculate(expression: str) -> Number:
    """Evaluate an expression of numbers, + - * / // % ^, brackets and a few functions.

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
    if power * math.log2(abs(base)) > _BITS:
        raise CalculationError(f"a power of more than {_BITS} bits")


def _bounded(value: object) -> Number:
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise CalculationError(f"a number of more than {_BITS} bits")
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CalculationError("the value is no finite real number")
    return value


def split_value(arguments: str, result: str | None) -> tuple[str, str]:
    """Split `calculate(expr) -> value` or `calculate(expr = value)` into expression and value."""
    if result:
        return arguments, result
    expression, _, value = arguments.rpartition("=")
    return (expression, value) if expression else (arguments, "")


def agrees(value: Number, written: str) -> bool | None:
    """Return whether `value`, rounded as `written` is, equals it; None if `written` is no number.

    ``152 MB`` may mean 152 or 152,000,000 and ``40%`` 40 or 0.4, since the unit of `value` is not
    known; either is accepted.
    """
    found = _number(written)
    if found is None:
        return None
    number = _float(found["number"])
    place = int(found["power"] or 0) - len(found["decimals"] or "")
    if found["decimals"] is None and not found["power"] and found["about"]:
        # about 18,000 may be rounded to thousands; 18,000 without "about" is exact.
        digits = found["number"].replace(",", "").lstrip("+-−")
        place = len(digits) - len(digits.rstrip("0"))
    slack = 0.5 * float(f"1e{place}") * (1 + 1e-9)
    for scale in _scales(found):
        off = abs(value - number * scale)  # infinite for 1e999
        if off < math.inf and off <= slack * scale + 1e-12 * abs(value):
            return True
    return False


def corrected(value: Number, written: str) -> str:
    """Return the correction of a `written` value, with as many decimals and the same unit."""
    found = _number(written)
    if found is None:
        return format_number(value)
    number = abs(_float(found["number"]))

    def apart(scale: float) -> float:
        return abs(math.log((number * scale or 1.0) / (abs(value) or 1.0)))

    scale = min(_scales(found), key=apart)
    meant = value if scale == 1 else value / scale
    before, after = written[: found.start("number")], written[found.end("number") :]
    if found["decimals"] and not found["power"]:
        alike = f"{before}{meant:.{len(found['decimals'])}f}{after}"
        if agrees(value, alike):  # not if the rounding leaves nothing, as in 0.0 MB
            return alike
    return f"{before}{format_number(meant)}{after}"


def _number(written: str) -> re.Match[str] | None:
    found = _VALUE.match(written)
    return found if found and re.search(r"\d", found["number"]) else None


def _float(number: str) -> float:
    return float(number.replace(",", "").replace("−", "-"))


def _scales(found: re.Match[str]) -> list[float]:
    """Return the factors that the unit may stand for."""
    scale = _SCALES.get((found["scale"] or "").strip())
    return [1.0] if scale is None or _float(found["number"]) == 0 else [1.0, scale]


def format_number(value: Number) -> str:
    """Format a value: integers in full, other numbers to six significant digits."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return str(int(value))
    return f"{value:.6g}"
