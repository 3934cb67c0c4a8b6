"""``mg.Each``, a composition for each example: results are those of each example alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import modgraft as mg
from contract.hosts import HOSTS

QV = ["query", "value"]
MODULES: dict[str, tuple[Any, Any]] = {
    "lora": (mg.LoRA(rank=3), QV),
    "lora_2": (mg.LoRA(rank=3), QV),
    "wide": (mg.LoRA(rank=5, bias=False), "value"),
    "dora": (mg.LoRA(rank=2, dora=True), "query"),
    "sparse": (mg.SparseDelta(density=0.1), "value"),
    "scale": (mg.Rescale(), "value"),
    "scale_2": (mg.Rescale(), "value"),
    "adapter": (mg.Adapter(width=4), "feedforward"),
    "adapter_2": (mg.Adapter(width=4), "feedforward"),
    "prefix": (mg.Prefix(length=3), None),
    "prefix_2": (mg.Prefix(length=5), None),
    "prompt": (mg.SoftPrompt(length=2), None),
    "prompt_2": (mg.SoftPrompt(length=4), None),
}
LISTS = [
    ["lora", "lora_2", None],
    ["lora", "scale", "adapter"],
    ["lora >> adapter", "lora_2 >> adapter_2", "lora - 0.5*lora_2"],
    ["dora", "sparse", "average(adapter, adapter_2)"],
    ["prefix", None, "prefix_2"],
    ["prompt", "prompt_2", None],
    ["prompt >> lora", "prefix_2 >> adapter", "scale + scale_2"],
    ["concat(prompt, prompt_2)", "concat(prefix_2, prefix)", "average(prefix, prefix) >> wide"],
]


def made(kind: str) -> mg.Host:
    case = HOSTS[kind]
    torch.manual_seed(0)
    host = mg.Host(case.model().double()).eval()
    for name, (module, at) in MODULES.items():
        host.implant(name, module, at, active=False)
        with torch.no_grad():
            for p in host[name].parameters():
                p.normal_(0, 0.3)
    return host


def padded(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (3, 7), generator=generator)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :2] = 0  # on the left, where decoders are padded
    if kind != "gpt2" and kind != "llama":
        mask = mask.flip(1)
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5":
        batch["decoder_input_ids"] = torch.randint(3, 40, (3, 5), generator=generator)
    return batch


@pytest.mark.parametrize("modules", LISTS, ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert"])
@torch.no_grad()
def test_each_example_as_if_alone(kind: str, modules: list[str | None]) -> None:
    host, batch = made(kind), padded(kind)

    def out(modules: Any, batch: dict[str, Tensor]) -> Tensor:
        result = host(**batch, modules=modules)
        return result.logits if "logits" in result else result.last_hidden_state

    together = out(modules, batch)
    seen = batch["attention_mask"].bool() if "decoder_input_ids" not in batch else slice(None)
    for i, own in enumerate(modules):
        alone = out(own, {k: v[i : i + 1] for k, v in batch.items()})[0]
        rows = seen[i] if isinstance(seen, Tensor) else seen
        if alone.dim() == 1:
            torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-10)
        else:
            torch.testing.assert_close(together[i][rows], alone[rows], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("modules", LISTS, ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@torch.no_grad()
def test_generate(kind: str, modules: list[str | None], beams: int) -> None:
    host, batch = made(kind), padded(kind)
    batch.pop("decoder_input_ids", None)
    settings: dict[str, Any] = {
        "max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip
    together = host.generate(**batch, modules=modules, **settings)
    for i, own in enumerate(modules):
        alone = host.generate(
            **{k: v[i : i + 1] for k, v in batch.items()}, modules=own, **settings
        )
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_gradients(kind: str) -> None:
    host, batch = made(kind), padded(kind)
    modules = ["lora >> adapter", "lora_2 >> adapter_2", "prefix >> scale"]
    host.requires_grad_(True)

    def gradients(modules: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        host.zero_grad()
        host(**batch, modules=modules).logits.square().sum().backward()
        return {
            n: p.grad.clone()
            for n, p in host.implants.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0
        }

    if kind == "gpt2":
        batch = {"input_ids": batch["input_ids"]}
    together = gradients(modules, batch)
    alone: dict[str, Tensor] = {}
    for i, own in enumerate(modules):
        for n, g in gradients(own, {k: v[i : i + 1] for k, v in batch.items()}).items():
            alone[n] = alone[n] + g if n in alone else g
    assert together.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-7, atol=1e-8)
