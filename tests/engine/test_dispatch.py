"""The routed modules, computed over stacked tensors, give what each module computes alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

import modgraft as mg
from modgraft.engine.dispatch import Blocks, ExpertBatch

KINDS = {
    "lora": (lambda: mg.LoRA(rank=2), "transformer.h.*.attn.c_attn"),
    "lora with bias": (lambda: mg.LoRA(rank=2, bias=True), "up"),
    "part of a projection": (lambda: mg.LoRA(rank=2), ["query", "value"]),
    "adapter": (lambda: mg.Adapter(reduction=4), "block"),
    "parallel adapter": (lambda: mg.ParallelAdapter(reduction=4), "feedforward"),
    "rescale": (lambda: mg.Rescale(), ["key", "value", "up"]),
}
ROUTERS = {
    "token": lambda: mg.TopK(2, level="token"),
    "example": lambda: mg.TopK(2, level="example"),
    "threshold": lambda: mg.Threshold(0.5, level="token"),
    "noisy": lambda: mg.NoisyTopK(1, level="token"),
}


def host_with(kind: str, router: mg.Router, count: int = 5) -> mg.Host:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_layer=2, n_embd=16, n_head=2, n_positions=16)
    host = mg.Host(GPT2LMHeadModel(config)).double().eval()
    module, at = KINDS[kind]
    names = [f"m{i}" for i in range(count)]
    for name in names:
        host.implant(name, module(), at, active=False)
    host.implant("mix", mg.Mixture(names, router=router))
    with torch.no_grad():
        for implant in host.implants.values():
            for parameter in implant.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.5 * torch.randn_like(parameter))
    return host.double()


def results(host: mg.Host) -> list[torch.Tensor]:
    """Return the logits, and the gradient of every tensor that has one."""
    ids = torch.arange(18).view(3, 6) * 7 % 40
    host.zero_grad()
    logits = host(input_ids=ids).logits
    logits.square().sum().backward()
    found = {n: p.grad for n, p in host.named_parameters() if p.grad is not None}
    return [logits.detach(), *(found[n] for n in sorted(found))]


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_it_is_the_loop_over_modules(
    kind: str, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "modgraft.engine.apply._few", lambda chosen: True
    )  # also where many are picked
    made: list[ExpertBatch | None] = []
    whole = ExpertBatch.of
    host = host_with(kind, ROUTERS[router]())
    monkeypatch.setattr(ExpertBatch, "of", lambda members: made.append(whole(members)) or made[-1])
    stacked = results(host)
    assert made
    assert all(batch is not None for batch in made), "this test is of stacked modules"
    monkeypatch.setattr(ExpertBatch, "of", lambda members: None)
    alone = results(host_with(kind, ROUTERS[router]()))
    # a module that was not picked has no gradient from the loop, and zeros over stacked tensors
    by_size = [g for g in stacked[1:] if g.abs().max() > 0]
    expected = [g for g in alone[1:] if g.abs().max() > 0]
    torch.testing.assert_close(stacked[0], alone[0], rtol=1e-10, atol=1e-10)
    assert len(by_size) == len(expected) > 0
    for a, b in zip(by_size, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.0, 0.5, -1.0]), min_size=4, max_size=4), max_size=20)
)
def test_blocks_hold_each_pick_once(weights: list[list[float]]) -> None:
    chosen = torch.tensor(weights, dtype=torch.float64).view(-1, 4)
    blocks = Blocks.of(chosen)
    if blocks is None:
        assert not chosen.any()
        return
    found = torch.zeros_like(chosen)
    for module, rows, own in zip(blocks.module, blocks.rows, blocks.weights, strict=True):
        for row, weight in zip(rows, own, strict=True):
            found[row, module] += weight
    assert torch.equal(found, chosen)
    picks, used = int((chosen != 0).sum()), int((chosen != 0).any(0).sum())
    assert blocks.rows.numel() <= 2 * picks + used * blocks.rows.shape[1]


def test_one_module_for_everything_is_one_block() -> None:
    chosen = torch.zeros(100, 256)
    chosen[:, 17] = 1.0
    blocks = Blocks.of(chosen)
    assert blocks is not None
    assert blocks.rows.shape == (1, 100)


def test_changed_tensors_and_modules_are_seen() -> None:
    host = host_with("lora", mg.TopK(2, level="token"))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = host(input_ids=ids).logits
        assert torch.equal(before, host(input_ids=ids).logits)
        for i in range(5):
            for parameter in host[f"m{i}"].parameters():
                parameter.mul_(2.0)
        after = host(input_ids=ids).logits
    fresh = host_with("lora", mg.TopK(2, level="token"))
    with torch.no_grad():
        for i in range(5):
            for parameter in fresh[f"m{i}"].parameters():
                parameter.mul_(2.0)
        torch.testing.assert_close(after, fresh(input_ids=ids).logits, rtol=0, atol=0)
    assert (after - before).abs().max() > 1e-3


def test_modules_of_several_kinds_are_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_with("lora", mg.TopK(2, level="token"), count=3)
    host.implant("other", mg.LoRA(rank=3), "transformer.h.*.attn.c_attn", active=False)
    host.implant("both", mg.Mixture(["m0", "m1", "other"], router=mg.TopK(1, level="token")))
    monkeypatch.setattr(ExpertBatch, "add", None)  # fails if it is called
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        moved = (
            host(input_ids=ids, modules="both").logits - host(input_ids=ids, modules=None).logits
        )
    assert moved.abs().max() > 1e-3


def test_of_many_picks_each_module_is_run_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_with("lora", mg.Soft(level="token"))
    monkeypatch.setattr(ExpertBatch, "add", None)
    with torch.no_grad():
        host(input_ids=torch.arange(12).view(2, 6))
    assert all(use.dead == () for use in host["mix"].stats())


def test_the_plan_says_so() -> None:
    assert "over stacked tensors" in str(host_with("lora", mg.TopK(2, level="token")).plan("mix"))
    host = host_with("lora", mg.TopK(2, level="token"))
    host.implant("other", mg.LoRA(rank=3), "transformer.h.*.attn.c_attn", active=False)
    host.implant("both", mg.Mixture(["m0", "other"], router=mg.TopK(1, level="token")))
    assert "stacked tensors" not in str(host.plan("both"))
    assert "those picked, one after another" in str(host.plan("both"))


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 6))
def test_no_module_sees_a_row_that_did_not_choose_it(seed: int, rows: int, count: int) -> None:
    """So that a NaN of one example gets into no product with another's module."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, count, generator=draw)
    chosen = drawn * (torch.rand(rows, count, generator=draw) < 0.5)
    blocks = Blocks.of(chosen)
    if blocks is not None:
        assert chosen[blocks.rows, blocks.module[:, None]].ne(0).all()
