"""Continual learning: one module for all tasks forgets, a module for each task does not."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import modgraft as mg
from contract.hosts import HOSTS
from modgraft.report import continual_figure, continual_table
from modgraft.training.procedures.continual import Continual

QUIET: dict[str, Any] = {"progress": False}
TASKS = ("one", "two", "three")


def batches(task: str, seed: int = 0) -> list[dict[str, Tensor]]:
    """Make a task's batches: the texts are the same, the labels are tokens plus 1, 2 or 3."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 8, (4, 8, 6), generator=g)
    return [{"input_ids": own, "labels": own + 1 + TASKS.index(task)} for own in ids]


def accuracy(host: mg.Host, task: str) -> float:
    assert not host.training
    (batch, *_) = batches(task, seed=1)
    answers = host(input_ids=batch["input_ids"]).logits.argmax(-1)
    return float((answers == batch["labels"]).double().mean())


def host_of(kind: str = "bert") -> mg.Host:
    return mg.Host(HOSTS[kind].model())


GIVEN: dict[str, Any] = {"steps": 60, "lr": 3e-2, **QUIET}
LOADERS = {task: batches(task) for task in TASKS}
ALL = ["query", "value", "output", "up", "down"]
EACH: dict[str, Any] = {"module": mg.LoRA(rank=8), "at": ALL}


def test_a_module_each_forgets_nothing_and_one_module_does() -> None:
    each, one = host_of(), host_of()
    separate = mg.continual(each, LOADERS, accuracy, **EACH, **GIVEN)
    one.implant("shared", mg.LoRA(rank=8), ALL, active=False)
    shared = mg.continual(one, LOADERS, accuracy, into="shared", **GIVEN)
    assert separate.accuracy > 0.9
    assert separate.forgetting == separate.backward_transfer == 0.0
    for j, task in enumerate(TASKS):  # exactly: from the moment it was learned nothing moves it
        assert len({row[j] for row in separate.matrix[j:]}) == 1
        assert {row[j] for row in separate.matrix[:j]} | {separate.start[j]} == {separate.start[j]}
        assert separate.histories[task].stopped == "steps"
    assert shared.matrix[0][0] > 0.9
    assert shared.forgetting > 0.5
    assert shared.backward_transfer < -0.5
    assert one.composition is None
    assert each.composition is None


def test_old_tasks_stay_as_they_are_bit_for_bit() -> None:
    host = host_of("t5")
    ids = batches("one")[0]["input_ids"]
    seen: dict[str, list[Tensor]] = {task: [] for task in TASKS}

    def measure(host: mg.Host, task: str) -> float:
        seen[task].append(host(input_ids=ids, labels=ids).logits)
        return 0.0

    mg.continual(host, LOADERS, measure, module=mg.LoRA(rank=2), at=["query", "value"],
                 steps=3, lr=1e-2, **QUIET)  # fmt: skip
    for j, task in enumerate(TASKS):  # before any, then after each
        before, after = seen[task][: j + 1], seen[task][j + 1 :]
        assert all(torch.equal(out, before[0]) for out in before)
        assert all(torch.equal(out, after[0]) for out in after)
        assert not torch.equal(before[0], after[0])


def test_all_tasks_into_the_host_itself() -> None:
    host = host_of()
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    record = mg.continual(host, LOADERS, accuracy, into="host", **{**GIVEN, "lr": 3e-3})
    assert record.matrix[0][0] > record.start[0]
    assert any(not torch.equal(v, before[k]) for k, v in host.model.state_dict().items())
    assert not any(p.requires_grad for p in host.model.parameters())


class StopError(Exception):
    pass


@pytest.mark.parametrize("into", [None, "shared"])
def test_it_goes_on_where_it_was(tmp_path: Any, into: str | None) -> None:
    def go(folder: Any, loaders: dict[str, Any]) -> tuple[mg.Host, Continual]:
        host = host_of()
        given: dict[str, Any] = dict(EACH)
        if into is not None:
            host.implant("shared", mg.LoRA(rank=8), ALL, active=False)
            given = {"into": into}
        more = {**GIVEN, "steps": 6, "save_every": 2}
        return host, mg.continual(host, loaders, accuracy, folder=folder, **given, **more)

    class Broken(list):
        def __iter__(self) -> Any:
            yield from list(super().__iter__())[:3]
            raise StopError

    whole, wanted = go(tmp_path / "whole", LOADERS)
    with pytest.raises(StopError):
        go(tmp_path / "parts", {**LOADERS, "two": Broken(LOADERS["two"])})
    torch.rand(7)
    parts, found = go(tmp_path / "parts", LOADERS)
    assert (found.start, found.matrix) == (wanted.start, wanted.matrix)
    assert found.histories["two"].resumed_from == 2
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


R = ((0.9, 0.2, 0.1), (0.7, 0.8, 0.3), (0.5, 0.85, 0.6))
RECORD = Continual(TASKS, (0.1, 0.1, 0.1), R, {})


def test_the_measures_are_those_of_the_papers() -> None:
    assert RECORD.accuracy == pytest.approx((0.5 + 0.85 + 0.6) / 3)
    assert RECORD.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.85 - 0.8)) / 2)
    assert RECORD.forward_transfer == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)
    assert RECORD.forgetting == pytest.approx(((0.9 - 0.5) + (0.8 - 0.85)) / 2)
    alone = Continual(("one",), (0.1,), ((0.9,),), {})
    assert alone.accuracy == 0.9
    assert math.isnan(alone.forgetting)
    assert math.isnan(alone.backward_transfer)


def test_it_is_shown() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(continual_table(RECORD))
    rows = [line.split() for line in console.export_text(clear=False).splitlines()]
    assert ["three", "50.0", "85.0", "60.0", "65.0"] in rows
    assert "forgetting 17.5, backward transfer -17.5, forward transfer +15.0" in (
        " ".join(console.export_text().split())
    )
    picture = continual_figure({"a module each": RECORD, "one module": RECORD})
    assert picture.dark is not None
    for png in (picture.light, picture.dark):
        assert len(Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24) or []) > 50
    assert picture.alt.startswith("Accuracy on one, two, three after each: a module each forgets")
    with pytest.raises(mg.ModgraftError, match="of the same tasks"):
        continual_figure({})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of them"),
        ({**EACH, "into": "shared"}, "give one of them"),
        ({**EACH, "loaders": {}}, "a loader for each task"),
        ({"into": "shraed"}, "did you mean 'shared'"),
        ({"into": "many"}, "'many' has tasks of its own"),
        ({**EACH, "loaders": {"a task": LOADERS["one"]}}, "'a task'"),
        ({**EACH, "loaders": {"shared": LOADERS["one"]}}, "'shared' is to add a module"),
        ({**EACH, "measure": lambda host, task: math.nan}, r"measure\(host, 'one'\) gave nan"),
    ],
)
def test_what_means_nothing_is_refused(given: dict[str, Any], message: str) -> None:
    host = host_of()
    host.implant("shared", mg.LoRA(rank=1), "query", active=False)
    host.implant("many", mg.HyperNetwork(mg.LoRA(rank=1), tasks=("a", "b")), "query", active=False)
    given = {"loaders": LOADERS, "measure": accuracy, **given}
    loaders, measure = given.pop("loaders"), given.pop("measure")
    with pytest.raises(mg.ModgraftError, match=message):
        mg.continual(host, loaders, measure, **given, steps=1, **QUIET)
    assert list(host.implants) == ["shared", "many"]
