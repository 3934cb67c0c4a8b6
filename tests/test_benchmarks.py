"""Benchmarks that have no other test: they run, small, and compare what they time."""

from __future__ import annotations

import pytest
import torch
from benchmarks import gpu, merging, train_grid


def test_without_a_gpu_make_gpu_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert gpu.main() == 0
    assert capsys.readouterr().out == "no GPU here: nothing was run\n"


def test_its_step_runs_small_on_the_cpu() -> None:
    rows = list(gpu.step(torch.device("cpu"), torch.bfloat16))
    assert [row.holds for row in rows] == [True, True, True, None]


def test_a_point_of_the_grid() -> None:
    cells = train_grid.measured(width=64, tokens=32, rank=4, threads=1, seconds=0.0)
    assert len(cells) == 5
    assert cells[-1] == "5"  # rounds


def test_merging_small() -> None:
    table, claims = merging.merging(layers=1, width=64, rounds=1)
    assert table.row_count == 15
    said = {claim.what: claim for claim in claims}
    assert float(said["error of the exact sum"].ratio) <= 1e-6
    assert float(said["error, rank=8"].ratio) <= float(said["error, rank=8"].peer) + 1e-6
