"""Routers that learn inside a host: they recover what is right, and balance prevents collapse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import modgraft as mg
from kinds import CONTENT, Tagger, batches, host_of, routings

KINDS = 3

# the router, and how many modules are right for a kind
ROUTERS = {
    "soft": (lambda **own: mg.Soft(**own), 1),
    "gumbel": (lambda **own: mg.Top1(estimator="gumbel", **own), 1),
    "reinforce": (lambda **own: mg.Top1(estimator="reinforce", **own), 1),
    "epsilon": (lambda **own: mg.Top1(estimator="epsilon", epsilon=0.3, **own), 1),
    "top 1 of k": (lambda **own: mg.TopK(1, **own), 1),
    "top 2": (lambda **own: mg.TopK(2, **own), 2),
    "threshold": (lambda **own: mg.Threshold(0.4, **own), 1),
    "threshold, two": (lambda **own: mg.Threshold(0.4, **own), 2),
    "noisy top 2": (lambda **own: mg.NoisyTopK(2, **own), 2),
    "skills": (lambda **own: mg.SkillMatrix(**own), 1),
    "skills, two": (lambda **own: mg.SkillMatrix(**own), 2),
}
CASES = [
    (name, level)
    for name in ROUTERS
    for level in ("task", "example", "token")
    if level == "task" or "skills" not in name
]


def taught(host: mg.Host, loader: list[dict[str, Any]], lr: float, train: Any = "m") -> None:
    """Train the router alone, a step a batch."""
    host.train()
    with host.training_only(train):
        optimiser = torch.optim.Adam([p for p in host.parameters() if p.requires_grad], lr=lr)
        for batch in loader:
            optimiser.zero_grad()
            host(**batch).loss.backward()
            optimiser.step()


def recovered(host: mg.Host, level: str, each: int) -> float:
    """The share of new examples (tokens, tasks) whose right modules act, and no others."""
    right = total = 0
    for batch in batches(KINDS, level, KINDS, seed=99, rows=64):
        (routing,) = routings(host, batch)
        chosen = routing.weights > 0.5 / each  # [N], [B, N] or [B, n, N]
        kind = batch["input_ids"] // CONTENT  # [B, n]
        kind = {"task": kind[0, 0], "example": kind[:, 0], "token": kind}[level]
        wanted = torch.arange(KINDS * each) // each == kind[..., None]
        right += int((chosen == wanted).all(-1).sum())
        total += kind.numel()
    return right / total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "level"), CASES)
def test_the_right_modules_are_found(name: str, level: str, seed: int) -> None:
    make, each = ROUTERS[name]
    torch.manual_seed(seed)
    host, names = host_of(KINDS, each)
    tasks = {"tasks": tuple(f"k{k}" for k in range(KINDS))} if level == "task" else {}
    router = make(level=level, **tasks)
    host.implant("m", mg.Mixture(names, router=router), active=level != "task")
    taught(host, batches(KINDS, level, 100, seed), lr=0.1)
    assert recovered(host, level, each) >= 0.95


@pytest.mark.parametrize("seed", range(3))
def test_balance_losses_prevent_a_collapse_inside_a_host(seed: int) -> None:
    """Four modules that could all do the same, one a little ahead: it takes everything, or not."""
    names = [f"m{j}" for j in range(4)]
    found = {}
    for balanced in (False, True):
        torch.manual_seed(seed)
        host = mg.Host(Tagger(1)).eval()
        for name in names:
            host.implant(name, mg.LoRA(rank=4), "read", active=False)
        ahead = [{**b, "modules": "m0"} for b in batches(1, "example", 30, seed + 50)]
        taught(host, ahead, lr=0.1, train="m0")
        weight: dict[str, Any] = {} if balanced else {"importance": 0.0, "load": 0.0}
        host.implant("m", mg.Mixture(names, router=mg.NoisyTopK(2, **weight)))
        taught(host, batches(1, "example", 150, seed), lr=0.1, train=["m", *names])
        host.eval()
        place: Any = host["m"].places[0]
        place.counter.reset()  # of what training chose
        with torch.no_grad():
            for batch in batches(1, "example", 4, 77):
                host(**batch)
        (found[balanced],) = host["m"].stats()
    without, kept = found[False], found[True]
    assert without.collapsed
    assert without.dead
    assert without.spread < 0.3  # of 2 bits
    assert not kept.collapsed
    assert not kept.dead
    assert kept.spread > 1.9


def gradients(router: Any, level: str, times: int, chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of E[L] in a host: enumerated; the mean of sampled ones; and its standard error; flat.

    ``times`` copies of six examples a call, ``chunks`` calls, the baseline running along.
    """
    torch.manual_seed(0)
    host, names = host_of(KINDS, strength=2.0)
    host.double()
    host.implant("m", mg.Mixture(names, router=router))
    place: Any = host["m"].places[0]
    with torch.no_grad():
        for p in place.route.parameters():
            p.normal_(0, 0.7)
    (batch,) = batches(KINDS, level, 1, seed=1, rows=6)
    table: Any = host.model.get_submodule("words")
    query = table(batch["input_ids"])  # [6, n, d]
    query = query if level == "token" else query.mean(1)
    chances = place.route.logits(query).softmax(-1)  # [6, N] or [6, n, N]
    with torch.no_grad():
        each = []
        for name in names:
            logits = host(input_ids=batch["input_ids"], modules=name).logits
            logits = logits if level == "token" else logits[:, 0]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, -2), batch["labels"].flatten(), reduction="none"
            )
            each.append(loss.view(batch["labels"].shape))
    expected = (chances * torch.stack(each, -1)).sum(-1).mean()
    own = list(place.route.parameters())
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(expected, own)])
    many = {key: value.repeat(times, *[1] * (value.dim() - 1)) for key, value in batch.items()}
    host.train()
    seen = []
    for _ in range(chunks):
        drawn = torch.autograd.grad(host(**many).loss, own)
        seen.append(torch.cat([g.flatten() for g in drawn]))
    sampled = torch.stack(seen)  # [chunks, parameters]
    return exact, sampled.mean(0), sampled.std(0) / chunks**0.5


@pytest.mark.parametrize("level", ["example", "token"])
@pytest.mark.parametrize("estimator", ["reinforce", "epsilon"])
def test_sampled_choices_have_the_gradient_of_the_expected_loss(estimator: str, level: str) -> None:
    router = mg.Top1(estimator=estimator, epsilon=0.4, level=level)  # type: ignore[arg-type]
    exact, mean, error = gradients(router, level, times=50, chunks=100)
    assert ((mean - exact).abs() <= 4 * error + 1e-12).all()
    assert error.norm() < 0.1 * exact.norm()  # so that a wrong one would show


@pytest.mark.parametrize("level", ["example", "token"])
def test_straight_through_gumbel_is_biased_and_how_much(level: str) -> None:
    """Its error, as a share of the exact gradient's norm: 0.29 and 0.36 (by example, by token) at
    τ = 1, 0.07 and 0.10 at τ = 0.2, where the noise of this test is 0.03.
    """
    far = {}
    for tau in (1.0, 0.2):
        router = mg.Top1(temperature=tau, level=level)  # type: ignore[arg-type]
        exact, mean, error = gradients(router, level, times=50, chunks=100)
        far[tau] = float((mean - exact).norm() / exact.norm())
        assert error.norm() < 0.05 * exact.norm()
    assert 0.2 < far[1.0] < 0.45
    assert far[0.2] < 0.15
