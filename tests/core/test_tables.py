"""Tables and pages: plain text wherever they are printed, HTML for a notebook."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
from rich.console import Console

from modgraft.core.tables import Markdown, Page, table

ROWS = [("a[0/3]", "12"), ("<b> & c", "7")]


def test_a_table_is_aligned_text() -> None:
    assert str(table(("site", "number"), ROWS)).splitlines() == [
        "site     number",
        "----------------",
        "a[0/3]       12",
        "<b> & c       7",
    ]


def test_its_text_is_returned_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich prints there by showing beside, and writes nothing where it was told to."""
    plain = str(table(("site", "number"), ROWS))
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(table(("site", "number"), ROWS)) == plain
    assert plain in Page("Two sites:", table(("site", "number"), ROWS))


def test_html_is_a_table_and_is_escaped() -> None:
    made = table(("site", "number"), ROWS)
    made.title, made.caption = "[bold]Sites[/bold] <1>", "all"
    assert made._repr_html_() == (
        '<table><caption style="text-align: left">Sites &lt;1&gt;</caption><thead><tr>'
        '<th style="text-align: left">site</th><th style="text-align: right">number</th>'
        "</tr></thead><tbody>"
        '<tr><td style="text-align: left">a[0/3]</td><td style="text-align: right">12</td></tr>'
        '<tr><td style="text-align: left">&lt;b&gt; &amp; c</td>'
        '<td style="text-align: right">7</td></tr>'
        "</tbody></table><p>all</p>"
    )
    assert made._repr_mimebundle_((), ()) == {
        "text/plain": str(made), "text/html": made._repr_html_(),
    }  # fmt: skip


def test_a_terminal_still_folds_it() -> None:
    screen = io.StringIO()
    Console(file=screen, width=14).print(table(("site", "number"), [("encoder.layer.0", "12")]))
    assert max(map(len, screen.getvalue().splitlines())) <= 14


def test_a_page_is_its_text() -> None:
    page = Page("one <1>", table(("a",), [("2",)]), "three")
    assert page == "one <1>\n\na\n--\n2\n\nthree"
    assert repr(page) == str(page)
    assert type(str(page)) is str
    html = page._repr_html_()
    assert html.startswith('<p style="white-space: pre-line">one &lt;1&gt;</p><table>')
    for again in (copy.deepcopy(page), pickle.loads(pickle.dumps(page))):
        assert again == page
        assert again._repr_html_() == html


def test_markdown_is_shown_rendered() -> None:
    text = Markdown("| a |\n|---|")
    assert repr(text) == text._repr_markdown_() == text == "| a |\n|---|"
