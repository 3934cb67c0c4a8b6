"""Patterns of paths: what they match, and that no pattern takes long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import modgraft as mg
from modgraft.core.patterns import Pattern, starred

_TEXT = st.text("ab.1", max_size=6)
_PATTERN = st.recursive(
    st.sampled_from(["a", "b", ".", "1", "*", ""]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda ways: "{" + ",".join(ways) + "}"),
    ),
    max_leaves=8,
)


@given(_PATTERN, _TEXT, st.booleans())
def test_a_pattern_is_the_regular_expression_that_it_stands_for(
    text: str, path: str, numbers: bool
) -> None:
    written = text.replace(".", r"\.").replace("{", "(?:").replace("}", ")").replace(",", "|")
    # two stars in a row are one
    written = re.sub(r"\*+", lambda _: r"\\d+" if numbers else ".*", written)
    assert Pattern(text, numbers).matches(path) == bool(
        re.fullmatch(written.replace("\\\\", "\\"), path)
    )


@pytest.mark.parametrize(
    "text", ["*" * 30 + "!", "*a" * 25 + "!", "{*,*a}" * 12 + "!", "*{a,aa}" * 12 + "!"]
)
def test_no_pattern_takes_long(text: str) -> None:
    start = time.perf_counter()
    assert not Pattern(text).matches("a" * 200)
    assert time.perf_counter() - start < 1


def test_what_is_no_pattern() -> None:
    assert Pattern("a,b}").matches("a,b}")  # outside of braces they are themselves
    for text in ("{a", "a.{b,{c}", "{" * 50):
        with pytest.raises(mg.ModgraftError, match="opens a brace it does not close"):
            Pattern(text)


def test_numbers_are_starred() -> None:
    assert starred("h.0.c1.12") == "h.*.c1.*"
