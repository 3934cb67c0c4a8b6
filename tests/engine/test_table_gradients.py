"""A changed table has the gradient of the layer's own forward, which some rows lack or share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertConfig, BertModel

import modgraft as mg

IDS = torch.tensor([[0, 1, 2, 2, 0], [3, 3, 3, 1, 0], [5, 4, 0, 0, 0]])

TABLES: dict[str, dict[str, Any]] = {
    "padding": {"padding_idx": 0},
    "by frequency": {"scale_grad_by_freq": True},
    "both": {"padding_idx": 0, "scale_grad_by_freq": True},
}
METHODS = {
    "lora": mg.LoRA(rank=2),
    "dora": mg.LoRA(rank=2, dora=True),
    "rescale": mg.Rescale(),
    "sparse": mg.SparseDelta(density=0.5),
}


def stirred(model: nn.Module, module: mg.Computation, at: str) -> mg.Host:
    host = mg.Host(model.double().eval())
    for name in "ab":
        host.implant(name, module, at=at, active=False)
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_()
    return host


def loss(out: Any) -> Tensor:
    out = out if isinstance(out, Tensor) else out[0]
    return (out.square() * torch.arange(1, len(out) + 1)[:, None, None]).sum()


def compare(host: mg.Host, at: str, weights: list[dict[str, float]], **kw: Any) -> None:
    """Compare the gradients of a call with those of f(x; θ + Σ w·Δ), for all examples or each."""
    parameters = list(host.implants.parameters())
    got = torch.autograd.grad(loss(host(IDS, **kw)), parameters, allow_unused=True)
    plain, key = host.merge(None), f"{at}.weight"
    theta = plain.get_parameter(key).detach()
    outs = []
    for rows, own in zip(IDS.split(len(IDS) // len(weights)), weights, strict=True):
        delta = sum(w * host[name].places[0].delta(theta) for name, w in own.items())
        out = functional_call(plain, {key: theta + delta}, (rows,))
        outs.append(out if isinstance(out, Tensor) else out[0])
    want = torch.autograd.grad(loss(torch.cat(outs)), parameters, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_table_alone(method: mg.Computation, table: dict[str, Any]) -> None:
    host = stirred(nn.Sequential(nn.Embedding(6, 4, **table)), method, "0")
    compare(host, "0", [{"a": 1.0}], modules="a")
    compare(host, "0", [{"a": 0.5, "b": -2.0}], modules="0.5*a - 2*b")
    torch.testing.assert_close(host(IDS, modules="a"), host.merge("a")(IDS))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_each_example_with_its_own(method: mg.Computation) -> None:
    host = stirred(nn.Sequential(nn.Embedding(6, 4, padding_idx=0)), method, "0")
    of_each = [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 1.0}]
    compare(host, "0", of_each, modules=["a", "b", "0.5*a + b"])
    compare(host, "0", [{"a": 1.0}, {"b": 1.0}, {"a": 1.0}], modules=["a", "b", "a"])
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 1.0]], dtype=torch.float64)
    compare(host, "0", of_each, modules=mg.Weighted(["a", "b"], weights))


def test_the_words_of_bert() -> None:
    config = BertConfig(
        vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, pad_token_id=0,
    )  # fmt: skip
    host = stirred(BertModel(config), mg.LoRA(rank=2), "embeddings.word_embeddings")
    compare(host, "embeddings.word_embeddings", [{"a": 1.0}], modules="a")


@pytest.mark.parametrize("train", [True, False])
def test_a_mixture_picks_modules_of_a_table(train: bool) -> None:
    host = stirred(nn.Sequential(nn.Embedding(6, 4, padding_idx=0)), mg.LoRA(rank=2), "0")
    host.implant("m", mg.Mixture(["a", "b"], router=mg.TopK(1, level="token")), active=False)
    host.train(train)
    picked, either = host(IDS, modules="m"), [host(IDS, modules=name) for name in "ab"]
    off = torch.stack([(picked - one).abs().amax(-1) for one in either])
    assert (off.amin(0) < 1e-9).all()
    host(IDS, modules="m").square().sum().backward()
    for name in "ab":
        assert not host[name].places[0].B.grad[0].any()
