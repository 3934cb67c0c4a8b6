"""Generators that samplers, data sets and hosts have of their own: a resumed run draws the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from modgraft.training.fit import fit
from modgraft.training.randomness import FEW, generators_in, seed_everything, set_states, states
from modgraft.training.stream import Stream, digest
from training.test_checkpoint import StopError, curve, same
from training.tiny import Line

GIVEN = {"steps": 14, "lr": 3e-3, "save_every": 3, "progress": False}
KINDS = {
    "random": lambda: random.Random(3),
    "numpy": lambda: np.random.default_rng(3),
    "RandomState": lambda: np.random.RandomState(3),
    "torch": lambda: torch.Generator().manual_seed(3),
    "Philox": lambda: np.random.Generator(np.random.Philox(3)),
}


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return float(generator.random())


class Box:
    """Holds a generator deep within."""

    def __init__(self, generator: Any) -> None:
        self.inner = {"parts": [None, (generator,)]}

    @property
    def generator(self) -> Any:
        return self.inner["parts"][1][0]


class Mixed(Sampler):
    def __init__(self, n: int, generator: Any) -> None:
        self.n, self.box = n, Box(generator)

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(range(self.n), key=lambda _: draw(self.box.generator)))


class Noisy(Dataset):
    def __init__(self, n: int, generator: Any) -> None:
        self.n, self.box = n, Box(generator)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x = torch.arange(3, dtype=torch.float64) + i + draw(self.box.generator)
        return {"x": x, "y": x.sum()}


class Endless(IterableDataset):
    def __init__(self, data: Noisy) -> None:
        self.data = data

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self.data[i] for i in range(len(self.data)))


def collate_with(generator: Any, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return {"x": batch["x"], "y": batch["y"] + draw(generator)}


def data(kind: str, shape: str) -> Any:
    make = KINDS[kind]
    rows = Noisy(15, make())
    collate = partial(collate_with, make())
    if shape == "indexed":
        return DataLoader(rows, 3, sampler=Mixed(15, make()), collate_fn=collate)
    return DataLoader(Endless(rows), 3, collate_fn=collate)


class Stopping(Line):
    """Fails at its n-th forward, and draws from a generator of its own."""

    def __init__(self, kind: str, at: int = -1) -> None:
        super().__init__()
        self.at, self.box = at, Box(KINDS[kind]())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        self.at -= 1
        if self.at == 0:
            raise StopError
        return super().forward(x, y + draw(self.box.generator))


@pytest.mark.parametrize("shape", ["indexed", "iterated"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(
    tmp_path: Path, kind: str, shape: str
) -> None:
    """It stops in the third epoch, and goes on with loader and host as a new process has them."""
    whole = Stopping(kind)
    history = fit(whole, data(kind, shape), folder=tmp_path / "whole", **GIVEN)
    with pytest.raises(StopError):
        fit(Stopping(kind, 13), data(kind, shape), folder=tmp_path / "parts", **GIVEN)
    parts = Stopping(kind)
    resumed = fit(parts, data(kind, shape), folder=tmp_path / "parts", **GIVEN)
    assert resumed.resumed_from == 12
    assert resumed.losses == history.losses
    assert len(set(history.losses)) == 14
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert same(whole, parts)


def test_an_evaluation_by_a_loader_with_a_generator_is_the_same_after_resuming(
    tmp_path: Path,
) -> None:
    given = {**GIVEN, "evaluate_every": 2}
    for name, stops in (("whole", (-1,)), ("parts", (9, -1))):
        for at in stops:
            held_out = data("numpy", "indexed")
            try:
                fit(
                    Stopping("random", at), data("random", "indexed"), evaluate=held_out,
                    folder=tmp_path / name, **given,
                )  # fmt: skip
            except StopError:
                continue
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_generators_are_left_as_they_were_found(kind: str) -> None:
    loader, host = data(kind, "indexed"), Stopping(kind)
    own = generators_in(loader, host)
    assert len(own) == 4
    after = [draw(g) for g in generators_in(data(kind, "indexed"), Stopping(kind))]
    fit(host, loader, **GIVEN)
    assert [draw(g) for g in own] == after


def test_where_generators_are_looked_for() -> None:
    one, two, three = random.Random(1), np.random.default_rng(1), torch.Generator()

    class Slots:
        __slots__ = ("kept",)

    slots = Slots()
    slots.kept = one
    assert generators_in(slots) == [one]
    assert {*generators_in(lambda: (two, three))} == {two, three}
    assert generators_in(Noisy(3, one).__getitem__, [one, {"a": (two,)}]) == [one, two]
    assert generators_in([one] * (FEW + 1), nn.Linear(2, 2), random, None, "text") == []
    assert generators_in(random.SystemRandom()) == []
    loop: list[Any] = [three]
    loop.append(loop)
    assert generators_in(loop) == [three]


def test_seeds_are_those_of_the_position_alone() -> None:
    own = [make() for make in KINDS.values()]
    seed_everything(0, "batch", 4, own=own)
    first, kept = [draw(g) for g in own], states(own)
    again = [draw(g) for g in own]
    seed_everything(0, "batch", 4, own=own)
    assert [draw(g) for g in own] == first
    assert len(set(first)) == len(first)
    set_states(kept, own)
    assert [draw(g) for g in own] == again


class Counting(Sampler):
    """Another order at every reading, of which no generator tells."""

    def __init__(self) -> None:
        self.times = 0

    def __len__(self) -> int:
        return 15

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        return iter([(i + self.times) % 15 for i in range(15)])


class Late(Noisy):
    """Makes its generator when it is first read."""

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if self.box.generator is None:
            self.box = Box(random.Random(3))
        return super().__getitem__(i)


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (
            lambda: DataLoader(Noisy(15, random.Random(3)), 3, sampler=Counting()),
            "the order of Counting is another one at every reading",
        ),
        (lambda: DataLoader(Late(15, None), 3), "a Late gives other rows at every reading"),
        (
            lambda: DataLoader(Noisy(15, random.Random(3)), 3, num_workers=1),
            "rows are drawn at random in 1 worker processes",
        ),
    ],
)
def test_a_run_that_cannot_be_resumed_to_the_bit_says_so(
    tmp_path: Path, loader: Any, words: str
) -> None:
    with pytest.warns(UserWarning, match=words):
        fit(Line(), loader(), folder=tmp_path, **{**GIVEN, "steps": 1})
    fit(Line(), loader(), **{**GIVEN, "steps": 1})  # nothing is kept that could be resumed


def test_workers_that_draw_nothing_are_no_matter() -> None:
    class Plain(Noisy):
        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            return {"x": torch.full((3,), float(i))}

    stream = Stream(DataLoader(Plain(15, None), 3, num_workers=2, shuffle=True))
    assert stream.unrepeatable(digest(stream.first())) == ""


def test_a_system_generator_is_told(tmp_path: Path) -> None:
    loader = DataLoader(Noisy(15, random.SystemRandom()), 3)
    with pytest.warns(UserWarning, match="other rows at every reading"):
        fit(Line(), loader, folder=tmp_path, **{**GIVEN, "steps": 2})


class Outside(Noisy):
    """Adds noise by a generator that nobody finds, from the second epoch on."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(i)
        return {k: v + _OUTSIDE.random() for k, v in row.items()} if self.epoch else row


_OUTSIDE = random.Random(3)


def test_a_resumed_run_says_that_it_reads_other_rows(tmp_path: Path) -> None:
    data = DataLoader(Outside(15, random.Random(3)), 3)
    line, count = Line(), 0

    def stops(*_: object) -> None:
        nonlocal count
        count += 1
        if count > 10:
            raise StopError

    handle = line.register_forward_pre_hook(stops)
    with pytest.raises(StopError):
        fit(line, data, folder=tmp_path, **{**GIVEN, "steps": 12})
    handle.remove()
    with pytest.warns(UserWarning, match="rows that were read before it stopped are others"):
        fit(
            Line(),
            DataLoader(Outside(15, random.Random(3)), 3),
            folder=tmp_path,
            **{**GIVEN, "steps": 12},
        )
