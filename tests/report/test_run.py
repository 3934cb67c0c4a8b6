"""A run folder that is incomplete is shown as far as it goes; one that is wrong names its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from modgraft.core.errors import DataError, MissingFileError
from modgraft.report import write
from modgraft.report.run import grid_of, read_run


def spoil(path: Path, change: Any) -> None:
    """Change a JSON file in place: `change` gets its content."""
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value), "utf-8")


def test_reads_everything_that_was_written(full_run: Path) -> None:
    run = read_run(full_run)
    assert run.results is not None
    assert [row.key for row in run.results.rows if row.leaks] == ["teacher_forced"]
    assert set(run.curves) == {"rationale", "answer", "one_stage"}
    assert sorted(run.curves["answer"]) == [0, 1, 2]
    assert len(run.predictions["fused"][2]) == 240
    assert (len(run.gates), len(run.images), run.notes) == (4, 200, [])


def test_nothing_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such folder"):
        write(tmp_path / "absent")
    with pytest.raises(MissingFileError, match=r"neither results\.json nor.*modgraft mmcot train"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_shows_what_there_is(small_run: Path) -> None:
    (small_run / "results.json").unlink()
    lines = small_run / "seed0" / "answer" / "metrics.jsonl"
    lines.write_text(lines.read_text("utf-8")[:-9], "utf-8")
    page = write(small_run).read_text("utf-8")
    assert "results.json is not written" in page
    assert "The last line of seed0/answer/metrics.jsonl was cut off" in page
    assert (small_run / "loss-answer.png").is_file()
    assert 'id="errors"' not in page


def test_missing_pieces_are_said(small_run: Path) -> None:
    (small_run / "seed0" / "gates.json").unlink()
    (small_run / "images.json").unlink()
    for path in (small_run / "seed0").iterdir():
        if path.name != "fused":
            shutil.rmtree(path)

    def change(results: dict[str, Any]) -> None:
        results["settings"] = {}
        for row in results["rows"]:
            if row["key"] == "modular":
                row["seeds"] = {}
            for metrics in row["seeds"].values():
                metrics["rouge_l"], metrics["columns"] = None, {}

    spoil(small_run / "results.json", change)
    page = write(small_run).read_text("utf-8")
    for note in (
        "No gates.json in any seed", "No metrics.jsonl", "The run does not hold this image",
        "No row has an accuracy by column", "holds no settings",
        "Not measured in this run: ROUGE-L", ">not run</td>",
    ):  # fmt: skip
        assert note in page, note


def test_a_run_without_rows_or_questions(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"name": "empty", "rows": []}')
    page = write(tmp_path).read_text("utf-8")
    assert "results.json has no rows" in page
    assert "No predictions.jsonl of a main row" in page


def test_a_diverged_loss_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "seed0" / "answer" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1, "split": "train", "loss": 2.0}\n'
                    '{"step": 2, "split": "train", "loss": NaN}\n'
                    '{"step": 3, "split": "train", "loss": Infinity}\n')  # fmt: skip
    assert "2 losses of answer are not finite" in write(tmp_path).read_text("utf-8")
    path.write_text('{"step": 2, "split": "train", "loss": NaN}\n')
    assert "No finite loss of answer" in write(tmp_path).read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.json", "{", r"results\.json: not JSON"),
        ("results.json", '{"rows": []}', r"results\.json: name: Field required"),
        ("results.json", '{"name": "x", "rows": [{"key": "../x", "title": "t"}]}', r"rows\.0\.key"),
        ("results.json", '{"name": "x", "rows": [{"key": "a", "title": "t"},'
         ' {"key": "a", "title": "u"}]}', "a is there twice"),
        ("results.json", '{"name": "x", "rows": [{"key": "a", "title": "t", "seeds": {"0":'
         ' {"accuracy": 812}}}]}', r"rows\.0\.seeds\.0\.accuracy.*found 812"),
        ("seed0/gates.json", '[{"id": "q", "question": "?", "image": [[0]], "tokens": ["a", "b"],'
         ' "attention": [[1]], "gate": [0.5]}]', "2 tokens need 2 gates"),
        ("seed0/gates.json", '[{"id": "q", "question": "?", "image": [[0], []], "tokens": ["a"],'
         ' "attention": [[1]], "gate": [0.5]}]', "rows of one length"),
        ("seed0/fused/predictions.jsonl", '{"id": "q", "question": "?", "choices": ["a"],'
         ' "answer": 1, "image": false, "correct": false}\n', r"line 1: .*answer 1 is not one"),
        ("seed0/fused/predictions.jsonl", "nonsense\n", r"predictions\.jsonl: line 1: not JSON"),
        ("seed0/answer/metrics.jsonl", '{"split": "train"}\n', r"line 1: step: Field required"),
        ("images.json", '{"q": 3}', r"images\.json: q: Input should be a valid list"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(small_run: Path, name: str, text: str, message: str) -> None:
    (small_run / name).write_text(text, "utf-8")
    before = sorted(small_run.rglob("*"))
    with pytest.raises(DataError, match=message) as error:
        write(small_run)
    assert str(small_run / name) in str(error.value)
    assert sorted(small_run.rglob("*")) == before  # nothing written half


def test_not_text(small_run: Path) -> None:
    (small_run / "images.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"images\.json: not UTF-8"):
        write(small_run)


def test_patches_are_as_square_as_they_can_be() -> None:
    assert grid_of(12, 8, 24) == (2, 6)
    assert grid_of(49, 224, 224) == (7, 7)
    assert grid_of(7, 10, 70) == (1, 7)
    assert grid_of(12, 8, 24, (3, 4)) == (3, 4)
    with pytest.raises(ValueError, match="has no room for 12"):
        grid_of(12, 8, 24, (5, 2))
