"""One composition an example where a layer runs once for all: a part around it runs for each."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import modgraft as mg

B, N = 3, 5
LISTS = ["a", "b", None]
SIZE = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "intermediate_size": 24}
T5 = {
    "vocab_size": 41, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


def ids(length: int = N, seed: int = 0) -> Tensor:
    return torch.randint(3, 41, (B, length), generator=torch.Generator().manual_seed(seed))


class Tied(nn.Module):
    """Computes with its child's weight, and never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, self.inner.bias)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.tied = nn.Embedding(41, 16), Tied()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.tied(self.words(input_ids)))
        return self.attend(x, x, x)[0].sin()


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(**T5, dropout_rate=0.0))


def llama4() -> nn.Module:
    config = Llama4TextConfig(
        **SIZE, **HEADS, num_key_value_heads=1, head_dim=8, intermediate_size_mlp=24,
        num_local_experts=2, moe_layers=[1],
    )  # fmt: skip
    return Llama4ForCausalLM(config)


def deberta() -> nn.Module:
    config = DebertaV2Config(
        **SIZE, **HEADS, relative_attention=True, position_buckets=4, share_att_key=True,
        pos_att_type=["c2p", "p2c"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return DebertaV2Model(config)


def lfm2() -> nn.Module:
    config = Lfm2Config(
        **SIZE, **HEADS, num_key_value_heads=1, layer_types=["conv", "full_attention"]
    )
    return Lfm2ForCausalLM(config)


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(**SIZE, state_size=4, conv_kernel=3))


CASES: dict[str, tuple[Any, Any]] = {
    "a table of relative positions": (t5, ["*.relative_attention_bias", "query"]),
    "a projection of a table too": (deberta, ["*.query_proj", "*.key_proj", "*.dense"]),
    "a convolution that its parent computes": (mamba, ["*.conv1d", "*.dt_proj", "*.in_proj"]),
    "a convolution with a cache": (lfm2, ["*.conv.conv", "*.in_proj"]),
    "attention with weights of its own": (Reads, ["attend.in_proj_weight", "attend.out_proj"]),
    "a weight that its parent reads": (Reads, ["tied.inner", "words"]),
    "a router": (llama4, ["*.router", "*.q_proj"]),
}


def stirred(name: str, *more: tuple[str, mg.Computation]) -> tuple[mg.Host, dict[str, Any]]:
    """Return a host in float64 with modules ``a`` and ``b``, and a batch of words for it."""
    make, at = CASES[name]
    torch.manual_seed(0)
    host = mg.Host(make().double()).eval()
    for each in "ab":
        host.implant(each, mg.LoRA(rank=1), at=at, active=False)
    for each, module in more:
        host.implant(each, module, active=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in host.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.4)
    batch = {"input_ids": ids()}
    return host, {**batch, "decoder_input_ids": ids(4, 2)} if make is t5 else batch


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("name", CASES)
def test_each_example_is_what_it_is_alone(name: str) -> None:
    host, batch = stirred(name)
    alone = [first(host(**batch, modules=m)) for m in LISTS]
    assert not any(torch.allclose(alone[i], alone[i - 1]) for i in range(B))
    for _ in range(2):  # the second call knows which parts run for each
        out = first(host(**batch, modules=LISTS))
        for i, whole in enumerate(alone):
            torch.testing.assert_close(out[i], whole[i], rtol=1e-9, atol=1e-11)
    for each in "ab":
        host.remove(each)
    kinds = {path: type(m) for path, m in CASES[name][0]().named_modules()}
    assert {path: type(m) for path, m in host.model.named_modules()} == kinds


@pytest.mark.parametrize("name", CASES)
def test_weights_have_their_gradients(name: str) -> None:
    host, batch = stirred(name)
    w = torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.0, 0.0]], dtype=torch.float64)

    def gradients(run: Any) -> tuple[Tensor, ...]:
        weights = w.clone().requires_grad_()
        host.zero_grad()
        run(weights).square().mean().backward()
        own = [p.grad for p in host["a"].parameters() if p.grad is not None]
        assert weights.grad is not None
        return (weights.grad, *own)

    def together(weights: Tensor) -> Tensor:
        return first(host(**batch, modules=mg.Weighted(["a", "b"], weights)))

    def apart(weights: Tensor) -> Tensor:
        rows = [
            first(host(**one, modules=mg.Weighted(["a", "b"], weights[i : i + 1])))
            for i, one in enumerate({k: v[i : i + 1] for k, v in batch.items()} for i in range(B))
        ]
        return torch.cat(rows)

    for found, wanted in zip(gradients(together), gradients(apart), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_mixture_routes_each_example(name: str) -> None:
    mixture = mg.Mixture(["a", "b"], router=mg.Soft(level="example"), width=4)
    host, batch = stirred(name, ("mix", mixture))
    query = torch.randn(B, 1, 4, dtype=torch.float64)
    out = first(host(**batch, modules="mix", side={"example": mg.Side(query)}))
    weights = host["mix"].places[0].route(query[:, 0]).weights  # type: ignore[operator]
    for i, (a, b) in enumerate(weights.tolist()):
        wanted = first(host(**batch, modules=f"{a!r}*a + {b!r}*b"))
        torch.testing.assert_close(out[i], wanted[i], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "name", ["a convolution with a cache", "a convolution that its parent computes"]
)
@torch.no_grad()
def test_caches_hold_what_each_example_has_written(name: str) -> None:
    host, batch = stirred(name)
    host(**batch, modules=LISTS, use_cache=False)
    key = "cache_params" if "parent" in name else "past_key_values"
    after = {"input_ids": ids(1, 5)}

    def continued(modules: Any) -> Tensor:
        begun = host(**batch, modules=modules, use_cache=True)
        return host(**after, **{key: begun[key]}, modules=modules, use_cache=True).logits

    alone = [continued(m) for m in LISTS]
    out = continued(LISTS)
    for i, whole in enumerate(alone):
        torch.testing.assert_close(out[i], whole[i], rtol=1e-9, atol=1e-11)


def test_losses_and_recomputed_blocks() -> None:
    host, batch = stirred("a table of relative positions")
    batch = {"input_ids": batch["input_ids"], "labels": ids(4, 3)}
    apart = [
        host(**{k: v[i : i + 1] for k, v in batch.items()}, modules=m).loss
        for i, m in enumerate(LISTS)
    ]

    def gradients() -> list[Tensor]:
        host.zero_grad()
        host(**batch, modules=LISTS).loss.backward()
        return [p.grad.clone() for p in host["a"].parameters() if p.grad is not None]

    torch.testing.assert_close(host(**batch, modules=LISTS).loss, torch.stack(apart).mean())
    before = gradients()
    host.train()
    host.model.activation_checkpointing_enable()  # type: ignore[operator]
    for found, wanted in zip(gradients(), before, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["a table of relative positions", "a convolution with a cache"])
@torch.no_grad()
def test_hidden_states_and_attentions_are_captured_once(name: str) -> None:
    host, batch = stirred(name)
    host.model.set_attn_implementation("eager")  # type: ignore[operator]
    asked = {**batch, "output_hidden_states": True, "output_attentions": True}
    alone = [host(**asked, modules=m) for m in LISTS]
    out = host(**asked, modules=LISTS)
    for key in (key for key in out if "hidden_states" in key or "attentions" in key):
        assert len(out[key]) == len(alone[0][key])
        for i, whole in enumerate(alone):
            for mine, wanted in zip(out[key], whole[key], strict=True):
                torch.testing.assert_close(mine[i], wanted[i], rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_a_host_whose_parts_are_divided_is_copied_and_pickled() -> None:
    host, batch = stirred("attention with weights of its own")
    wanted = host(**batch, modules=LISTS)
    for other in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        torch.testing.assert_close(other(**batch, modules=LISTS), wanted)
        assert type(other.merge("a")) is Reads
    torch.testing.assert_close(host(**batch, modules=LISTS), wanted)


class Second(nn.Module):
    """Has the batch second, and a part that computes with its child's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.rnn = Tied(), nn.GRU(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.tied(x))[0]


@pytest.mark.parametrize("length", [B, N])
@torch.no_grad()
def test_the_examples_are_where_the_whole_host_has_them(length: int) -> None:
    host, x = mg.Host(Second().double()).eval(), torch.randn(length, B, 16, dtype=torch.float64)
    for each in "ab":
        host.implant(each, mg.LoRA(rank=1), at="tied.inner", active=False)
        host[each].places[0].B.normal_()  # type: ignore[union-attr, operator]
    out = host(x, modules=LISTS)
    for i, own in enumerate(LISTS):
        torch.testing.assert_close(out[:, i], host(x, modules=own)[:, i])


def test_what_cannot_be_divided_says_so() -> None:
    host, batch = stirred("a table of relative positions", ("p", mg.SoftPrompt(length=2)))
    with pytest.raises(mg.ModgraftError, match="no axis of the examples"):
        host(**batch, modules=["a >> p", "b", None])
    host(**batch, modules=LISTS)
    with pytest.raises(mg.ModgraftError, match="call the host once for each composition"):
        host.generate(batch["input_ids"], modules=LISTS, max_new_tokens=2)


def test_a_first_call_draws_the_random_numbers_of_any_other() -> None:
    host = mg.Host(T5ForConditionalGeneration(T5Config(**T5, dropout_rate=0.3))).train()
    for each in "ab":
        host.implant(each, mg.LoRA(rank=1), at=["*.relative_attention_bias", "query"], active=False)

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        out = host(input_ids=ids(), decoder_input_ids=ids(4, 2), modules=LISTS)
        return out.logits, torch.rand(3)

    for found, wanted in zip(run(), run(), strict=True):
        assert torch.equal(found, wanted)


class Leaves(Tied):
    """A part that leaves what it computes in a place of its own, besides its output."""

    def __init__(self, leave: Any) -> None:
        super().__init__()
        self.leave, self.last = leave, None

    def forward(self, x: Tensor, notes: dict[str, Tensor]) -> Any:
        y = super().forward(x)
        return self.leave(self, x, y, notes)


def written(part: Leaves, x: Tensor, y: Tensor, notes: dict[str, Tensor]) -> Tensor:
    return x.add_(y)


def noted(part: Leaves, x: Tensor, y: Tensor, notes: dict[str, Tensor]) -> Tensor:
    notes["y"] = y
    return y.tanh()


def kept(part: Leaves, x: Tensor, y: Tensor, notes: dict[str, Tensor]) -> Tensor:
    part.last = y
    return y.tanh()


def a_loss(part: Leaves, x: Tensor, y: Tensor, notes: dict[str, Tensor]) -> Any:
    return y.tanh(), y.square().mean() if part.training else y


def an_object(part: Leaves, x: Tensor, y: Tensor, notes: dict[str, Tensor]) -> Any:
    return y.tanh(), slice(y)


class Around(nn.Module):
    def __init__(self, leave: Any) -> None:
        super().__init__()
        self.before, self.part = nn.Linear(16, 16), Leaves(leave)

    def forward(self, x: Tensor) -> Tensor:
        out = self.part(self.before(x), {})
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("leave", [written, noted, kept, a_loss, an_object])
def test_what_a_part_leaves_beside_its_output_is_refused(leave: Any) -> None:
    host = mg.Host(Around(leave)).train()
    for name in "ab":
        host.implant(name, mg.LoRA(rank=1), at="part.inner", active=False)
        torch.nn.init.normal_(host[name].places[0].B)
    x = torch.randn(B, N, 16)
    with pytest.raises(mg.ModgraftError, match="call the host once for each composition"):
        host(x, modules=LISTS)
    for name in LISTS:
        host(x, modules=name)


@torch.no_grad()
def test_a_table_of_one_row_is_not_for_each_example() -> None:
    """T5's positions of one token are ``[1, 1, heads]``, which no example has for itself."""
    host, batch = stirred("a table of relative positions")
    batch["decoder_input_ids"] = batch["decoder_input_ids"][:, :1]
    out = host(**batch, modules=LISTS).logits
    for i, own in enumerate(LISTS):
        torch.testing.assert_close(out[i], host(**batch, modules=own).logits[i])
