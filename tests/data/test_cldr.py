"""Names and text of many languages, from Babel's CLDR."""

from __future__ import annotations

import re
import sys

import pytest

pytest.importorskip("babel", reason="names in many languages are Babel's: make setup")

from modgraft.core.errors import ModgraftError, UnknownNameError
from modgraft.data import cldr
from modgraft.data.cldr import KINDS, Line, counts, lines, names

CH, FRANC = ("territory", "CH"), ("currency", "CHF")


def test_a_thing_has_a_name_in_each_language() -> None:
    assert [names(code)[CH] for code in ("en", "fi", "hu")] == ["Switzerland", "Sveitsi", "Svájc"]
    assert names("fi")["zone", "Europe_Central"] == "Keski-Euroopan normaaliaika"
    assert names("fi")["unit", "length-kilometer"] == "kilometrit"
    assert all(count > 100 for count in counts(names("en")).values())


@pytest.mark.parametrize("code", ["en", "sw", "kk"])
def test_no_name_is_a_code_or_of_two_kinds(code: str) -> None:
    found = names(code)
    kinds: dict[str, set[str]] = {}
    for (kind, symbol), name in found.items():
        assert name != symbol
        assert name == " ".join(name.split())
        kinds.setdefault(name.casefold(), set()).add(kind)
    assert {len(own) for own in kinds.values()} == {1}
    assert tuple(counts(found)) == KINDS


def test_lines_are_what_cldrs_patterns_make() -> None:
    text = {line.text: line for line in lines("fi")}
    uzbek = text["uzbekki (kyrillinen, Uzbekistan)"]
    assert uzbek.things == {("language", "uz"), ("script", "Cyrl"), ("territory", "UZ")}
    assert any(re.fullmatch(r"[\d ,]+ Sveitsin frangia", t) for t in text)
    assert any(re.fullmatch(r"[\d.]+ Keski-Euroopan normaaliaika", t) for t in text)
    assert any(t.startswith("Suomi: suomi 9") for t in text)
    assert len(text) > 2000


def test_text_is_drawn_from_its_seed() -> None:
    assert lines("eu", seed=1) == lines("eu", seed=1)
    assert lines("eu", seed=1) != lines("eu", seed=2)


def test_what_is_left_out_is_in_no_line_by_code_or_in_letters() -> None:
    hidden = {CH, FRANC, ("language", "ru"), ("territory", "ZA")}
    words = [names("hu")[thing].casefold() for thing in hidden]
    kept = lines("hu", hidden)
    assert len(kept) > 1000
    for line in kept:
        assert line.things.isdisjoint(hidden)
        assert not [w for w in words if re.search(rf"(?<!\w){w}(?!\w)", line.text.casefold())]
    assert Line("orosz (Oroszország)", frozenset({("language", "ru")})) not in kept


def test_an_unknown_language_says_which_there_are() -> None:
    with pytest.raises(UnknownNameError, match="no language of CLDR is named 'tlh'"):
        names("tlh")


def test_without_babel_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "babel", None)
    monkeypatch.setitem(sys.modules, "babel.core", None)
    with pytest.raises(ModgraftError, match="make setup"):
        cldr.babel("core")
