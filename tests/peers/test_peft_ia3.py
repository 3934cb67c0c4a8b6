"""Rescale equals PEFT's IA³ from the same tensors."""

from __future__ import annotations

import peft
import pytest
import torch

import modgraft as mg
from contract.hosts import HOSTS

TARGETS = {  # PEFT's own for IA³: layers whose output it scales, and those whose input
    "t5": (["k", "v"], ["wo"]),
    "bert": (["key", "value"], ["output.dense"]),
    "gpt2": (["c_attn"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj"], ["down_proj"]),
    "vit": (["k_proj", "v_proj"], ["fc2"]),
}


# PEFT's own use of what transformers has renamed
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", TARGETS)
@torch.no_grad()
def test_rescaling_equals_pefts_ia3_from_the_same_tensors(name: str) -> None:
    case = HOSTS[name]
    scaled, inner = TARGETS[name]
    config = peft.IA3Config(
        target_modules=scaled + inner, feedforward_modules=inner, fan_in_fan_out=name == "gpt2"
    )
    peer = peft.get_peft_model(case.model(), config).eval()
    layers = {
        k.removeprefix("base_model.model."): m
        for k, m in peer.named_modules()
        if hasattr(m, "ia3_l")
    }
    host = mg.Host(case.model()).eval()
    host.implant("after", mg.Rescale(), at=[k for k, m in layers.items() if not m.is_feedforward])
    host.implant(
        "before",
        mg.Rescale(where="input"),
        at=[k for k, m in layers.items() if m.is_feedforward],
    )
    if name == "bert":  # the attention's output.dense ends alike: PEFT takes it for an inner one
        assert len(host["before"].paths) == 4
    elif name != "gpt2":  # PEFT takes GPT-2's fused projection as one
        assert host["after"].paths == tuple(s.label for s in host.sites(["key", "value"]))
        assert host["before"].paths == tuple(s.label for s in host.sites("down"))
    bare = host(**case.batch()).logits
    for implant in (host["after"], host["before"]):
        for path, place in zip(implant.paths, implant.places, strict=True):
            place.phi.normal_(1.0, 0.3)
            theirs = layers[path].ia3_l["default"]
            theirs.copy_(place.phi.reshape(theirs.shape))
    ours, theirs = host(**case.batch()).logits, peer(**case.batch()).logits
    assert not torch.allclose(ours, bare)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    merged = peer.merge_and_unload()(**case.batch()).logits
    torch.testing.assert_close(host.merge()(**case.batch()).logits, merged, rtol=1e-5, atol=1e-5)
