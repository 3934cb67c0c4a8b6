"""Hosts that read what transformers captures of their layers, from the first call on.

transformers hooks the layers of a model at the first call that asks for hidden states. A probe, the
copy that is asked for the examples, and a layer that is run once more for its residual come before
that call, or between the hook and the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import modgraft as mg
from modgraft.engine.examples import ask

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24
}  # fmt: skip
Made = tuple[nn.Module, dict[str, Any]]


def dpt() -> Made:
    config = tf.DPTConfig(
        **{**SMALL, "num_hidden_layers": 4}, image_size=32, patch_size=8, is_hybrid=False,
        neck_hidden_sizes=[8] * 4, fusion_hidden_size=8, backbone_out_indices=[0, 1, 2, 3],
    )  # fmt: skip
    return tf.DPTForDepthEstimation(config), {"pixel_values": torch.randn(3, 3, 32, 32)}


def llava() -> Made:
    image: dict[str, Any] = {"image_token_id": 44}
    config = tf.LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 50, **SMALL},
        vision_config={
            "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **SMALL
        },
        vision_feature_layer=-2, **image,
    )  # fmt: skip
    words, patches = torch.randint(5, 40, (3, 5)), torch.full((3, 4), 44)
    ids = torch.cat([words[:, :2], patches, words[:, 2:]], 1)
    return tf.LlavaForConditionalGeneration(config), {
        "input_ids": ids,
        "pixel_values": torch.randn(3, 3, 8, 8),
    }


def bert() -> Made:
    batch = {"input_ids": torch.randint(3, 50, (3, 7)), "output_hidden_states": True}
    return tf.BertModel(tf.BertConfig(vocab_size=50, **SMALL)), batch


HOSTS: dict[str, tuple[Callable[[], Made], str, str]] = {
    "dpt": (dpt, "*.layer.0.*dense*", "dpt.encoder"),
    "llava": (llava, "*vision_tower*.q_proj", "model.vision_tower.encoder"),
    "bert": (bert, "*.query", "encoder"),
}


def drawn(name: str) -> Made:
    torch.manual_seed(0)
    model, batch = HOSTS[name][0]()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.double().eval(), {
        k: v.double() if k == "pixel_values" else v for k, v in batch.items()
    }


def same(got: Any, want: Any) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if name != "past_key_values":
            torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("name", HOSTS)
def test_a_probe_before_the_first_call_leaves_the_host_as_it_was(name: str) -> None:
    model, batch = drawn(name)
    same_model, _ = drawn(name)
    host = mg.Host(model)
    host.implant("a", mg.LoRA(rank=2), at=HOSTS[name][1])
    hooks = [len(module._forward_hooks) for module in model.modules()]
    found = host.probe({k: v for k, v in batch.items() if isinstance(v, torch.Tensor)})
    assert not found.faults, found
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    with torch.no_grad():
        same(host(**batch, modules=None), same_model(**batch))
        host.remove("a")
        same(host(**batch), same_model(**batch))


@pytest.mark.parametrize("called", [False, True], ids=["first call", "later call"])
@pytest.mark.parametrize("name", ["dpt", "llava"])
def test_a_host_that_reads_them_can_be_asked_for_the_examples(name: str, called: bool) -> None:
    model, batch = drawn(name)
    host = mg.Host(model)
    host.implant("a", mg.LoRA(rank=2), at=HOSTS[name][1], active=False)
    with torch.no_grad():
        for p in host["a"].parameters():
            p.normal_()
        if called:
            host(**batch)
        got = host(**batch, modules=["a", None, "a"])[0]
        want = [host(**batch, modules=one)[0] for one in ("a", None)]
    found, _ = ask(model, (), batch, 3)
    assert all(found[path] == 0 for path in host["a"].paths), "the host was asked, and answered"
    assert (want[0] - want[1]).abs().max() > 1e-3
    for row, one in enumerate((0, 1, 0)):
        torch.testing.assert_close(got[row], want[one][row])


@pytest.mark.parametrize("name", HOSTS)
def test_a_layer_that_is_run_again_is_captured_once(name: str) -> None:
    model, batch = drawn(name)
    same_model, _ = drawn(name)
    host = mg.Host(model)
    host.implant("a", mg.Adapter(width=3), at=HOSTS[name][2] + "[residual]")  # the identity yet
    with torch.no_grad():
        same(host(**batch), same_model(**batch))
