"""``host.plan(…)`` shows how each layer runs; stacked and cached tensors behave as it says."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import modgraft as mg
from contract.hosts import HOSTS, ids
from modgraft.engine.kernels.batched import Batched
from modgraft.engine.plan import Plan
from modgraft.engine.state import STATE


def made() -> mg.Host:
    torch.manual_seed(0)
    host = mg.Host(HOSTS["gpt2"].model()).eval()
    for i in range(3):
        host.implant(f"lora{i}", mg.LoRA(rank=2, dropout=0.5), at=["query", "value"], active=False)
        host.implant(f"adapter{i}", mg.Adapter(width=2), at="block", active=False)
        host.implant(f"scale{i}", mg.Rescale(), at="up", active=False)
        host.implant(f"prefix{i}", mg.Prefix(length=2), active=False)
    host.implant("prompt", mg.SoftPrompt(length=2), active=False)
    host.implant("skills", mg.Mixture(["lora0", "lora1"]), active=False)
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.normal_(0, 0.3)
    return host


PRODUCT = "one product, factorised, from 12 tokens on, effects below"
PICKED = "picked by few, in one batch over stacked tensors; by more than half, one after another"
KEYS = "keys and values before the layer's own"


@pytest.mark.parametrize(
    ("composition", "expected"),
    [
        (None, []),
        (
            "lora0 + 0.5*lora1 >> adapter0",
            [
                ["block", "2", "all", "function of adapter0", "function of adapter0"],
                ["query, value", "2", "all", PRODUCT, PRODUCT],
            ],
        ),
        (
            "scale0 >> prefix0 >> prompt",
            [
                ["the input", "1", "all", "tokens before the input", "tokens before the input"],
                ["attention", "2", "all", f"{KEYS}, made once a call", KEYS],
                ["up", "2", "all", "the layer once, rescaled", "the layer once, rescaled"],
            ],
        ),
        (
            ["lora0", "lora1", None, "prefix0", "lora0 - lora1"],
            [
                ["attention", "2", "1", f"{KEYS}, made once a call", KEYS],
                ["query, value", "2", "2",
                 "effects of 2 modules, one batch over stacked tensors once a call",
                 "effects of 2 modules, one batch over stacked tensors"],
                ["query, value", "2", "1", "effect, one composition after another",
                 "effect, one composition after another"],
            ],
        ),
        (
            "skills",
            [["query, value", "2", "all", *[f"skills: routed over 2 modules, {PICKED}"] * 2]],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_for_each_role_and_way(composition: Any, expected: list[list[str]]) -> None:
    lines = made().plan(composition).splitlines()
    rows = [[cell for cell in line.split("  ") if cell] for line in lines[4:]]
    assert [[cell.strip() for cell in row] for row in rows] == expected
    assert not any(line.endswith(" ") for line in lines)


def test_what_is_in_force_is_what_is_shown_when_nothing_is_said() -> None:
    host = made()
    assert host.plan() == "the bare host: every site runs as it is"
    host.use("adapter0")
    assert host.plan() == host.plan("adapter0")
    with pytest.raises(mg.ModgraftError, match="did you mean"):
        host.plan("adaptor0")


KINDS = ["lora", "adapter", "scale", "prefix"]


def run(host: mg.Host, kind: str) -> Tensor:
    return host(input_ids=ids(3), modules=[f"{kind}{i}" for i in range(3)]).logits


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_kept_follows_the_tensors(kind: str) -> None:
    host = made()
    before = run(host, kind)
    assert torch.equal(run(host, kind), before)
    for change in ("in place", "through data", "of data", "of the object", "of type"):
        place = host[f"{kind}1"].places[0]
        name, parameter = next(iter(place.named_parameters()))
        if change == "in place":
            parameter.mul_(2.0)
        elif (
            change == "through data"
        ):  # as moving averages of weights are copied; no version counts
            parameter.data.mul_(0.7)
        elif change == "of data":
            parameter.data = parameter.data * 1.5
        elif change == "of the object":
            owner, _, last = name.rpartition(".")
            setattr(place.get_submodule(owner), last, torch.nn.Parameter(parameter * 0.5))
        else:
            host.double()
        now = run(host, kind)
        assert now.dtype == next(host.parameters()).dtype
        others = [0, 2]
        if change != "of type":
            assert not torch.allclose(now[1], before[1])
            torch.testing.assert_close(now[others], before[others])
        alone = host(input_ids=ids(3)[1:2], modules=f"{kind}1").logits[0]
        torch.testing.assert_close(now[1], alone, rtol=1e-4, atol=1e-5)
        before = now


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "through data": lambda p, new: p.data.copy_(new),
    "through numpy": lambda p, new: np.copyto(p.detach().numpy(), new.numpy()),
    "in place": lambda p, new: p.copy_(new),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("of", ["module", "host"])
@pytest.mark.parametrize(
    "modules", ["l", "l + s", "m", "p", ["l", "k", "l"], ["a", "p", None], "0.5*l >> a"], ids=str
)
@torch.no_grad()
def test_no_write_is_missed(modules: Any, of: str, write: str) -> None:
    """The result is that of a host that was made with the written tensors, in forward and
    generate."""
    host = mg.Host(HOSTS["gpt2"].model()).eval()
    host.implant("l", mg.LoRA(rank=2), ["query", "value", "up"], active=False)
    host.implant("k", mg.LoRA(rank=2), ["query", "value", "up"], active=False)
    host.implant("s", mg.LoRA(rank=2, dora=True), ["query", "value", "up"], active=False)
    host.implant("a", mg.Adapter(width=3), "block", active=False)
    host.implant("p", mg.Prefix(length=2), active=False)
    host.implant("m", mg.Mixture(["l", "k"], router=mg.TopK(1, level="token")), active=False)
    for parameter in host.implants.parameters():
        parameter.normal_(0, 0.3)

    def answers(host: mg.Host) -> list[Tensor]:
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        found = host.generate(ids(2), modules=modules, output_logits=True,
                              return_dict_in_generate=True, **settings)  # fmt: skip
        return [host(input_ids=ids(2), modules=modules).logits, *found.logits]

    answers(host)
    part = host.implants if of == "module" else host.model.transformer.h
    for parameter in part.parameters():
        WRITES[write](parameter, torch.randn_like(parameter) * 0.3)
    fresh = copy.deepcopy(host)
    for one, other in zip(answers(host), answers(fresh), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_a_generate_merges_weights_and_keeps_none() -> None:
    host = made()
    bare = host.generate(ids(2), max_new_tokens=8, min_new_tokens=8, do_sample=False, modules=None)
    plain = host.merge("lora0 - 2*lora1")
    wanted = plain.generate(ids(2), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for composition in ("lora0 - 2*lora1", ["lora0 - 2*lora1"] * 3):
        found = host.generate(
            ids(2), max_new_tokens=8, min_new_tokens=8, do_sample=False, modules=composition
        )
        assert torch.equal(found, wanted)
        assert not torch.equal(found, bare)

    def alive() -> int:
        gc.collect()
        return sum(type(each) is Tensor for each in gc.get_objects())

    before = alive()
    host.generate(ids(2), max_new_tokens=8, min_new_tokens=8, modules="lora0 - 2*lora1")
    assert alive() == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_without_gradients_is_no_obstacle_to_them(kind: str) -> None:
    host = made()
    with torch.inference_mode():
        kept = run(host, kind)
    torch.testing.assert_close(run(host, kind), kept)
    with host.training_only("adapter0"):  # these modules do not train: their tensors may be cached
        tokens = [f"{kind}{i} >> adapter0" for i in range(3)]
        host(input_ids=ids(3), modules=tokens).logits.square().mean().backward()
    host[f"{kind}0"].requires_grad_(True)
    run(host, kind).square().mean().backward()
    assert all(p.grad is not None for p in host[f"{kind}0"].parameters())


def test_modules_that_begin_to_train_are_planned_anew() -> None:
    host = made()
    still = run(host, "lora")
    assert torch.equal(run(host, "lora"), still)
    host.train()  # LoRA's dropout
    assert not torch.allclose(run(host, "lora"), run(host, "lora"))
    host.eval()
    assert torch.equal(run(host, "lora"), still)


@torch.no_grad()
def test_a_site_keeps_the_tensors_of_few_batches() -> None:
    host = made()
    host(input_ids=ids(3), modules="lora0")
    for i in range(27):
        names = [f"lora{i // 3**k % 3}" for k in range(3)]
        host(input_ids=ids(3), modules=names)
    states = [m.__dict__[STATE] for m in host.model.modules() if STATE in m.__dict__]
    assert all(len(state.plans) <= 5 for state in states)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("modules", ["lora", ["lora", "adapter", "prefix"]], ids=str)
def test_a_step_of_an_optimiser_is_seen(modules: Any, fused: bool) -> None:
    """A fused optimiser writes to tensors without raising their version counters."""
    host = mg.Host(HOSTS["gpt2"].model()).eval()
    host.implant("lora", mg.LoRA(rank=2), ["query", "value"], active=False)
    host.implant("adapter", mg.Adapter(width=3), "feedforward", active=False)
    host.implant("prefix", mg.Prefix(length=2), active=False)
    optimiser = torch.optim.AdamW(host.implants.parameters(), lr=0.1, fused=fused)

    def now() -> Tensor:
        with torch.no_grad():
            return host(input_ids=ids(), modules=modules).logits

    for _ in range(2):
        now()  # kept
        host(input_ids=ids(), labels=ids(), modules=modules).loss.backward()
        optimiser.step()
        seen = now()
        with torch.no_grad():
            for parameter in host.implants.parameters():
                parameter.add_(0)  # a new version of each tensor: no cached one is used
        torch.testing.assert_close(seen, now(), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_modules_made_in_inference_mode_act_and_their_writes_are_seen() -> None:
    host = made()
    for name in ("i", "j"):
        host.implant(name, mg.LoRA(rank=2), ["query", "value"], active=False)
    batch = {"input_ids": torch.arange(3, 13).view(2, 5)}
    for composition in ("i", ["i", "j"]):
        bare = host(**batch, modules=None).logits
        assert torch.equal(host(**batch, modules=composition).logits, bare)  # B is 0 at birth
        for parameter in (*host["i"].parameters(), *host["j"].parameters()):
            parameter.normal_()
        assert not torch.allclose(host(**batch, modules=composition).logits, bare)
        for parameter in (*host["i"].parameters(), *host["j"].parameters()):
            parameter.zero_()
        assert torch.equal(host(**batch, modules=composition).logits, bare)


@pytest.mark.parametrize(("kind", "question"), [(Batched, "_factors"), (Plan, "holds")])
def test_a_generate_stacks_and_asks_once(
    monkeypatch: pytest.MonkeyPatch, kind: type, question: str
) -> None:
    host, asked = made(), []
    holds = getattr(kind, question)
    monkeypatch.setattr(
        kind, question, lambda self, *a: asked.append((self, *a)) or holds(self, *a)
    )
    modules = ["lora0", "lora1", "adapter2", "prefix0"]
    prompts = torch.arange(3, 23).view(4, 5)
    for _ in range(2):
        host.generate(prompts, max_new_tokens=6, min_new_tokens=6, modules=modules)
        assert len(asked) == len(set(asked))
        asked.clear()
    with torch.no_grad():
        host(input_ids=prompts, modules=modules)
    assert len(asked) == len(set(asked)) > 0


@torch.no_grad()
def test_a_module_that_trains_from_now_on_drops_out_from_now_on() -> None:
    """Modules with dropout are stacked only while they are not training."""
    host = mg.Host(HOSTS["gpt2"].model()).eval()
    for name in ("a", "b"):
        host.implant(name, mg.LoRA(rank=2, dropout=0.5), ["query", "value"], active=False)
        for parameter in host[name].parameters():
            parameter.normal_()
    batch, modules = {"input_ids": torch.arange(3, 13).view(2, 5)}, ["a", "b"]

    def logits() -> Tensor:
        return host(**batch, modules=modules).logits

    still = logits()
    assert torch.equal(logits(), still)
    for name in ("a", "b"):
        host.implants[name].train()
    assert not torch.equal(logits(), logits())
    host.eval()
    assert torch.equal(logits(), still)
