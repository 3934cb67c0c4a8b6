"""Tables and pages of text: plain lines where they are printed, HTML in a notebook."""

from __future__ import annotations

import io
import random
from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import Any

_drawn = random.getstate()  # rich draws a number when it is imported

import rich.table  # noqa: E402
from rich.box import Box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.text import Text  # noqa: E402

random.setstate(_drawn)

RIGHT = ("number", "parameters", "of the host", "sites")
"""Columns of numbers, which stand at the right."""

_RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n")
"""Two blanks between columns, and one rule below the header."""


class Table(rich.table.Table):
    """A table that rich prints on a terminal, that ``str`` makes plain, and a notebook HTML."""

    def __str__(self) -> str:
        out = io.StringIO()
        # Not as rich prints in a notebook: there it would show the table, and write nothing.
        console = Console(
            file=out, width=1000, color_system=None, force_terminal=False, force_jupyter=False
        )
        console.print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def _repr_html_(self) -> str:
        """Return the table as HTML; colours are left out."""

        def cell(tag: str, content: Any, justify: str) -> str:
            return f'<{tag} style="text-align: {justify}">{escape(_words(content))}</{tag}>'

        left = 'style="text-align: left"'
        title = f"<caption {left}>{escape(_words(self.title))}</caption>" if self.title else ""
        head = "".join(cell("th", column.header, column.justify) for column in self.columns)
        rows = zip(*(column.cells for column in self.columns), strict=True)
        body = "".join(
            "<tr>"
            + "".join(cell("td", c, col.justify) for c, col in zip(row, self.columns, strict=True))
            + "</tr>"
            for row in rows
        )
        made = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"{made}<p>{escape(_words(self.caption))}</p>" if self.caption else made

    def _repr_mimebundle_(
        self, include: Sequence[str], exclude: Sequence[str], **_: Any
    ) -> dict[str, str]:
        # Rich's own is preformatted text, folded to the width that it believes a notebook has.
        return {"text/plain": str(self), "text/html": self._repr_html_()}


class Page(str):
    """Paragraphs and tables, with a blank line between them; a notebook shows them as HTML."""

    parts: tuple[str | Table, ...]

    def __new__(cls, *parts: str | Table) -> Page:
        """Join paragraphs and tables."""
        page = super().__new__(cls, "\n\n".join(map(str, parts)))
        page.parts = parts
        return page

    def __repr__(self) -> str:
        return str(self)  # without quotes, for a prompt and for a notebook that shows no HTML

    def _repr_html_(self) -> str:
        """Return the page as HTML."""
        return "".join(
            part._repr_html_()
            if isinstance(part, Table)
            else f'<p style="white-space: pre-line">{escape(part)}</p>'
            for part in self.parts
        )


class Markdown(str):
    """Markdown, which a notebook shows as what it means."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        """Return the text itself."""
        return str(self)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = RIGHT
) -> Table:
    """Make a table whose cells are plain text: ``[0/3]`` is no markup.

    The columns in ``right`` are justified to the right.
    """
    found = Table(box=_RULE, padding=(0, 1, 0, 0), show_edge=False)
    for name in columns:
        side = "right" if name in right else "left"
        found.add_column(name, justify=side, overflow="fold", header_style="bold")
    for row in rows:
        found.add_row(*(Text(cell) for cell in row))
    return found


def _words(content: Any) -> str:
    """Return the text of a cell or title without its markup."""
    return content.plain if isinstance(content, Text) else Text.from_markup(f"{content}").plain
