"""The figures of the table, against values worked out by hand; and what may be called best."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from scipy.stats import binomtest

from modgraft.core.errors import DataError
from modgraft.report import insert, table
from modgraft.report.run import Metrics, Prediction, Results, Row
from modgraft.report.statistics import Chance, Figure, apart, best, interval
from modgraft.report.table import build, count, print_fitted, seconds, terminal_table


def row(key: str, *values: float | None, group: str = "main") -> Row:
    seeds = {i: Metrics(accuracy=value) for i, value in enumerate(values)}
    return Row.model_validate({"key": key, "title": key, "group": group, "seeds": seeds})


def winners(*rows: Row) -> set[str]:
    return best(rows, lambda m: m.accuracy)


def test_mean_and_sample_spread() -> None:
    assert str(Figure((80.0, 82.0, 87.0))) == "83.0 ± 3.6"  # sqrt((9 + 1 + 16) / 2) = 3.606
    assert str(Figure((80.04,))) == "80.0"


def test_chance_is_one_over_each_questions_own_options() -> None:
    def ask(choices: int, image: bool) -> Prediction:
        return Prediction(id="q", question="?", choices=["x"] * choices, answer=0, image=image,
                          correct=True, category="read" if image else "text")  # fmt: skip

    chance = Chance.of([ask(2, True), ask(4, True), ask(5, False)])
    assert chance is not None
    assert chance.image == pytest.approx(37.5)
    assert chance.all == pytest.approx(100 * (0.5 + 0.25 + 0.2) / 3)
    assert chance.families == pytest.approx({"read": 37.5, "text": 20.0})
    assert Chance.of([]) is None


@pytest.mark.parametrize(("right", "n"), [(0, 12), (1, 3), (450, 900), (889, 900), (900, 900)])
def test_an_interval_is_wilsons(right: int, n: int) -> None:
    ci = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert interval(100 * right / n, n) == pytest.approx((100 * ci.low, 100 * ci.high), abs=1e-9)


def test_each_row_has_its_own_interval() -> None:
    rows = [row("a", 98.0, 99.0), row("b", 50.0, 52.0), row("c")]
    chance = Chance(25.0, 400, None, 0, {})
    results = Results(name="x", seeds=[0, 1], rows=rows)
    (_, lines), *_ = build(results, chance).groups
    first, second, third = lines
    assert first.cells[0].interval == "[{:.1f}, {:.1f}]".format(*interval(98.5, 400)) != ""
    assert second.cells[0].interval == "[46.1, 55.9]"  # by hand: 51 ± 1.96 · 2.5, a little inwards
    assert third.cells == []
    assert [cell.interval for cell in first.cells[1:]] == [""] * (len(first.cells) - 1)
    text = " ".join(build(results, chance).remarks)
    assert "95 % interval (Wilson) around a row's mean for one test set of this size (400)" in text
    assert "up to ±" not in text


def test_what_was_trained_is_apart_and_what_trained_nothing_has_none() -> None:
    whole = {"accuracy": 90, "trained": 40_000, "parameters": 40_000, "fusion": 4_000, "seconds": 9}
    modular = whole | {"trained": 6_000, "fusion": 4_000}
    results = Results.model_validate({"name": "x", "seeds": [0], "rows": [
        {"key": "a", "title": "A", "seeds": {"0": whole}},
        {"key": "b", "title": "B", "seeds": {"0": modular}},
        {"key": "c", "title": "C", "group": "control", "seeds": {"0": {"accuracy": 20}}},
    ]})  # fmt: skip
    laid = build(results)
    costs = ["Trained parameters", "of these fusion", "Frozen parameters", "Time"]
    assert laid.columns == ["All questions", *costs]
    cells = {line.row.key: [c.text for c in line.cells[1:]] for _, ls in laid.groups for line in ls}
    assert cells == {
        "a": ["40.0 k", "4.00 k", "0", "9 s"],
        "b": ["6.00 k", "4.00 k", "34.0 k", "9 s"],
        "c": ["–"] * 4,
    }
    assert "A row without parameters tests the models of another row." in laid.remarks
    plain = {"accuracy": 90, "trained": 40, "parameters": 40, "fusion": 0, "seconds": 9}
    results = Results.model_validate(
        {"name": "x", "rows": [{"key": "a", "title": "A", "seeds": {"0": plain}}]}
    )
    assert build(results).columns == ["All questions", "Trained parameters", "Time"]


def test_first_place_is_shared_by_what_the_seeds_do_not_set_apart() -> None:
    a, b, c = row("a", 90, 91, 92), row("b", 89, 91, 92.5), row("c", 50, 51, 52)
    assert winners(a, b, c) == {"a", "b"}
    assert winners(a, c) == {"a"}
    assert winners(a, b) == set()  # all share it: nothing to say
    assert winners(row("a", 90), row("c", 50)) == set()  # single seeds
    assert winners(a, row("c", 50)) == set()
    assert winners(a, c, row("gold", 100, 100, 100, group="control")) == {"a"}
    leak = row("teacher_forced", 99, 99, 99)
    assert winners(a, c, leak) == {"a"}
    assert winners(a, row("d")) == set()


def test_figures_without_spread_are_apart_where_they_differ() -> None:
    assert apart(Figure((2.0, 2.0)), Figure((1.0, 1.0)))
    assert not apart(Figure((2.0, 2.0)), Figure((2.0, 2.0)))
    assert not apart(Figure((2.0,)), Figure((1.0, 1.0)))


def test_counts_and_durations() -> None:
    assert [count(n) for n in (None, 512, 37_400, 1_040_000, 2_770_000, 220e6, 7e9)] == [
        "–", "512", "37.4 k", "1.04 M", "2.77 M", "220 M", "7.00 G",
    ]  # fmt: skip
    assert [seconds(n) for n in (None, 48.2, 516, 7560)] == ["–", "48 s", "8.6 min", "2.1 h"]


def test_markdown_table() -> None:
    text = table({
        "name": "x", "seeds": [0, 1, 2],
        "rows": [
            {"key": "a", "title": "A | b", "note": "see *c*", "seeds": {
                str(i): {"image": 80 + i, "accuracy": 90, "trained": 10, "parameters": 40,
                         "seconds": 60} for i in range(3)}},
            {"key": "b", "title": "B", "seeds": {"0": {"image": 50}, "1": {"image": 51}}},
            {"key": "teacher_forced", "title": "T", "group": "control", "seeds": {
                "0": {"image": 99}, "1": {"image": 98}, "2": {"image": 97}}},
            {"key": "d", "title": "D", "group": "ablation"},
        ],
    })  # fmt: skip
    lines = text.splitlines()
    costs = "Trained parameters | Frozen parameters | Time"
    assert lines[0] == f"| | Image questions | All questions | {costs} |"
    assert lines[3] == r"| A \| b | **81.0 ± 1.0** | 90.0 ± 0.0 | 10 | 30 | 60 s |"
    assert lines[4] == "| B (2 of 3 seeds) | 50.5 ± 0.7 | – | – | – | – |"
    assert lines[6] == "| D (not run) |  |  |  |  |  |"
    assert lines[8] == "| T (leak) | 98.0 ± 1.0 | – | – | – | – |"
    assert len({line.count("|") - line.count(r"\|") for line in lines[:9]}) == 1
    assert r"A \| b: see \*c\*." in text
    assert "Chance is not known" in text


def test_table_of_a_folder_knows_chance(full_run: Path) -> None:
    guesses: list[float] = []
    for seed in range(3):
        for line in (full_run / f"seed{seed}/fused/predictions.jsonl").read_text().splitlines():
            made = json.loads(line)
            guesses += [100 / len(made["choices"])] if made["image"] else []
    assert f"| *Chance* | {sum(guesses) / len(guesses):.1f} |" in table(full_run)


def test_table_of_an_interrupted_run(small_run: Path) -> None:
    (small_run / "results.json").unlink()
    with pytest.raises(DataError, match="interrupted before its results"):
        table(small_run)


def test_table_of_nonsense() -> None:
    with pytest.raises(DataError, match="rows: Input should be a valid list"):
        table({"name": "x", "rows": 3})


def test_one_seed_is_never_best() -> None:
    results = Results(name="x", seeds=[0], rows=[row("a", 90), row("b", 50)])
    text = table(results)
    assert "**" not in text
    assert "no row is called best" in text


def test_insert_replaces_only_what_is_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- results:x -->\nold \\1\n<!-- /results -->\n<!-- results:y -->\nk\n"
                    "<!-- /results -->\nz\n")  # fmt: skip
    for _ in range(2):
        insert(page, "x", "new \\g<0>")
    assert page.read_text() == (
        "a\n<!-- results:x -->\nnew \\g<0>\n<!-- /results -->\n"
        "<!-- results:y -->\nk\n<!-- /results -->\nz\n"
    )
    with pytest.raises(DataError, match=r"README\.md: 0 places for the results of 'q'"):
        insert(page, "q", "")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


TITLES = ["One stage, rationale then answer", "Text only"]


@pytest.mark.parametrize(("width", "shown"), [(80, 3), (50, 1), (300, 9)])
def test_a_terminal_has_whole_columns_and_is_told_of_the_rest(width: int, shown: int) -> None:
    names = [f"measure {i}" for i in range(9)]
    for terminal, wide in ((True, False), (True, True), (False, False)):
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
        made = terminal_table("Results", "", names)
        for title in TITLES:
            made.add_row(title, *["12.3 ± 4.5"] * 9)
        print_fitted(made, console, Path("run") / "table.md", wide=wide)
        text = out.getvalue()
        cut = shown if terminal and not wide else 9
        assert [name in text.partition(" more columns")[0] for name in names[:cut]] == [True] * cut
        assert text.count("12.3 ± 4.5") == 2 * cut
        assert all(title in text for title in TITLES)
        rest = f"{9 - cut} more columns ({', '.join(names[cut:])}): --wide, or run/table.md"
        assert (rest in text.replace("\n", "")) == (cut < 9)
