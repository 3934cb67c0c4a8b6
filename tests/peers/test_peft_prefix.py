"""Prefix equals PEFT's from the same tensors: outputs, gradients and generated text.

PEFT feeds a prefix as a KV cache that is filled already. So the positions of its text begin after
the prefix, which our text is told by ``position_ids``. In T5 PEFT prefixes the decoder's
self-attention alone, and layer i of L with the tensors of layer 2i mod L (it makes room for the
cross-attention, whose part it then empties); its prefix keys get the relative bias of earlier
positions, where ours get none, so the comparison is at a decoder whose relative bias is zero.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import modgraft as mg
from contract.hosts import HOSTS, ids, tensor_of
from contract.written_out import prepend

# PEFT's own use of what transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

LENGTH, HIDDEN = 3, 5
TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS"}


def model_of(name: str) -> nn.Module:
    model = HOSTS[name].model()
    if name == "bert":  # PEFT prefixes BERT for some of its tasks only
        classifier = BertForSequenceClassification(model.config).eval()
        classifier.bert.load_state_dict(model.bert.state_dict(), strict=False)
        torch.manual_seed(1)
        for p in [*classifier.classifier.parameters(), *classifier.bert.pooler.parameters()]:
            nn.init.normal_(p, std=0.3)
        return classifier
    if name == "t5":
        nn.init.zeros_(model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    return model


def batch_of(name: str) -> dict[str, Any]:
    if name == "bert":
        return {"input_ids": ids(), "attention_mask": HOSTS["bert"].batch()["attention_mask"]}
    return HOSTS[name].batch()


def pair(name: str, projected: bool) -> tuple[mg.Host, Any]:
    host = mg.Host(model_of(name)).eval()
    own = HIDDEN if projected else None
    at = "decoder.*.SelfAttention" if name == "t5" else None
    host.implant("m", mg.Prefix(length=LENGTH, reparametrise=own), at=at, expect=2)
    settings = {"prefix_projection": True, "encoder_hidden_size": HIDDEN} if projected else {}
    config = peft.PrefixTuningConfig(task_type=TASKS[name], num_virtual_tokens=LENGTH, **settings)
    peer = peft.get_peft_model(model_of(name), config).eval()
    if name == "bert":  # PEFT also trains a head, which it copies
        peer.base_model.classifier.load_state_dict(host.model.classifier.state_dict(), strict=False)
    return host, peer


def numbers(name: str) -> list[int]:
    """List, for each of our layers, the layer of PEFT's tensors that acts there."""
    return [2 * i % 2 for i in range(2)] if name == "t5" else [0, 1]


def rows(weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Split PEFT's tensor into the keys and values of two layers, along the first dimension."""
    parts = weight.chunk(4)  # [2 layers · 2 · d, …]
    return [(parts[0], parts[1]), (parts[2], parts[3])]


def fill(name: str, host: mg.Host, peer: Any) -> None:
    """Put the same random numbers in both."""
    encoder, places = peer.prompt_encoder["default"], host["m"].places
    with torch.no_grad():
        for p in encoder.parameters():
            p.normal_(0, 0.5)
        width = encoder.embedding.weight.shape[1]
        if host["m"].method.reparametrise is None:
            made = rows(encoder.embedding.weight.T)
            for place, number in zip(places, numbers(name), strict=True):
                for own, theirs in zip(place.plain(), made[number], strict=True):
                    own.copy_(theirs.T.reshape(own.shape))
            return
        first, last = encoder.transform[0], encoder.transform[2]
        places[0].embedding.zero_()  # PEFT's embedding is as wide as the keys, ours as the host
        places[0].embedding[:, :width].copy_(encoder.embedding.weight)
        places[0].hidden.weight[:, :width].copy_(first.weight)
        places[0].hidden.bias.copy_(first.bias)
        for place, number in zip(places, numbers(name), strict=True):
            place.out.weight.copy_(last.weight.chunk(2)[number])
            place.out.bias.copy_(last.bias.chunk(2)[number])


def gradients(name: str, host: mg.Host, peer: Any) -> list[tuple[Tensor, Tensor]]:
    """Return our gradients, summed where PEFT uses a tensor twice, and PEFT's."""
    encoder, places = peer.prompt_encoder["default"], host["m"].places
    projected = host["m"].method.reparametrise is not None
    width = encoder.embedding.weight.shape[1]
    pairs = []
    for number in set(numbers(name)):
        own = [p for p, n in zip(places, numbers(name), strict=True) if n == number]
        if projected:
            theirs = encoder.transform[2].weight.grad.chunk(2)[number]
            pairs.append((sum(p.out.weight.grad for p in own), theirs))
        else:
            keys, values = (t.T for t in rows(encoder.embedding.weight.grad.T)[number])
            pairs.append((sum(p.keys.grad.flatten(1) for p in own), keys))
            pairs.append((sum(p.values.grad.flatten(1) for p in own), values))
    if projected:
        pairs.append((places[0].embedding.grad[:, :width], encoder.embedding.weight.grad))
    return pairs


def after(name: str) -> dict[str, Tensor]:
    """Make position ids that begin after the prefix."""
    return {} if name == "t5" else {"position_ids": torch.arange(LENGTH, LENGTH + 7)[None]}


@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
@pytest.mark.parametrize("name", TASKS)
def test_equals_peft_from_the_same_tensors(name: str, projected: bool) -> None:
    host, peer = pair(name, projected)
    fill(name, host, peer)
    batch = batch_of(name)
    ours, theirs = tensor_of(host(**batch, **after(name))), tensor_of(peer(**batch))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - tensor_of(host(**batch, **after(name), modules=None))).abs().max() > 0.01

    ours.square().mean().backward()
    theirs.square().mean().backward()
    for own, other in gradients(name, host, peer):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_t5s_relative_bias_is_all_that_differs_from_peft() -> None:
    """PEFT's T5 with its bias is the written-out attention with that of positions −k … −1."""
    batch, plain = batch_of("t5"), HOSTS["t5"].model()
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH)
    peer = peft.get_peft_model(HOSTS["t5"].model(), config).eval()
    weight = peer.prompt_encoder["default"].embedding.weight
    length = batch["labels"].shape[1]
    first = plain.decoder.block[0].layer[0].SelfAttention
    bias = first.compute_bias(length, LENGTH + length, past_seen_tokens=LENGTH)[0, :, :, :LENGTH]
    for i, number in enumerate(numbers("t5")):
        keys, values = (t.T.reshape(LENGTH, 2, 8) for t in rows(weight.T)[number])
        prepend(plain, f"decoder.block.{i}.layer.0.SelfAttention", keys, values, bias)
    torch.testing.assert_close(plain(**batch).logits, peer(**batch).logits, rtol=1e-5, atol=1e-5)
