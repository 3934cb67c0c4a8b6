"""A chat goes on from its cache with the prompts that the cache was written with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import modgraft as mg
from engine.inputs.text_hosts import LENGTH, PAD, drawn, ids, prompted, writer

NEW: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
HOSTS = ("GPT2", "Phi3", "GPTNeoX", "Falcon", "Gemma3")


def turns(host: mg.Host, first: Tensor, mask: Tensor, **kwargs: Any) -> tuple[Any, Tensor, Tensor]:
    """Let the host write a first turn; return it with the text of the second and its mask."""
    one = host.generate(first, attention_mask=mask, **NEW, **kwargs)
    text = torch.cat([one.sequences, ids(len(first), 3)], 1)
    longer = torch.ones(len(text), text.shape[1] - first.shape[1], dtype=mask.dtype)
    return one, text, torch.cat([mask, longer], 1)


@torch.no_grad()
@pytest.mark.parametrize("name", HOSTS)
def test_a_second_turn_is_what_it_is_without_the_cache(name: str) -> None:
    host, _ = prompted(writer(name))
    host.implant("q", mg.SoftPrompt(length=2, bound=1.0), active=False)
    host.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    first, mask = ids(2, 5), torch.ones(2, 5, dtype=torch.long)
    first[0, :2], mask[0, :2] = PAD, 0  # padded on the left
    for modules in ("m", ["q", "m"]):
        one, text, seen = turns(host, first, mask, modules=modules)
        read: list[int] = []
        handle = host.model.get_input_embeddings().register_forward_pre_hook(  # type: ignore[operator]
            lambda _, args, read=read: read.append(args[0].shape[1])
        )
        call = {"attention_mask": seen, "modules": modules}
        got = host.generate(text, past_key_values=one.past_key_values, **NEW, **call)
        handle.remove()
        assert max(read) <= 4, "the rest is in the cache"
        assert torch.equal(got.sequences, host.generate(text, **NEW, **call).sequences)


@torch.no_grad()
def test_the_cache_of_a_call_and_one_that_is_empty() -> None:
    host, _ = prompted(writer("Phi3"))
    host.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    text = ids(2, 6)
    want = host.generate(text, **NEW).sequences
    own = tf.DynamicCache()
    assert torch.equal(host.generate(text, past_key_values=own, **NEW).sequences, want)
    filled = host(text[:, :4], past_key_values=tf.DynamicCache()).past_key_values
    for cache in (filled, copy.deepcopy(filled)):
        assert torch.equal(host.generate(text, past_key_values=cache, **NEW).sequences, want)


@torch.no_grad()
def test_a_cache_of_other_tokens_is_refused() -> None:
    host, _ = prompted(writer("Phi3"))
    host.implant("q", mg.SoftPrompt(length=LENGTH), active=False)
    text = ids(2, 6)

    def cache(**kwargs: Any) -> Any:
        return host.generate(text[:, :4], **NEW, **kwargs).past_key_values

    mask = torch.ones_like(text)
    mask[0, 0] = 0
    for made, call, words in (
        (cache(), {"modules": "q"}, "the tokens of 'm', and the call has those of 'q'"),
        (cache(), {"modules": ["q", "m"]}, "those of 'q', 'm'"),
        (cache(), {"modules": None}, "the call has none"),
        (cache(modules=None), {}, "no tokens of prompts, and the call has those of 'm'"),
        (cache(), {"attention_mask": mask}, "other places"),
    ):
        with pytest.raises(mg.ModgraftError, match=words):
            host.generate(text, past_key_values=made, **NEW, **call)
    with pytest.raises(mg.ModgraftError, match="the call has none"):
        host(text[:, 4:], past_key_values=cache(), modules=None)
    with pytest.raises(
        mg.ModgraftError, match=r"host\.generate\(whole_text, past_key_values=cache\)"
    ):
        host(text[:, 4:], past_key_values=cache())
    plain = cache(modules=None)
    assert host(text[:, 4:], past_key_values=plain, modules=None).logits.shape[1] == 2


@torch.no_grad()
def test_a_cache_behind_an_encoder_is_refused() -> None:
    config = tf.T5Config(
        vocab_size=41, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4,
        decoder_start_token_id=1, pad_token_id=PAD,
    )  # fmt: skip
    host, _ = prompted(drawn(tf.T5ForConditionalGeneration(config)))
    host.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    one = host.generate(ids(2), **NEW)
    for made in (one.past_key_values, host.generate(ids(2), modules=None, **NEW).past_key_values):
        with pytest.raises(mg.ModgraftError, match="without an encoder; leave the cache out"):
            host.generate(ids(2), decoder_input_ids=one.sequences, past_key_values=made, **NEW)
