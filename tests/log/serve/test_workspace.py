"""Lines and columns as editors count them, and what a workspace knows of keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modgraft import ModgraftError
from modgraft.log.serve.workspace import Text, Workspace


def utf16(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


@given(st.text("ab é你💡\u2028\f\r\n\ufeff", max_size=40), st.integers(0, 40))
def test_every_place_has_a_line_and_column_and_they_lead_back(text: str, index: int) -> None:
    before = text[:index]
    if before.endswith("\r") and text[index : index + 1] == "\n":
        return  # between the two there is no place
    place = Text(text.encode(), utf16)
    line, column = place.position(len(before.encode()))
    broken = before.replace("\r\n", "\n").replace("\r", "\n")
    assert (line, column) == (broken.count("\n"), utf16(broken.rpartition("\n")[2]))
    assert place.offset(line, column) == len(before.encode())


def test_what_lies_beyond_is_the_end() -> None:
    place = Text(b"ab\ncd", utf16)
    assert [place.offset(*one) for one in ((0, 9), (1, 9), (9, 0))] == [2, 5, 5]
    assert Text(b"", utf16).position(0) == (0, 0)
    assert Text(b"a\xffb", utf16).offset(0, 2) == 2


def test_open_texts_take_the_place_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("- @oneThing2020\n")
    (tmp_path / "s.bib").write_text(
        "@misc{oneThing2020, title={x}}\n@misc{two, crossref={oneThing2020}}\n"
    )
    log = Workspace(tmp_path)
    assert [one.line for _, one in log.citations("oneThing2020")] == [1]
    log.opened[tmp_path / "a.md"] = b"\n- @oneThing2020 twice oneThing2020\n"
    log.opened[tmp_path / "new.md"] = b"- @oneThing2020\n"
    assert [(path.name, one.line) for path, one in log.citations("oneThing2020")] == [
        ("a.md", 2), ("a.md", 2), ("new.md", 1),
    ]  # fmt: skip
    places = [(one.path.name, one.start) for one in log.rename("oneThing2020", "newThing2020")]
    assert places == [("a.md", 4), ("a.md", 23), ("new.md", 3), ("s.bib", 6), ("s.bib", 52)]
    for bad in ("жукBoats2020", "", "1st2020", "a b", "a", "x,y", "é}"):
        with pytest.raises(ModgraftError, match="cannot be cited"):
            log.rename("oneThing2020", bad)
    with pytest.raises(ModgraftError, match="another source's key"):
        log.rename("oneThing2020", "two")


def test_a_bibliography_is_read_again_when_it_changed(tmp_path: Path) -> None:
    bib = tmp_path / "s.bib"
    bib.write_text("@misc{oneThing2020, title={x}}\n")
    log = Workspace(tmp_path)
    first = log.bibliography
    assert log.bibliography is first
    bib.write_text("@misc{oneThing2020, title={x}}\n@misc{two2021, title={y}}\n")
    assert list(log.bibliography.entries) == ["oneThing2020", "two2021"]
    bib.unlink()
    assert not log.bibliography.entries
