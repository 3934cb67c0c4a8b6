"""Copies of a host have its modules; copies of its model, or of a part of that, have none."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from transformers import GPT2Config, GPT2LMHeadModel

import modgraft as mg
from modgraft.core.layers import STATE


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved,
    "AveragedModel": lambda value: AveragedModel(value).module,
}

IDS = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 1]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


def stirred(host: mg.Host) -> mg.Host:
    generator = torch.Generator().manual_seed(2)
    for p in host.implants.parameters():
        p.data.normal_(generator=generator)
    return host


def gpt2() -> tuple[mg.Host, Tensor]:
    """A host with hooks for padding and for tokens, and what it computes without modules."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        vocab_size=20,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config).eval()
    bare = model(**BATCH).logits.detach()
    host = mg.Host(model).eval()
    host.implant("a", mg.LoRA(rank=2), at="query")
    host.implant("p", mg.Prefix(length=2, counted=True), at="*.attn")
    host.implant("s", mg.SoftPrompt(length=3))
    return stirred(host), bare


@pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))
def test_a_copy_of_the_model_alone_is_the_bare_model(copied: Callable[[Any], Any]) -> None:
    host, bare = gpt2()
    wanted = host(**BATCH).logits
    alone = copied(host.model)
    torch.testing.assert_close(alone(**BATCH).logits, bare, rtol=0, atol=0)
    assert type(alone) is GPT2LMHeadModel
    assert not any(STATE in m.__dict__ for m in alone.modules())
    assert alone.state_dict().keys() == host.model.state_dict().keys()
    assert torch.equal(host(**BATCH).logits, wanted)
    host.use(None)
    host.remove("a")

    again = mg.Host(alone).eval()  # as any other model
    again.implant("b", mg.LoRA(rank=2), at="query")
    again.implant("p", mg.Prefix(length=2, counted=True), at="*.attn", active=False)
    stirred(again)
    close = torch.testing.assert_close
    close(again(**BATCH).logits, again.merge("b")(**BATCH).logits)
    assert not torch.equal(again(**BATCH).logits, bare)


@pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))
def test_a_copy_of_the_host_has_the_modules(copied: Callable[[Any], Any]) -> None:
    host, bare = gpt2()
    twin = copied(host)
    assert type(twin) is mg.Host
    for composition in ("a", "p", "a >> p", "s >> a", ["a", None], None):
        wanted, out = (h(**BATCH, modules=composition).logits for h in (host, twin))
        assert torch.equal(out, wanted), composition
    host.use(None)  # of one is nothing to the other
    host.remove("a")
    twin.use("a")
    assert not torch.equal(twin(**BATCH).logits, bare)
    assert torch.equal(twin.model(**BATCH).logits, twin(**BATCH).logits)
    for name in ("a", "p", "s"):
        twin.remove(name)
    assert torch.equal(twin(**BATCH).logits, bare)
    assert not any(STATE in m.__dict__ for m in twin.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, COPIES["pickle"]])
def test_a_copy_of_one_layer_is_the_bare_layer(copied: Callable[[Any], Any]) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(4, 4)))
    x, bare = torch.randn(3, 4), host(torch.eye(4))
    host.implant("a", mg.LoRA(rank=2), at="0")
    acts = stirred(host)(x)
    layer = copied(host.model[0])  # type: ignore[index]
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(torch.eye(4)), bare)
    assert torch.equal(host(x), acts)
    assert torch.equal(copy.copy(host)(x), acts)


class Twice:
    """A forward that is set on the instance."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * nn.functional.linear(x, self.weight, self.bias)  # type: ignore[attr-defined]


def patched() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.forward = MethodType(Twice.forward, layer)  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize("make", [patched, lambda: parametrizations.weight_norm(nn.Linear(4, 4))])
def test_layers_that_copy_themselves_in_a_way_of_their_own(make: Callable[[], nn.Module]) -> None:
    model, x = nn.Sequential(make()), torch.randn(3, 4)
    bare = model(x).detach()
    host = mg.Host(model)
    host.implant("a", mg.LoRA(rank=2), at="0")
    acts = stirred(host)(x)
    alone, twin = copy.deepcopy(host.model), copy.deepcopy(host)
    host.remove("a")
    assert torch.equal(alone(x), bare)
    assert torch.equal(twin(x), acts)
    twin.remove("a")
    assert torch.equal(twin(x), bare)


def test_a_model_and_its_host_copied_together() -> None:
    host, bare = gpt2()
    both = {"model": host.model, "host": host}
    twin = copy.deepcopy(both)
    assert twin["host"].model is twin["model"]
    wanted = host(**BATCH).logits
    assert not torch.equal(wanted[:, -5:], bare)
    assert torch.equal(twin["host"](**BATCH).logits, wanted)
