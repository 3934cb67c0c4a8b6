"""Effects in a residual run a layer more than once: not with a cache that each run writes to."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import modgraft as mg

IDS = torch.randint(3, 41, (2, 7), generator=torch.Generator().manual_seed(0))


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def mamba() -> nn.Module:
    return MambaForCausalLM(
        MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=2, state_size=4)
    )


@pytest.mark.parametrize(
    ("make", "at"),
    [(llama, "block[residual]"), (mamba, "*.mixer[residual]")],
    ids=["llama", "mamba"],
)
def test_a_cache_is_refused_and_without_one_it_holds(make: type, at: str) -> None:
    host = mg.Host(make()).eval()
    bare = host(input_ids=IDS, modules=None).logits
    host.implant("a", mg.Adapter(width=3), at=at)
    with pytest.raises(mg.ModgraftError, match="use_cache=False"):
        host(input_ids=IDS)
    mask = torch.ones_like(IDS)
    born = host(input_ids=IDS, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(born, bare)
