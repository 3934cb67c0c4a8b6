"""Very many families are the largest ones and a group, and every column is shown or named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from modgraft.report.family_groups import MOST, group_families, rare_families
from modgraft.report.run import Metrics, Results, Row
from modgraft.report.table import families, print_results


def results(count: int, *, sizes: bool = True) -> Results:
    """Two seeds; family i has i + 1 questions, of which i are answered rightly (seed 0) or none."""
    names = {f"Family of number {i}": i for i in range(count)}
    seeds = {
        seed: Metrics(
            families={name: right * i / (i + 1) for name, i in names.items()},
            family_sizes={name: i + 1 for name, i in names.items()} if sizes else {},
        )
        for seed, right in ((0, 100), (1, 0))
    }
    row = Row(key="a", title="A row with a title of its own", seeds=seeds)
    return Results(name="many", seeds=[0, 1], scienceqa=True, split="val", rows=[row])


def test_all_but_the_largest_are_one_group_over_their_questions() -> None:
    many = results(20)
    shown = group_families(many).rows[0].seeds[0].families
    assert list(shown) == [f"Family of number {i}" for i in range(9, 20)] + ["9 others"]
    assert len(shown) == MOST
    assert shown["9 others"] == pytest.approx(100 * sum(range(9)) / sum(range(1, 10)))
    assert shown["Family of number 19"] == pytest.approx(95)
    assert group_families(many).rows[0].seeds[1].families["9 others"] == 0
    assert "| 9 others |" in families(many)


def test_few_families_and_those_of_unknown_sizes_stay() -> None:
    for kept in (results(MOST), results(20, sizes=False)):
        assert rare_families(kept) == frozenset()
        assert group_families(kept) is kept


@pytest.mark.parametrize("width", [80, 200])
def test_every_figure_is_on_the_terminal(tmp_path: Path, width: int) -> None:
    """In columns that fit, and the rest by name; all figures with --wide, or in a file."""
    many = results(20)
    metrics = (
        many.rows[0]
        .seeds[0]
        .model_copy(
            update={"accuracy": 81.25, "bleu_1": 31.5, "bleu_4": 12.5, "columns": {"NAT": 71.5}}
        )
    )
    row = many.rows[0].model_copy(update={"seeds": {0: metrics}})
    made = many.model_copy(update={"rows": [row]})
    (tmp_path / "results.json").write_text(made.model_dump_json())
    named = [f"Family of number {i}" for i in range(9, 20)]
    title = json.loads((tmp_path / "results.json").read_text())["rows"][0]["title"]
    texts = ["Questions of the split val", "BLEU-4", "NAT", "9 others", *named, title]
    figures = ["81.2", "31.5", "12.5", "71.5"]
    for terminal, wide in ((True, False), (True, True), (False, False)):
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
        print_results(tmp_path, console, wide=wide)
        text = out.getvalue()
        cut = terminal and not wide
        more = [line for line in text.splitlines() if "more columns" in line]
        assert len(more) == cut, more  # of the table of families
        assert all("--wide" in line and str(tmp_path / "report.html") in line for line in more)
        tables = [line for line in text.splitlines() if line not in more]
        assert max(map(len, tables)) <= width or not cut
        for piece in (*texts, *figures, *(() if cut else ("95.0",))):
            assert piece in text, piece
        assert "Facts" not in text  # not measured
