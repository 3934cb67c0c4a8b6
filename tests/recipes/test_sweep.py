"""`mg.sweep`: every choice of settings × seed once, whatever fails or is killed in between."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import modgraft as mg
from contract.hosts import HOSTS
from modgraft.core.errors import CheckpointError, DataError, UnknownNameError
from modgraft.recipes.sweep import passes
from modgraft.recipes.sweep.result import SweepError

QUIET: dict[str, Any] = {"progress": False, "note": False}


def square(x: float, y: float, seed: int, offset: float = 0.0) -> dict[str, float]:
    return {"value": x * x + y + 0.1 * seed + offset, "seed doubled": 2 * seed}


class Counted:
    """A run that says how often it was called, and fails where it is told to."""

    def __init__(self, fails: Any = lambda x, seed: False) -> None:
        self.calls: list[tuple[int, int]] = []
        self.fails = fails

    def __call__(self, x: int, seed: int) -> dict[str, float]:
        self.calls.append((x, seed))
        if fails := self.fails(x, seed):
            raise fails
        return {"value": x + seed}


def test_every_choice_of_settings_is_run_with_every_seed() -> None:
    found = mg.sweep(square, {"x": [1, 2], "y": [0.0, 0.5]}, seeds=[0, 1, 5], offset=1.0, **QUIET)
    assert [dict(row.settings) for row in found.rows] == [
        {"x": 1, "y": 0.0}, {"x": 1, "y": 0.5}, {"x": 2, "y": 0.0}, {"x": 2, "y": 0.5}
    ]  # fmt: skip
    for row in found.rows:
        values = [square(**row.settings, seed=s, offset=1.0)["value"] for s in (0, 1, 5)]
        assert row["value"].values == tuple(values)
        assert row["value"].mean == pytest.approx(mean(values))
        assert row["value"].spread == pytest.approx(stdev(values))
    assert found.names == ["value", "seed doubled"]
    assert found.best().settings == {"x": 2, "y": 0.5}
    assert found.best("value", mode="min").settings == {"x": 1, "y": 0.0}
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["x", "y", "value"]
    assert lines[2].split()[:5] == ["1", "0", "2.2", "±", "0.26"]
    assert "sample standard deviation over the seeds 0, 1, 5" in lines[-1]
    assert "<table>" in found._repr_html_()


def test_a_list_of_choices_and_a_single_seed() -> None:
    rows = [{"x": 1, "y": 0.0}, {"x": 3, "y": 1.0}]
    found = mg.sweep(square, rows, seeds=[4], **QUIET)
    assert [row["value"].spread for row in found.rows] == [None, None]
    assert "no spread is known" in str(found)
    assert (mg.sweep(square, {}, seeds=[0], x=1, y=2, **QUIET).rows[0])["value"].mean == 3


def test_the_picture_has_lines_where_a_setting_is_a_number_and_rows_elsewhere() -> None:
    found = mg.sweep(square, {"x": [0.001, 0.1], "y": [0, 1]}, seeds=[0, 1], **QUIET)
    for picture in (found.figure(), found.figure("seed doubled", against="y")):
        assert picture.light.startswith(b"\x89PNG")
        assert picture.dark != picture.light
    assert "x=0.001, y=1" in found.figure().alt
    words = mg.sweep(lambda kind, seed: {"n": len(kind)}, {"kind": ["a", "bcd"]}, **QUIET)
    assert words.figure().light.startswith(b"\x89PNG")
    with pytest.raises(UnknownNameError, match="'value'"):
        found.figure("valu")
    with pytest.raises(UnknownNameError, match="no setting of several numbers is named 'kind'"):
        words.figure(against="kind")


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    run = Counted(lambda x, seed: ValueError("too large") if (x, seed) == (2, 1) else None)
    with pytest.raises(SweepError, match=r"1 of 4 runs failed: x=2, seed 1 \(ValueError: too") as e:
        mg.sweep(run, {"x": [1, 2]}, seeds=[0, 1], **QUIET)
    assert len(run.calls) == 4
    assert isinstance(e.value.__cause__, ValueError)
    assert [row.failed for row in e.value.sweep.rows] == [False, True]
    given: dict[str, Any] = {"seeds": [0, 1], "folder": tmp_path, **QUIET}
    found = mg.sweep(run, {"x": [1, 2]}, errors="keep", **given)
    assert found.best().settings == {"x": 1}  # the row that failed does not compete
    assert "1 of 2 failed" in str(found)
    assert "Failed: x=2, seed 1: ValueError: too large" in (tmp_path / "table.md").read_text()
    assert mg.sweep(again := Counted(), {"x": [1, 2]}, errors="keep", **given).failed
    assert not again.calls  # it is a result
    assert not mg.sweep(again, {"x": [1, 2]}, **given).failed
    assert again.calls == [(2, 1)]  # it is tried again, the others are not


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ({"value": math.nan}, "it measured value nan"),
        ({"value": torch.tensor(math.inf)}, "it measured value inf"),
        ({}, "returns numbers by name"),
        (0.5, "returned 0.5"),
        ({"value": "high"}, "returns numbers by name"),
    ],
)
def test_what_is_no_finite_number_is_a_failure(returned: Any, words: str) -> None:
    found = mg.sweep(lambda seed: returned, {}, seeds=[0], errors="keep", **QUIET)
    assert words in found.failed[0].error
    with pytest.raises(mg.ModgraftError, match="a run of each has failed"):
        found.best()
    with pytest.raises(mg.ModgraftError, match="nothing was measured"):
        found.figure()


def test_it_goes_on_where_it_was_interrupted_and_takes_more_seeds(tmp_path: Path) -> None:
    stopped = Counted(lambda x, seed: KeyboardInterrupt() if (x, seed) == (2, 0) else None)
    with pytest.raises(KeyboardInterrupt):
        mg.sweep(stopped, {"x": [1, 2]}, seeds=[0, 1], folder=tmp_path, **QUIET)
    rest = Counted()
    found = mg.sweep(rest, {"x": [1, 2]}, seeds=[0, 1], folder=tmp_path, **QUIET)
    assert rest.calls == [(2, 0), (2, 1)]
    assert [row["value"].values for row in found.rows] == [(1, 2), (2, 3)]
    more = Counted()
    mg.sweep(more, {"x": [1, 2, 3]}, seeds=[0, 1, 2], folder=tmp_path, **QUIET)
    assert sorted(more.calls) == [(1, 2), (2, 2), (3, 0), (3, 1), (3, 2)]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert len(kept["cells"]) == 9
    fresh = Counted()
    mg.sweep(fresh, {"x": [1]}, seeds=[0], folder=tmp_path, fresh=True, **QUIET)
    assert fresh.calls == [(1, 0)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_sweep_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = tmp_path / "calls"

    def run(x: int, seed: int) -> dict[str, float]:
        with calls.open("a") as file:
            file.write(f"{x} {seed}\n")
        if os.getpid() != parent and (x, seed) == (2, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"value": 10 * x + seed}

    def sweep() -> Any:
        return mg.sweep(run, {"x": [1, 2, 3]}, seeds=[0, 1], folder=tmp_path / "run")

    parent = os.getpid()
    if (child := os.fork()) == 0:
        sweep()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = sweep()
    assert [row["value"].values for row in found.rows] == [(10, 11), (20, 21), (30, 31)]
    assert calls.read_text().split("\n")[3:5] == ["2 1", "2 1"]
    assert len(calls.read_text().split("\n")) == 8
    said = capsys.readouterr().err
    assert "sweep: 3 of 6 runs were done before" in said
    assert "sweep 6/6  x=3, seed 1: value 31" in said
    assert "interrupt(killed)" in (tmp_path / "run" / "note.md").read_text()


def test_a_folder_of_another_sweep_is_refused_with_what_differs(tmp_path: Path) -> None:
    given: dict[str, Any] = {"seeds": [0], "folder": tmp_path / "a", **QUIET}
    mg.sweep(square, {"x": [1]}, y=2.0, offset=1.0, **given)
    with pytest.raises(CheckpointError, match=r"offset: 1.0, now 2.0"):
        mg.sweep(square, {"x": [1]}, y=2.0, offset=2.0, **given)
    with pytest.raises(CheckpointError, match=r"settings: \['x'\], now \['x', 'y'\]"):
        mg.sweep(square, {"x": [1], "y": [2.0]}, offset=1.0, **given)
    with pytest.raises(CheckpointError, match=r"sweep: '.*square', now 'Counted'"):
        mg.sweep(Counted(), {"x": [1]}, **given)
    figures = next((tmp_path / "a").rglob("figures.json"))
    figures.write_text("{")
    with pytest.raises(DataError, match=r"figures.json: not JSON.*delete it, and run again"):
        mg.sweep(square, {"x": [1]}, y=2.0, offset=1.0, **given)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="holds no run"):
        mg.sweep(square, {"x": [1]}, y=2.0, folder=tmp_path / "b")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"settings": {"x": 1, "y": [1]}}, "x=1 is one value; give a list"),
        ({"settings": {"x": "ab", "y": [1]}}, "x='ab' is one value"),
        ({"settings": {"x": [], "y": [1]}}, "nothing to run"),
        ({"settings": {"x": [1]}}, r"square\(x.*is to be called with x, seed: missing"),
        ({"settings": {"x": [1], "y": [1], "z": [1]}}, "unexpected keyword argument 'z'"),
        ({"settings": {"x": [1], "y": [1], "seed": [1]}}, "it is seeds="),
        ({"seeds": []}, "give different whole numbers"),
        ({"seeds": [1, 1]}, "give different whole numbers"),
        ({"errors": "ignore"}, "it must be 'raise' or 'keep'"),
        ({"run": 3}, "give a function, or a host"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    call = {"run": square, "settings": {"x": [1], "y": [1]}, "folder": tmp_path / "run", **given}
    with pytest.raises(mg.ModgraftError, match=words):
        mg.sweep(**call, **QUIET)
    assert not (tmp_path / "run").exists()


def test_values_that_cannot_be_found_again_are_refused_in_a_folder(tmp_path: Path) -> None:
    values: dict[str, Any] = {"make": [lambda: 1, lambda: 2]}
    run = lambda make, seed: {"value": make()}  # noqa: E731
    found = mg.sweep(run, values, seeds=[0], **QUIET)
    assert [row["value"].mean for row in found.rows] == [1, 2]
    with pytest.raises(mg.ModgraftError, match="has no name by which it is found again"):
        mg.sweep(run, values, folder=tmp_path, **QUIET)
    with pytest.raises(mg.ModgraftError, match="two of the 2 choices"):
        mg.sweep(square, [{"x": 1, "y": 1}] * 2, folder=tmp_path, **QUIET)


# -- modules of one host, side by side ------------------------------------------------------------


def host() -> mg.Host:
    return mg.Host(HOSTS["bert"].model().double()).eval()


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 41, (7,), generator=g) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def loader(count: int = 14, seed: int = 0) -> DataLoader:
    return DataLoader(rows(count, seed), batch_size=4, shuffle=True)  # type: ignore[arg-type]


HELD_OUT = list(DataLoader(rows(6, 1), batch_size=3))  # type: ignore[arg-type]
FIT: dict[str, Any] = {"steps": 5, "schedule": "cosine", "evaluate": HELD_OUT}


def alone(lr: float, rank: int, seed: int) -> tuple[float, float]:
    own = host()
    torch.manual_seed(seed)
    own.implant("m", mg.LoRA(rank=rank), at=["query", "value"])
    history = own.fit(loader(), train="m", lr=lr, seed=seed, progress=False, **FIT)
    return history.evaluations[-1]["loss"], history.losses[-1]


def test_modules_of_one_host_are_what_each_becomes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    fit = passes.fit_side_by_side

    def counted(host: Any, loaders: Any, **given: Any) -> Any:
        sizes.append(len(loaders))
        return fit(host, loaders, **given)

    monkeypatch.setattr(passes, "fit_side_by_side", counted)
    own = host()
    before = {k: v.clone() for k, v in own.state_dict().items()}
    settings = {"lr": [1e-2, 1e-3], "rank": [2, 4]}
    given = {"module": mg.LoRA, "at": ["query", "value"], "loader": loader(), **FIT}
    found = mg.sweep(own, settings, seeds=[0, 3], **given, **QUIET)
    assert sizes == [8]  # in one pass
    for row in found.rows:
        each = [alone(**row.settings, seed=seed) for seed in (0, 3)]
        assert row["loss"].values == pytest.approx([a for a, _ in each], rel=1e-7)
        assert row["training loss"].values == pytest.approx([b for _, b in each], rel=1e-7)
        assert len({*row["loss"].values}) == 2  # seeds differ
    assert not own.implants
    assert own.composition is None
    assert all(torch.equal(v, before[k]) for k, v in own.state_dict().items())
    sizes.clear()
    again = mg.sweep(own, settings, seeds=[0, 3], at_once=3, **given, **QUIET)
    assert sizes == [3, 3, 2]
    assert [r["loss"].mean for r in again.rows] == pytest.approx(
        [r["loss"].mean for r in found.rows]
    )


def test_settings_that_are_one_for_a_pass_make_several(tmp_path: Path) -> None:
    given = {"module": mg.LoRA(rank=2), "at": "query", "loader": loader(), "steps": 2}
    own = mg.Host(HOSTS["bert"].model())
    settings = {"precision": ["no", "bf16"], "lr": [1e-3]}
    found = mg.sweep(own, settings, seeds=[0], folder=tmp_path, **given, **QUIET)
    assert len(list((tmp_path / "passes").iterdir())) == 2
    assert found.names == ["training loss"]
    kinds = {"module": [mg.LoRA(rank=2), mg.Adapter(width=3)], "at": ["query"]}
    del given["module"], given["at"]
    found = mg.sweep(own, kinds, seeds=[0], **given, **QUIET)
    assert "Adapter(width=3)" in str(found)


@pytest.mark.filterwarnings("ignore:.*the others go on:UserWarning")
def test_a_module_that_diverges_or_is_not_defined_is_a_failure_and_the_others_go_on() -> None:
    own = mg.Host(HOSTS["bert"].model())
    given = {"loader": loader(), "steps": 4, "clip": None, "schedule": "constant"}
    settings = [
        {"module": mg.LoRA(rank=2), "at": "query", "lr": 1e-3},
        {"module": mg.LoRA(rank=2), "at": "query", "lr": 1e30},
        {"module": mg.LoRA(rank=2), "at": "nowhere", "lr": 1e-3},
    ]
    found = mg.sweep(own, settings, seeds=[0], errors="keep", **given, **QUIET)
    assert [row.failed for row in found.rows] == [False, True, True]
    assert "the loss is" in found.failed[0].error
    assert "nowhere" in found.failed[1].error
    assert not own.implants


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"loader": None}, "give loader="),
        ({"module": "lora"}, "give a module"),
        ({"q": 1}, "q= is no setting of LoRA and none of fit"),
        ({"accumulate": 2}, "accumulate=2"),
    ],
)
def test_modules_that_cannot_be_swept(given: dict[str, Any], words: str) -> None:
    call = {"module": mg.LoRA, "at": "query", "loader": loader(), "steps": 1, **given}
    with pytest.raises(mg.ModgraftError, match=words):
        mg.sweep(host(), {"rank": [1, 2]}, **call, **QUIET)


def test_a_folder_of_modules_is_refused_with_other_data_or_another_host(tmp_path: Path) -> None:
    call: dict[str, Any] = {"module": mg.LoRA, "at": "query", "steps": 1, "seeds": [0], **QUIET}
    mg.sweep(host(), {"rank": [1]}, loader=loader(), folder=tmp_path, **call)
    with pytest.raises(CheckpointError, match=r"holds another run, no such sweep \(loader: "):
        mg.sweep(host(), {"rank": [1]}, loader=loader(seed=5), folder=tmp_path, **call)
    other = host()
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="host's weights: "):
        mg.sweep(other, {"rank": [1]}, loader=loader(), folder=tmp_path, **call)
