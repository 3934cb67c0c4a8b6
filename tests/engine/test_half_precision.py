"""Modules in float32 on hosts in half precision; the contract has each method by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from common import kept
from contract.hosts import HOSTS, QV, tensor_of

LAYERS = ["query", "value", "up", "down"]


def llama(kind: torch.dtype, seed: int = 0) -> mg.Host:
    return mg.Host(HOSTS["llama"].model(seed).to(kind)).eval()


def batch() -> dict[str, Tensor]:
    ids = HOSTS["llama"].batch()["input_ids"]
    return {"input_ids": ids, "labels": ids}


def trained(host: mg.Host) -> list[Tensor]:
    """Train a LoRA with a small step, and return which entries of each A have moved."""
    host.implant("m", mg.LoRA(rank=4), at=LAYERS)
    before = {k: v.clone() for k, v in host["m"].tensors().items()}
    given = {"lr": 1e-4, "schedule": "constant", "weight_decay": 0.0, "progress": False}
    host.fit([batch()], train="m", steps=30, **given)
    return [t != before[k] for k, t in host["m"].tensors().items() if k.endswith(":A")]


def test_small_updates_are_not_lost() -> None:
    """In bfloat16 itself five entries of six would never move at this rate."""
    for kind in (torch.float32, torch.bfloat16):
        moved = trained(llama(kind))
        assert sum(int(m.sum()) for m in moved) > 0.99 * sum(m.numel() for m in moved)


def test_a_grad_scaler_trains_float16() -> None:
    host = llama(torch.float16)
    host.implant("m", mg.LoRA(rank=4), at=LAYERS)
    optimiser = torch.optim.AdamW(host["m"].parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    losses = []
    for _ in range(8):
        loss = host(**batch()).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_merge_is_summed_in_float32_and_rounded_once(kind: torch.dtype) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(20, 12), nn.MultiheadAttention(12, 2)).to(kind)).eval()
    host.implant("m", mg.LoRA(rank=2, bias=True), at=["0", "1.in_proj_weight"])
    host.implant("n", mg.LoRA(rank=2, dora=True), at="0")
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0, 0.1)
        plain: Any = host.merge("m - 2*n")
        linear, (a, _), (b,) = host.model[0], host["m"].places, host["n"].places
        W = linear.weight.float()
        exact = W + a.B @ a.A - 2 * b.delta(W)
        assert torch.equal(plain[0].weight, exact.to(kind))
        assert torch.equal(plain[0].bias, (linear.bias.float() + a.b).to(kind))
        inner = host.model[1].in_proj_weight.float() + host["m"].places[1].delta(W)
        assert torch.equal(plain[1].in_proj_weight, inner.to(kind))
    assert {p.dtype for p in plain.parameters()} == {kind}


def test_saved_and_loaded_in_float32(tmp_path: Path) -> None:
    host = llama(torch.bfloat16)
    trained(host)
    host.save("m", tmp_path / "m")
    assert {tensor.dtype for tensor in kept(tmp_path / "m").values()} == {torch.float32}
    fresh = llama(torch.bfloat16)
    fresh.load(tmp_path / "m")
    assert torch.equal(fresh(**batch()).logits, host(**batch()).logits)


def test_whoever_asks_has_the_module_in_half_precision() -> None:
    host = llama(torch.bfloat16)
    host.implant("m", mg.LoRA(rank=2), at=QV).to(torch.bfloat16)
    assert {p.dtype for p in host["m"].parameters()} == {torch.bfloat16}
    assert host(**batch()).logits.dtype == torch.bfloat16
    assert {p.dtype for p in host.bfloat16().parameters()} == {torch.bfloat16}


COMPOSITIONS: list[Any] = [
    "lora >> adapter",
    "prefix >> 0.5*lora >> dense",
    ["lora", "adapter", None],
    ["lora", "lora2", "lora"],
    ["soft", "soft >> lora", None],
    mg.Weighted(["lora", "adapter"], torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])),
    "tokens",
    "tops",
    "examples",
    "prefixes",
    "fused",
    "h['fr'] + h['de']",
]


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=str)
def test_compositions_in_half_precision(composition: Any) -> None:
    """With and without gradients, on the batch and one token after another."""
    host = llama(torch.float32)
    for name, method in (
        ("lora", mg.LoRA(rank=2)), ("lora2", mg.LoRA(rank=2)), ("dense", mg.SparseDelta()),
    ):  # fmt: skip
        host.implant(name, method, at=QV, active=False)
    host.implant("adapter", mg.Adapter(reduction=2), at=["output", "down"], active=False)
    host.implant("prefix", mg.Prefix(length=2), active=False)
    host.implant("prefix2", mg.Prefix(length=2), active=False)
    host.implant("soft", mg.SoftPrompt(length=2), active=False)
    host.implant("h", mg.HyperNetwork(mg.LoRA(rank=2), tasks=("fr", "de"), embedding=4), at=QV,
                 active=False)  # fmt: skip
    both = ["lora", "lora2"]
    mixtures = {
        "tokens": mg.Mixture(both, router=mg.Soft(level="token")),
        "tops": mg.Mixture(both, router=mg.TopK(k=1, level="token")),
        "examples": mg.Mixture([*both, "adapter"]),
        "prefixes": mg.Mixture(["prefix", "prefix2"]),
        "fused": mg.Mixture(both, aggregate=mg.Fuse()),
    }
    for name, method in mixtures.items():
        host.implant(name, method, active=False)
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0, 0.2)
    given = {"input_ids": batch()["input_ids"], "modules": composition}
    exact = tensor_of(host(**given)).detach()
    host.model.bfloat16()
    half = tensor_of(host(**given))
    half.float().square().mean().backward()
    assert any(p.grad is not None for p in host.implants.parameters())
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in host.implants.parameters()
        if p.grad is not None
    )
    with torch.no_grad():
        outs = [half.detach(), tensor_of(host(**given))]
        host.generate(given["input_ids"], modules=composition, max_new_tokens=2)
    for out in outs:
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).abs().mean() < 0.1 * exact.abs().mean()
