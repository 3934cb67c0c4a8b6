"""`mg.ladder`: the known rung is chosen, by the same candidates each time, killed or not."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ladder_hosts import ALL, FULL, GIVEN, NOTHING, climb, host, loader, lora, right
from torch import Tensor

import modgraft as mg
from modgraft.core.errors import CheckpointError, DataError, UnknownNameError
from modgraft.recipes.ladder.climb import measured
from modgraft.recipes.ladder.lines import Costs, Line, Score, choose
from modgraft.recipes.ladder.result import Ladder, read_ladder
from modgraft.recipes.ladder.rungs import RUNGS, rungs_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ladder that was climbed."""
    folder = tmp_path_factory.mktemp("ladder") / "run"
    climb(folder=folder)
    return folder


@pytest.fixture(scope="module")
def found(home: Path) -> Ladder:
    return read_ladder(home)


def without_seconds(ladder: Ladder) -> list[Any]:
    return [
        (line.name, line.costs, line.left_out, [replace(s, seconds=0.0) for s in line.scores])
        for line in ladder.lines
    ]


def test_the_least_change_that_is_enough_is_chosen(found: Ladder) -> None:
    """A head alone cannot know one of the two signs; rank 1 is enough."""
    assert found.choice == "lora_1"
    nothing, one = found["nothing"].best, found["lora_1"].best
    assert nothing is not None
    assert one is not None
    assert nothing.quality < 0.6 < 0.9 < one.quality
    assert found.test is not None
    assert abs(found.test[0] - one.quality) < 0.1
    assert one.rate == 1e-1  # the better of its two


def test_a_head_alone_is_chosen_where_it_is_enough() -> None:
    """The same, where the class is the one sign that the frozen layer lets through."""

    def easy(rows: Any) -> list[dict[str, Tensor]]:
        return [{"x": b["x"], "labels": 2 * (b["x"][:, 0] > 0).long()} for b in rows]

    def evaluate(tried: mg.Host) -> Tensor:
        (batch,) = easy([{"x": torch.randn(200, 8, generator=torch.Generator().manual_seed(1))}])
        return (tried(x=batch["x"]).logits.argmax(-1) == batch["labels"]).float()

    given = {**GIVEN, "evaluate": evaluate, "test": None, "rungs": (NOTHING, lora(4))}
    easier = mg.ladder(host(), easy(loader()), **{**given, "steps": 60, "keep": 2})
    assert easier.choice == "nothing"
    assert easier.test is None


def test_costs_are_counted(found: Ladder, home: Path) -> None:
    head, of = 8 * 4 + 4, {line.name: line.costs for line in found.lines}
    assert [c.parameters for c in of.values() if c] == [head, head + 16, head + 64, head + 72]
    for costs in of.values():
        assert costs is not None
        assert costs.bytes >= 4 * costs.parameters
        assert costs.memory > 4 * (head + 72)  # at least the weights
    saved = sum(p.stat().st_size for p in (home / "module").glob("*.safetensors"))
    assert of["lora_1"] is not None
    assert of["lora_1"].bytes < saved < of["lora_1"].bytes + 8192  # and the card


def test_it_takes_the_steps_that_it_plans(found: Ladder, home: Path) -> None:
    assert found.taken == 6 * 40 + 3 * 80
    steps = {
        path.parent.name: path.read_text().count('"train"')
        for path in (home / "fits").glob("*/metrics.jsonl")
    }
    assert sorted(steps.values()) == [40, 40, 40, 120, 120, 120]
    assert sum(steps.values()) == found.taken
    assert {n for n, s in steps.items() if s == 120} == {
        f"{line.name},lr={line.best.rate:g}" for line in found.finalists if line.best
    }


def test_who_goes_on_has_what_one_training_gives(found: Ladder, home: Path) -> None:
    """Halved, stopped and resumed, or trained in one go: to the same bit."""
    line = found["lora_1"]
    assert line.best is not None
    own = host()
    ALL[1].implant(own, 0)
    own.fit(
        loader(), train=["lora_1", "host.head"], steps=120, lr=line.best.rate, progress=False
    )  # fmt: skip
    assert measured(right(1), own, 0) == (line.best.quality, line.best.error)
    assert measured(right(2), own, 0) == found.test
    again = host()
    again.load(home / "module")
    trained = dict(own.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in again.named_parameters())


def test_a_second_run_chooses_the_same_and_a_third_call_trains_nothing(
    found: Ladder, home: Path, tmp_path: Path
) -> None:
    second = climb(folder=tmp_path / "again")
    assert second.choice == found.choice
    assert without_seconds(second) == without_seconds(found)
    before = {p: p.stat().st_mtime_ns for p in (home / "fits").rglob("*")}
    third = climb(folder=home)
    assert third == found
    assert {p: p.stat().st_mtime_ns for p in (home / "fits").rglob("*")} == before


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("after", [0, 3, 7])
def test_killed_and_called_again_it_is_what_it_would_have_been(
    after: int, found: Ladder, tmp_path: Path
) -> None:
    """It kills itself as it measures a candidate: in the first round, or the last, or for good."""
    calls = 0

    def dies(tried: mg.Host) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(1)(tried)

    if (child := os.fork()) == 0:
        climb(folder=tmp_path, evaluate=dies)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    again = climb(folder=tmp_path)
    assert without_seconds(again) == without_seconds(found)
    assert (again.choice, again.test, again.taken) == (found.choice, found.test, found.taken)


def test_what_is_shown(found: Ladder, home: Path) -> None:
    text = str(found)
    assert "Take LoRA 1: " in text
    assert "of those within one standard error of the best" in text
    assert "On the test examples, looked at once: " in text
    assert "at the edge of those that were tried" in text
    assert (home / "table.md").read_text().count("\n| ") == len(ALL) + 1
    assert (home / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert found.choice in found.frontier("parameters")
    note = (home / "note.md").read_text()
    assert "return(ladder) -> Take LoRA 1" in note
    assert "<table>" in found._repr_html_()
    with pytest.raises(UnknownNameError, match="no rung is named 'lora_2'"):
        found["lora_2"]


def test_a_budget_leaves_rungs_out_and_says_why() -> None:
    small = climb(parameters=60, rungs=(NOTHING, lora(1), FULL), steps=6)
    assert small["full"].left_out == "parameters: 108, of 60 at most"
    assert small["full"].best is None
    assert "parameters: 108, of 60 at most" in str(small)
    assert {line.name for line in small.finalists} == {"nothing", "lora_1"}


def test_a_budget_that_is_too_small_says_the_least_that_one_needs(tmp_path: Path) -> None:
    with pytest.raises(mg.ModgraftError, match="parameters=10 is too small") as error:
        climb(parameters=10, folder=tmp_path)
    assert "Nothing, which needs the least, takes 36 trained parameters" in str(error.value)
    assert "Give parameters=36 or more" in str(error.value)
    with pytest.raises(mg.ModgraftError, match="memory=1000 is too small") as error:
        climb(memory=1000, folder=tmp_path)
    assert not any(tmp_path.iterdir())
    least = int(str(error.value).split("memory=")[-1].split()[0])
    assert climb(memory=least, folder=tmp_path, steps=3).choice == "nothing"


def test_a_rate_that_diverges_and_a_rung_that_is_not_defined_are_named() -> None:
    wild = replace(lora(1, 1e-1, 1e30), title="Wild")
    nowhere = mg.Rung("away", "Away", (1e-2,), ((mg.LoRA(1), "nowhere"),))
    given = {"rungs": (NOTHING, wild, nowhere), "steps": 9, "clip": None}
    mixed = climb(**given)
    assert mixed["away"].left_out.startswith("SiteError")
    assert mixed["away"].costs is None
    assert mixed["lora_1"].best is not None
    text = str(mixed)
    assert "Wild, failed: lr=1e+30, ModgraftError: step" in text


def test_measures(tmp_path: Path) -> None:
    own = host()
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0])
    mean, error = measured(lambda _: scores, own, 0)
    assert (mean, error) == (0.75, pytest.approx(0.25))
    assert measured(lambda _: 0.5, own, 0) == (0.5, None)
    batches = list(loader())[:3]
    mean, error = measured(batches, own, 0)
    with torch.no_grad():
        losses = torch.stack([own(**batch).loss for batch in batches]).double()
    assert mean == pytest.approx(-float(losses.mean()))
    assert error == pytest.approx(float(losses.std()) / 3**0.5)
    for bad in ({"accuracy": 1.0}, [], [float("nan")]):
        with pytest.raises(mg.ModgraftError, match="evaluate returned"):
            measured(lambda _, bad=bad: bad, own, 0)
    assert own.training is True


def line(name: str, parameters: int, quality: float, error: float | None = 0.1) -> Line:
    score = Score(1e-3, 9, quality, error, 1.0)
    return Line(name, name, Costs(parameters, parameters, parameters), scores=(score,))


def test_the_choice_is_the_cheapest_within_one_standard_error() -> None:
    lines = [line("a", 0, 0.5), line("b", 10, 0.85), line("c", 20, 0.8), line("d", 30, 0.9)]
    assert choose(lines, "parameters", None).name == "b"
    assert choose(lines, "parameters", 0.0).name == "d"
    assert choose(lines, "parameters", 0.5).name == "a"
    alone = [line("a", 0, 0.89, None), line("b", 10, 0.9, None)]
    assert choose(alone, "parameters", None).name == "b"  # no error is known
    even = [line("a", 5, 0.8), line("b", 5, 0.85), line("c", 6, 0.9)]
    assert choose(even, "bytes", None).name == "b"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": 1e-3}, r"ladder\(lr=…\) is no setting of it"),
        ({"epochs": 3}, r"ladder\(epochs=…\)"),
        ({"q": 3}, r"ladder\(q=…\)"),
        ({"by": "seconds"}, "it must be one of parameters, bytes, memory"),
        ({"steps": 0}, "steps=0: it must be a whole number"),
        ({"eta": 1}, "eta=1"),
        ({"rungs": ["lora_3"]}, "no rung is named 'lora_3'; there are"),
        ({"rungs": []}, "give rungs with a name of their own each"),
        ({"rungs": [NOTHING, NOTHING]}, "give rungs with a name of their own each"),
        ({"beside": "host.nothing"}, "nothing"),
    ],
)
def test_what_means_nothing_is_refused(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(mg.ModgraftError, match=words):
        climb(folder=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_ladder_is_refused(home: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(home, tmp_path / "run")
    with pytest.raises(CheckpointError, match="steps: 120, now 90"):
        climb(folder=copied, steps=90)
    with pytest.raises(CheckpointError, match="seed: 0, now 1"):
        climb(folder=copied, seed=1)
    with pytest.raises(CheckpointError, match=r"no such ladder \(data: "):
        mg.ladder(host(), loader(5), folder=copied, **GIVEN)
    (copied / "results.json").write_text('{"lines": 3}')
    with pytest.raises(DataError, match="lacks 'choice'"):
        climb(folder=copied)
    assert climb(folder=copied, rungs=(NOTHING,), steps=2, fresh=True).choice == "nothing"


def test_the_librarys_rungs_train_in_a_real_host() -> None:
    """Each of them in a small BERT, where one is trained in two phases, and nothing is left out."""
    from contract.hosts import HOSTS

    bert = mg.Host(HOSTS["bert"].model())
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 41, (4, 7), generator=g) for _ in range(6)]
    batches = [{"input_ids": row, "labels": row} for row in ids]
    few = [replace(rung, rates=rung.rates[:1]) for rung in RUNGS]
    before = {name: t.clone() for name, t in bert.state_dict().items()}
    given: dict[str, Any] = {"evaluate": batches[4:], "steps": 8, "eta": 2, "progress": False}
    real = mg.ladder(bert, batches[:4], rungs=few, **given)
    assert [line.name for line in real.lines] == [rung.name for rung in RUNGS]
    assert not [line.left_out for line in real.lines if line.left_out]
    assert not [line.failed for line in real.lines if line.failed]
    costs = {line.name: line.costs for line in real.lines if line.costs}
    assert costs["nothing"].parameters == 0  # there is no head beside it
    assert costs["lora_1"].parameters < costs["lora_16"].parameters < costs["full"].parameters
    weights = sum(t.numel() for t in bert.model.parameters())
    assert costs["full"].parameters == weights
    assert all(torch.equal(t, before[name]) for name, t in bert.state_dict().items())
    assert not bert.implants


def test_rungs_by_name() -> None:
    assert rungs_of(None) == RUNGS
    assert [rung.name for rung in rungs_of(["full", NOTHING])] == ["full", "nothing"]
    assert [rung.name for rung in RUNGS] == [
        "nothing", "prompt", "prefix", "rescale", "lora_1", "lora_2", "lora_4", "lora_8",
        "lora_16", "adapter", "sparse", "full",
    ]  # fmt: skip
