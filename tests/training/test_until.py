"""`until`: a call of `fit` ends after a step, and a later one goes on, to the same bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import loader, t5
from torch import Tensor, nn

import modgraft as mg
from modgraft.training.fit import fit

GIVEN: dict[str, Any] = {
    "steps": 12, "lr": 3e-3, "schedule": "cosine", "warmup": 3, "accumulate": 2, "save_every": 5,
    "evaluate_every": 4, "progress": False, "note": False,
}  # fmt: skip


def weights(host: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in host.parameters()]


def train(host: nn.Module, **more: Any) -> Any:
    return fit(host, loader(), evaluate=loader(n=8, noisy=False), **GIVEN, **more)


@pytest.mark.parametrize("stops", [(3, 7), (4, 5, 10), (1, 11), (5, 5)])
def test_in_parts_it_is_the_run_in_one(tmp_path: Path, stops: tuple[int, ...]) -> None:
    whole = t5()
    history = train(whole)
    for stop in stops:
        found = train(t5(), folder=tmp_path, until=stop)
        assert (found.stopped, found.steps[-1]) == ("until", stop)
    parts = t5()
    found = train(parts, folder=tmp_path)
    assert (found.stopped, found.losses) == ("steps", history.losses)
    for mine, its in zip(found.evaluations, history.evaluations, strict=True):
        assert (mine["step"], mine["loss"]) == (its["step"], its["loss"])
    assert all(map(torch.equal, weights(parts), weights(whole)))


def test_what_has_gone_further_is_left_where_it_is(tmp_path: Path) -> None:
    host = t5()
    train(host, folder=tmp_path, until=7)
    again = t5()
    found = train(again, folder=tmp_path, until=3)
    assert (found.stopped, found.steps[-1]) == ("until", 7)
    assert all(map(torch.equal, weights(again), weights(host)))


def test_a_step_that_is_none_is_refused() -> None:
    with pytest.raises(mg.ModgraftError, match="until=0: it must be at least 1"):
        train(t5(), until=0)
