"""The note that describes a ladder in the research log; see `modgraft.log.record.runs`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from modgraft.core.errors import listed
from modgraft.log.record.runs import RunNote, plain, recorded, settings_row
from modgraft.recipes.ladder.result import COLUMNS, read_ladder

ELSEWHERE = ("recipe", "model", "rungs", "seed", "settings", "weights", "data")


def recorded_ladder(
    home: Path, label: str, asked: Mapping[str, Any], *, wanted: bool
) -> AbstractContextManager[None]:
    """Record a ladder in ``note.md`` of its folder."""

    def about(said: RunNote) -> None:
        said.context["Host"] = plain(asked["model"])
        said.context["Rungs"] = listed([plain(name) for name in asked["rungs"]], 20)
        said.context["Seeds"] = f"{asked['seed']}"
        said.context["Settings"] = settings_row(asked["settings"])
        said.context["Budget"] = settings_row(asked, ELSEWHERE)

    def result(said: RunNote) -> None:
        found = read_ladder(home)
        for line, cells in zip(found.lines, found.cells(), strict=True):
            pairs = zip(COLUMNS[1:8], cells[1:8], strict=True)
            measured = ", ".join(f"{name} {cell}" for name, cell in pairs if cell != "–")
            said.learned[plain(line.title)] = plain(f"{measured}; {cells[8]}".strip("; "))
        said.learned["How to read"] = plain(" ".join(found.remarks()), longest=2000)
        said.done["Candidates"] = f"{found.taken:,} steps together, [table.md](table.md)"
        said.figures[home / "plot.png"] = "quality against each cost"
        said.headline = found.advice()

    return recorded(home, label, about, result, wanted=wanted)
