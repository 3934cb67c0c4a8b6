"""Effects in a residual run a layer more than once, but the last time on copies of its caches."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

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


def t5() -> nn.Module:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=41, decoder_start_token_id=0, **shape))


HOSTS = {
    "llama": (llama, "block[residual]"),
    "mamba": (mamba, "*.mixer[residual]"),
    "t5": (t5, "block[residual]"),
}


@pytest.mark.parametrize(("make", "at"), HOSTS.values(), ids=HOSTS)
def test_with_a_cache_it_is_what_it_is_without(make: type, at: str) -> None:
    torch.manual_seed(0)
    host = mg.Host(make()).eval()
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    labels = {"labels": IDS} if make is t5 else {}
    bare = host(**given, **labels).logits
    host.implant("a", mg.Adapter(width=3), at=at)
    torch.testing.assert_close(host(**given, **labels).logits, bare)  # born as the identity
    for parameter in host["a"].parameters():
        nn.init.normal_(parameter, std=0.5)
    cached = host(**given, **labels, use_cache=True).logits
    torch.testing.assert_close(cached, host(**given, **labels, use_cache=False).logits)
    assert not torch.allclose(cached, bare, atol=1e-2)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = host.generate(**given, **how)
    assert torch.equal(written, host.generate(**given, **how, use_cache=False))


def test_gradients_pass_through_the_copies() -> None:
    torch.manual_seed(0)
    host = mg.Host(llama().double())
    host.implant("a", mg.Adapter(width=3), at="block[residual]")
    for parameter in host["a"].parameters():
        nn.init.normal_(parameter, std=0.5)
    found = []
    for cache in (True, False):
        host.zero_grad()
        host(input_ids=IDS, labels=IDS, use_cache=cache).loss.backward()
        found.append([p.grad.clone() for p in host["a"].parameters()])
    torch.testing.assert_close(*found)


class Counter:
    """Something that a layer may write to."""


class Stateful(nn.Linear):
    def forward(self, x: torch.Tensor, state: Counter) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Stateful(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, Counter())


def test_what_cannot_be_copied_is_refused() -> None:
    host = mg.Host(Around())
    host.implant("a", mg.Adapter(width=2), at="inner[residual]")
    with pytest.raises(mg.ModgraftError, match="called with a Counter, which every run may write"):
        host(torch.randn(2, 3, 4))
