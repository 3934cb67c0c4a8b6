"""Hosts whose weights accelerate has offloaded, beside the same hosts in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import modgraft as mg

Offload = Callable[[nn.Module, Path], object]

LAST = {
    "gpt2": ("transformer", ["wte", "wpe", "drop", "h.0", "h.1", "ln_f"]),
    "llama": ("model", ["embed_tokens", "rotary_emb", "layers.0", "layers.1", "norm"]),
}


def dispatched(model: nn.Module, folder: Path) -> None:
    """Put the last two parts on the disk."""
    base, parts = LAST[model.config.model_type]  # type: ignore[union-attr, index]
    places = {f"{base}.{part}": "disk" if part in parts[-2:] else "cpu" for part in parts}
    dispatch_model(
        model, {**places, "lm_head": "cpu"}, main_device="cpu", offload_dir=folder, force_hooks=True
    )


OFFLOAD: dict[str, Offload] = {
    "memory": lambda model, _: cpu_offload(model, torch.device("cpu"), offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, folder, torch.device("cpu")),
    "some on disk": dispatched,
}
AT = {
    "gpt2": (GPT2LMHeadModel, ["query", "*.mlp.c_fc", "transformer.wpe"]),
    "llama": (LlamaForCausalLM, ["query", "down", "model.embed_tokens"]),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    if name == "gpt2":
        config = GPT2Config(
            n_layer=2, n_embd=16, n_head=2, vocab_size=41, attn_pdrop=0, resid_pdrop=0,
            embd_pdrop=0, **ids,
        )  # fmt: skip
        return GPT2LMHeadModel(config).double().eval()
    config = LlamaConfig(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, **ids,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def host_of(model: nn.Module, at: Any, **settings: Any) -> mg.Host:
    host = mg.Host(model).eval()
    host.implant("a", mg.LoRA(rank=2, **settings), at=at)
    host.implant("b", mg.LoRA(rank=1), at=at, active=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in host.implants.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return host


def pair(name: str, how: str, folder: Path, **settings: Any) -> tuple[mg.Host, mg.Host]:
    """Return an offloaded host, and the same one in place."""
    model = model_of(name)
    OFFLOAD[how](model, folder / "offload")
    at = AT[name][1]
    return host_of(model, at, **settings), host_of(model_of(name), at, **settings)


def ids() -> Tensor:
    return torch.randint(3, 41, (3, 6), generator=torch.Generator().manual_seed(0))


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-6)


CASES = pytest.mark.parametrize("how", list(OFFLOAD))
HOSTS = pytest.mark.parametrize("name", list(AT))


@HOSTS
@CASES
@pytest.mark.parametrize("dora", [False, True])
def test_an_offloaded_host_computes_and_learns(
    name: str, how: str, dora: bool, tmp_path: Path
) -> None:
    host, plain = pair(name, how, tmp_path, dora=dora)
    x = ids()
    for modules in ("a", "0.5*a + b", None):
        close(host(x, modules=modules), plain(x, modules=modules))
    if not dora:
        close(host(x, modules=["a", "b", None]), plain(x, modules=["a", "b", None]))
    for each in (host, plain):
        each(x, labels=x).loss.backward()
    for p, q in zip(host["a"].parameters(), plain["a"].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in host.model.parameters())
    for each in (host, plain):
        each.fit([{"input_ids": x, "labels": x}], train="a", steps=2, lr=1e-2, progress=False)
    close(host(x), plain(x))
    close(copy.deepcopy(host)(x), plain(x))
    assert not host.probe({"input_ids": x}).faults
    close(host(x), plain(x))


@HOSTS
@CASES
def test_the_merge_of_an_offloaded_host_is_offloaded_as_it_is(
    name: str, how: str, tmp_path: Path
) -> None:
    host, plain = pair(name, how, tmp_path)
    x = ids()
    merged = host.merge("0.5*a + b")
    close(merged(x), plain(x, modules="0.5*a + b"))
    close(host(x), plain(x))
    assert torch.equal(host(x, modules=None).logits, model_of(name)(x).logits)
    assert all(p.is_meta for p in host.model.get_submodule(LAST[name][0]).parameters()) == (
        how != "some on disk"
    )


@HOSTS
@CASES
def test_modules_pass_between_an_offloaded_host_and_one_in_place(
    name: str, how: str, tmp_path: Path
) -> None:
    host, plain = pair(name, how, tmp_path)
    x = ids()
    want = plain(x)
    host.save("a", tmp_path / "host")
    plain.save("a", tmp_path / "plain")
    for each, folder in ((host, "plain"), (plain, "host")):
        each.remove("a")
        each.load(tmp_path / folder)
        close(each(x), want)
    host.save_pretrained(tmp_path / "state")
    other = model_of(name)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    OFFLOAD[how](other, tmp_path / "other")
    with pytest.raises(mg.ModgraftError, match="weights"):
        mg.Host(other).load(tmp_path / "plain")


def test_a_tied_weight_is_tied_where_it_is_offloaded(tmp_path: Path) -> None:
    for how, offload in OFFLOAD.items():
        model = model_of("gpt2")
        offload(model, tmp_path / how)
        host = host_of(model, "transformer.wte")
        with pytest.raises(mg.ModgraftError, match=r"transformer\.wte, lm_head share it"):
            host.merge("a")
        close(host(ids()), host_of(model_of("gpt2"), "transformer.wte")(ids()))


def test_what_no_hook_of_the_layer_keeps_is_refused_with_a_true_remedy() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    host = host_of(model, "0")
    model.to("meta")
    with pytest.raises(mg.ModgraftError, match=r"offloaded.*load the model without offload"):
        host(torch.randn(2, 4))
