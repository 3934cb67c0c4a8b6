"""Multitask training: how tasks are drawn and mixed, and the loss recorded for each."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import modgraft as mg
import modgraft.training.progress as progress
from contract.hosts import HOSTS
from modgraft.training.stream import Stream

SIZES = {"fr": 12, "de": 6, "it": 2}
QUIET: dict[str, Any] = {"progress": False}


def rows(task: str, count: int) -> list[dict[str, Tensor]]:
    """Make texts of a length that depends on the task, without padding."""
    g = torch.Generator().manual_seed(ord(task[0]))
    ids = torch.randint(3, 41, (count, 4 + ord(task[0]) % 3), generator=g)
    return [{"input_ids": own, "labels": own} for own in ids]


def loaders(batch: int = 2) -> dict[str, Any]:
    return {
        task: DataLoader(rows(task, batch * size), batch_size=batch, shuffle=True)  # type: ignore[arg-type]
        for task, size in SIZES.items()
    }


def host_of(kind: str = "gpt2", dropout: bool = False) -> mg.Host:
    host = mg.Host(HOSTS[kind].model().double())
    torch.manual_seed(1)
    for name in ("shared", *SIZES):
        host.implant(name, mg.LoRA(rank=2), ["query", "value"], active=False)
    for part in host.modules():
        if dropout and isinstance(part, torch.nn.Dropout):
            part.p = 0.2
    return host


def same(a: mg.Host, b: mg.Host, tolerance: float = 0.0) -> None:
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("sampling", "tau"), [("proportional", 1.0), ("equal", math.inf), (2.0, 2.0), (0.5, 0.5)]
)
def test_tasks_are_drawn_by_their_size_and_a_temperature(sampling: Any, tau: float) -> None:
    batch = next(iter(loaders()["fr"]))
    data = {task: [batch] * size for task, size in SIZES.items()}
    tasks = mg.Tasks(data, sampling=sampling, mix=5, length=120)
    total = sum(n ** (1 / tau) for n in SIZES.values())
    wanted = {task: n ** (1 / tau) / total for task, n in SIZES.items()}
    assert tasks.shares == pytest.approx(wanted)
    found = Counter(name for batch in tasks for name in batch["parts"].names)
    for task, share in wanted.items():  # four standard errors of 600 draws
        assert abs(found[task] / 600 - share) < 4 * math.sqrt(share * (1 - share) / 600)


def test_an_epoch_draws_as_many_as_there_are() -> None:
    tasks = mg.Tasks(loaders(), mix=3)
    assert len(tasks) == len(list(tasks)) == 7  # ⌈20 / 3⌉
    batch = next(iter(tasks))
    assert batch["input_ids"].shape[0] == len(batch["modules"]) == 6
    assert batch["modules"] == [n for n in batch["parts"].names for _ in range(2)]


def test_no_example_is_drawn_twice_before_all_of_its_task_were() -> None:
    tasks = mg.Tasks(loaders(1), mix=1, length=60)
    seen: dict[str, list[tuple]] = {task: [] for task in SIZES}
    for batch in tasks:
        seen[batch["parts"].names[0]].append(tuple(batch["input_ids"][0].tolist()))
    for task, size in SIZES.items():
        whole = len(seen[task]) // size
        for i in range(whole):
            assert len(set(seen[task][i * size : (i + 1) * size])) == size
    assert seen["it"][:2] != seen["it"][2:4] or seen["it"][2:4] != seen["it"][4:6]


def test_it_is_read_again_from_anywhere() -> None:
    tasks = mg.Tasks(loaders(), mix=2)

    def ids(epoch: int, start: int) -> list[Tensor]:
        return [b["input_ids"] for b in Stream(tasks, seed=3).read(epoch, start)]

    whole = ids(1, 0)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], ids(1, 4), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole, ids(2, 0), strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_mixed_batch_is_its_draws_accumulated(kind: str) -> None:
    """Long and short texts count alike; results are equal up to rounding in float64."""
    names = [*SIZES, "shared"]
    modules = {task: f"shared >> {task}" for task in SIZES}
    given: dict[str, Any] = {"modules": modules, "sampling": 3.0}
    fit: dict[str, Any] = {"train": names, "steps": 5, "lr": 1e-2, **QUIET}
    mixed, summed = host_of(kind), host_of(kind)
    one = mixed.fit(mg.Tasks(loaders(), mix=4, length=40, **given), **fit)
    two = summed.fit(mg.Tasks(loaders(), mix=1, length=160, **given), accumulate=4, **fit)
    near = 1e-6 if kind == "gpt2" else 1e-9  # whose loss transformers takes in float32
    assert one.losses == pytest.approx(two.losses, rel=near)
    for a, b in zip(one.parts, two.parts, strict=True):
        assert a == pytest.approx(b, rel=near)
    same(mixed, summed, 1e-7)


def test_the_loss_of_each_task_is_written_and_shown(
    tmp_path: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    host = host_of()
    history = host.fit(
        mg.Tasks(loaders(), mix=6, sampling="equal"), train=list(SIZES), steps=4, folder=tmp_path
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["parts"] for line in lines] == history.parts
    assert set().union(*history.parts) == set(SIZES)
    shown = capsys.readouterr().err
    assert "step 1/4  loss " in shown
    assert all(f"  {task} " in shown for task in SIZES)
    bare = host_of()
    alone = next(iter(islice(Stream(mg.Tasks(loaders(), mix=6, sampling="equal")).read(0), 1)))
    losses = []
    for i, name in enumerate(alone["parts"].names):
        part = slice(2 * i, 2 * i + 2)
        keep = {k: alone[k][part] for k in ("input_ids", "labels", "attention_mask") if k in alone}
        losses.append(bare(**keep, modules=name).loss.item())
    assert history.losses[0] == pytest.approx(sum(losses) / 6, rel=1e-6)


def test_each_task_is_measured() -> None:
    host, held = host_of("bert"), {task: rows_of(task) for task in SIZES}
    given: dict[str, Any] = {"train": list(SIZES), "steps": 2, "lr": 1e-2, **QUIET}
    history = host.fit(
        mg.Tasks(loaders()), evaluate=mg.Tasks(held, modules={t: f"shared >> {t}" for t in SIZES}),
        monitor="loss.de", **given,
    )  # fmt: skip
    (measured,) = history.evaluations
    host.eval()
    with torch.no_grad():
        own = {
            task: sum(host(**b, modules=f"shared >> {task}").loss.item() for b in some) / len(some)
            for task, some in held.items()
        }
    assert {task: measured[f"loss.{task}"] for task in SIZES} == pytest.approx(own)
    assert measured["loss"] == pytest.approx(sum(own.values()) / 3)
    assert history.best == measured


class StopError(Exception):
    pass


def test_it_goes_on_to_the_same_bits(tmp_path: Any) -> None:
    """The run is killed in the middle of an epoch; the host has dropout."""

    class Stopping:
        """Give the same batches, then raise an error."""

        def __init__(self, tasks: mg.Tasks) -> None:
            self.tasks = tasks

        def __len__(self) -> int:
            return len(self.tasks)

        def __iter__(self) -> Any:
            yield from islice(iter(self.tasks), 6)
            raise StopError

    def tasks() -> mg.Tasks:
        return mg.Tasks(loaders(), mix=2, sampling=2.0)

    given: dict[str, Any] = {
        "train": list(SIZES), "steps": 12, "lr": 1e-2, "save_every": 2, **QUIET
    }  # fmt: skip
    whole, parts = host_of(dropout=True), host_of(dropout=True)
    wanted = whole.fit(tasks(), **given)
    with pytest.raises(StopError):
        parts.fit(Stopping(tasks()), folder=tmp_path, **given)
    parts = host_of(dropout=True)
    found = parts.fit(tasks(), folder=tmp_path, **given)
    assert found.resumed_from == 6
    assert (found.losses, found.parts) == (wanted.losses, wanted.parts)
    same(whole, parts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loaders": {}}, "a loader for each task's name"),
        ({"sampling": "even"}, "sampling='even'.*'equal'"),
        ({"sampling": 0.0}, r"sampling=0\.0"),
        ({"sampling": math.nan}, "sampling=nan"),
        ({"mix": 0}, "mix=0"),
        ({"length": 0}, "length=0"),
        ({"modules": {"fr": "fr"}}, "modules= has fr, and the tasks are fr, de, it"),
        ({"loaders": {"fr": iter([])}}, "can be read only once"),
        ({"loaders": {"fr": []}}, "no batches"),
        ({"loaders": {"fr": map}}, "'fr' has no length.*sampling='equal', length"),
    ],
)
def test_what_means_nothing_is_refused(given: dict[str, Any], message: str) -> None:
    class Endless:
        def __iter__(self) -> Any:
            yield rows("fr", 1)[0]

    if given.get("loaders") == {"fr": map}:
        given = {"loaders": {"fr": Endless()}}
    with pytest.raises(mg.ModgraftError, match=message):
        mg.Tasks(**{"loaders": loaders(), **given})
    assert len(mg.Tasks({"fr": Endless()}, sampling="equal", length=3)) == 3


def test_a_host_without_the_module_says_so() -> None:
    host = mg.Host(HOSTS["gpt2"].model())
    host.implant("fr", mg.LoRA(rank=1), "query")
    with pytest.raises(mg.ModgraftError, match="no module 'de'"):
        host.fit(mg.Tasks({"de": rows_of("de")}), train="fr", steps=1, **QUIET)


def rows_of(task: str) -> list[dict[str, Tensor]]:
    return [{k: v[None] for k, v in row.items()} for row in rows(task, 4)]
