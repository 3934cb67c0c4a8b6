from __future__ import annotations

import pytest
import torch
from transformers import T5ForConditionalGeneration

from modgraft.models.copy_init import copy_init
from modgraft.models.transformers_t5 import small_t5


def attentions(model: T5ForConditionalGeneration):
    return [m for m in model.modules() if type(m).__name__ == "T5Attention"]


def test_small_t5_is_transformers_own_and_follows_its_seed():
    state = torch.get_rng_state()
    a, b, c = small_t5(50, seed=1), small_t5(50, seed=1), small_t5(50, seed=2)
    assert torch.equal(state, torch.get_rng_state())
    assert type(a) is T5ForConditionalGeneration
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.shared.weight, c.shared.weight)


def test_small_t5_takes_the_shape_it_is_given():
    model = small_t5(50, 3, 4, d_model=32, d_ff=48, heads=2, layers=1, decoder_layers=3)
    config = model.config
    assert (config.d_model, config.d_kv, config.num_layers, config.num_decoder_layers) == (
        32,
        16,
        1,
        3,
    )
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (3, 4, 3)
    with pytest.raises(ValueError, match="not a multiple of heads=3"):
        small_t5(50, d_model=32, heads=3)


def test_copy_init_sets_the_stated_equations():
    model = copy_init(small_t5(50, d_model=32, heads=4, layers=2), match=4.0)
    model.requires_grad_(False)
    d_kv, eye = model.config.d_kv, torch.eye(32)
    for attention in attentions(model):
        v, o = attention.v.weight, attention.o.weight
        torch.testing.assert_close(o, v.T)
        torch.testing.assert_close(v @ v.T, eye)
    cross = model.decoder.block[1].layer[1].EncDecAttention
    torch.testing.assert_close(cross.q.weight, cross.k.weight)
    torch.testing.assert_close(cross.q.weight @ cross.q.weight.T, eye * 4.0 / d_kv)
    # the offset heads are small, the others as in the cross-attention
    own = model.encoder.block[1].layer[0].SelfAttention
    torch.testing.assert_close(own.q.weight[2 * d_kv :], own.k.weight[2 * d_kv :])
    assert own.q.weight[: 2 * d_kv].norm() < 0.2 * own.q.weight[2 * d_kv :].norm()


def test_offset_heads_look_at_their_neighbours():
    model = copy_init(small_t5(50, d_model=32, heads=4))
    encoder = model.encoder.block[0].layer[0].SelfAttention
    weights = encoder.compute_bias(9, 9)[0].softmax(-1)  # [heads, query, key]
    assert weights[0, 1:].argmax(-1).tolist() == list(range(8))
    assert weights[1, :-1].argmax(-1).tolist() == list(range(1, 9))
    decoder = model.decoder.block[0].layer[0].SelfAttention
    weights = decoder.compute_bias(9, 9)[0].tril().softmax(-1)
    assert weights[0, 1:].argmax(-1).tolist() == list(range(8))


def test_copy_init_follows_its_seed_and_stays_trainable():
    a, b = (copy_init(small_t5(50, d_model=32), seed=5) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert all(p.requires_grad for p in a.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"offsets": (-1, 1, 2, -2, 3)}, "more offsets than the model's 4 heads"),
        ({"offsets": (8,)}, "offset 8 has no bucket"),
        ({"decoder_offsets": (1,)}, "offset 1 has no bucket"),
    ],
)
def test_copy_init_refuses_offsets_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        copy_init(small_t5(50, d_model=32, heads=4), **arguments)
