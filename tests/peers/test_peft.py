"""LoRA, rsLoRA, DoRA and biases equal PEFT's: outputs, gradients and merged weights."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import modgraft as mg
from contract.hosts import HOSTS, QV, HostCase, tensor_of

# PEFT's own use of what transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TARGETS = {
    "t5": ["q", "v"],
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "vit": ["q_proj", "v_proj"],
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
}


def pair(case: HostCase, at: Any, targets: list[str], **own: Any) -> tuple[mg.Host, nn.Module, Any]:
    """Make our host and PEFT's with the same random tensors; also return PEFT's layers."""
    host = mg.Host(case.model()).eval()
    host.implant("m", mg.LoRA(rank=4, alpha=6.0, **own), at=at)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6.0,
        target_modules=targets,
        fan_in_fan_out=case.name == "gpt2",
        use_rslora=own.get("rslora", False),
        use_dora=own.get("dora", False),
        bias="lora_only" if own.get("bias") else "none",
    )
    peer = peft.get_peft_model(case.model(), config).eval()
    layers = {
        k.removeprefix("base_model.model."): m
        for k, m in peer.named_modules()
        if hasattr(m, "lora_A")
    }
    assert set(layers) == set(host["m"].paths)
    for path, place in zip(host["m"].paths, host["m"].places, strict=True):
        layer = layers[path]
        with torch.no_grad():
            for p in place.parameters():
                p.normal_(0, 0.3)
            if layer.lora_A:
                layer.lora_A["default"].weight.copy_(place.A)
                layer.lora_B["default"].weight.copy_(place.B)
            else:  # an embedding: PEFT's A is [r, entries]
                layer.lora_embedding_A["default"].copy_(place.B.T)
                layer.lora_embedding_B["default"].copy_(place.A.T)
            if own.get("dora"):  # PEFT's m is ours away from the norm at the start
                layer.lora_magnitude_vector["default"].weight.add_(place.magnitude)
            if own.get("bias"):
                layer.base_layer.bias.add_(place.b)
    return host, peer, layers


def doubled(case: HostCase) -> dict[str, Any]:
    """Make the batch in float64, so that rounding plays no part."""
    return {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}


def check(case: HostCase, host: mg.Host, peer: Any) -> None:
    host, peer, batch = host.double(), peer.double(), doubled(case)
    with torch.no_grad():
        ours, theirs = tensor_of(host(**batch)), tensor_of(peer(**batch))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        ours = tensor_of(host.merge("m")(**batch))
        theirs = tensor_of(peer.merge_and_unload()(**batch))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TARGETS)
def test_equals_peft_from_the_same_tensors(name: str, method: str) -> None:
    at = "*.c_attn" if name == "gpt2" else QV  # PEFT takes GPT-2's fused projection as one
    case = HOSTS[name]
    host, peer, layers = pair(case, at, TARGETS[name], **METHODS[method])
    batch = doubled(case)
    tensor_of(host.double()(**batch)).square().mean().backward()
    tensor_of(peer.double()(**batch)).square().mean().backward()
    for path, place in zip(host["m"].paths, host["m"].places, strict=True):
        theirs = [layers[path].lora_A["default"].weight, layers[path].lora_B["default"].weight]
        if method == "dora":
            theirs.append(layers[path].lora_magnitude_vector["default"].weight)
        for own, other in zip(place.parameters(), theirs, strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)
    check(case, host, peer)


def test_bias_equals_peft() -> None:
    case = HOSTS["bert"]
    host, peer, _ = pair(case, QV, TARGETS["bert"], bias=True)
    check(case, host, peer)


@pytest.mark.parametrize("own", [{}, {"dora": True}], ids=["lora", "dora"])
def test_an_embedding_equals_peft(own: dict[str, Any]) -> None:
    case = HOSTS["bert"]  # the position table: the words' is tied to the output
    host, peer, _ = pair(case, "*.position_embeddings", ["position_embeddings"], **own)
    check(case, host, peer)
