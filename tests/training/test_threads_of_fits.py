"""Fits in several threads: each of another host, with the numbers that it has alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import modgraft as mg
from modgraft.training.fit import fit
from training.tiny import Line, loader, points, t5

GIVEN = {"steps": 8, "lr": 1e-2, "progress": False, "evaluate_every": 3}


def trained(host: torch.nn.Module, seed: int) -> list[float]:
    history = fit(host, loader(), evaluate=loader(n=8), seed=seed, **GIVEN)
    return history.losses + [line["loss"] for line in history.evaluations]


def test_two_fits_draw_what_each_would_draw_alone() -> None:
    seeds = (1, 2, 3)
    alone = [trained(t5(dropout=0.5), seed) for seed in seeds]
    hosts = [t5(dropout=0.5) for _ in seeds]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(trained, hosts, seeds))
    assert together == alone
    assert torch.equal(torch.get_rng_state(), state)


def test_one_host_is_trained_by_one_thread() -> None:
    host = mg.Host(t5(dropout=0.0))
    for name in "ab":
        host.implant(name, mg.LoRA(rank=2), at="query", active=False)
    entered, go = threading.Event(), threading.Event()

    def wait(_: object) -> dict[str, float]:
        entered.set()
        go.wait(20)
        return {"loss": 1.0}

    host.use("a")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(
            lambda: host.fit(loader(), train="a", steps=1, evaluate=wait, progress=False)
        )
        entered.wait(20)
        learns = [p.requires_grad for p in host.parameters()]
        for train in ("b", None):
            with pytest.raises(mg.ModgraftError, match="being trained in another thread: wait"):
                host.fit(loader(), train=train, steps=1, progress=False)
        assert [p.requires_grad for p in host.parameters()] == learns
        go.set()
    with host.using("b"):
        host.fit(loader(), train="b", steps=1, progress=False)  # it is free again
    assert first.result().steps == [1]


def test_a_fit_within_a_fit_goes_on() -> None:
    inner = []

    def evaluate(host: torch.nn.Module) -> dict[str, float]:
        with torch.enable_grad():
            inner.append(fit(Line(), points(5), steps=2, progress=False).last)
        return {"loss": 1.0}

    outer = fit(Line(), points(5), steps=4, progress=False)
    nested = fit(Line(), points(5), steps=4, progress=False, evaluate=evaluate, evaluate_every=1)
    assert nested.losses == outer.losses
    assert len(inner) == 4
    assert len(set(inner)) == 1
