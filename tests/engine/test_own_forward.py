"""Layers whose forward is their own: f(x; θ + Δ) is that forward with other weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils import weight_norm as weight_norm_by_hook
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

import modgraft as mg

SMALL = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama() -> nn.Module:
    config = LlamaConfig(**SMALL, num_key_value_heads=1, intermediate_size=24)
    return LlamaForCausalLM(config).eval()


def stirred(model: nn.Module, at: Any, *names: str, **kw: Any) -> mg.Host:
    """Return a host in float64 with LoRA modules at ``at``, the first of them in force."""
    host = mg.Host(model.double()).eval()
    for name in names:
        host.implant(name, mg.LoRA(rank=2, **kw), at=at, active=name == names[0])
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0.0, 0.3)
    return host


def edited(host: mg.Host, weights: dict[str, float], x: Any, **kw: Any) -> Any:
    """Run the bare model with θ + Σ w·BA for the weight of each site, written out."""
    tensors: dict[str, Tensor] = {}
    bare = copy.deepcopy(host)
    for name, w in weights.items():
        for path, place in zip(host[name].paths, host[name].places, strict=True):
            key = f"{path}.weight" if path else "weight"
            theta = tensors.get(key, bare.model.get_parameter(key))
            tensors[key] = theta + w * (place.B @ place.A).view(theta.shape)
    for name in reversed(list(bare.implants)):
        bare.remove(name)
    return functional_call(bare.model, tensors, (x,), kw)


def ids(rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, 41, (rows, length), generator=torch.Generator().manual_seed(0))


# -- a forward on the instance --------------------------------------------------------------------


def test_accelerates_hooks_before_and_after_implanting() -> None:
    host = stirred(llama(), ["query", "down"], "a")
    want = host(ids()).logits
    dispatch_model(host.model, {"": "cpu"}, force_hooks=True)
    torch.testing.assert_close(host(ids()).logits, want)
    remove_hook_from_submodules(host.model)
    torch.testing.assert_close(host(ids()).logits, want)

    saved = host["a"].state_dict()
    host.remove("a")
    dispatch_model(host.model, {"": "cpu"}, force_hooks=True)
    host.implant("a", mg.LoRA(rank=2), at=["query", "down"])
    host["a"].load_state_dict(saved)
    torch.testing.assert_close(host(ids()).logits, want)
    torch.testing.assert_close(host.merge("a")(ids()).logits, want)
    host.zero_grad()
    host(ids()).logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in host["a"].parameters())
    remove_hook_from_submodules(host.model)  # what they put back is the layer's own forward
    torch.testing.assert_close(host(ids()).logits, want)
    bare = host(ids(), modules=None).logits
    host.remove("a")
    assert torch.equal(host(ids()).logits, bare)


def test_a_prompt_acts_in_a_model_with_a_forward_of_its_own() -> None:
    host = mg.Host(llama())
    host.implant("p", mg.SoftPrompt(length=2))
    want = host(ids()).logits
    dispatch_model(host.model, {"": "cpu"}, force_hooks=True)
    torch.testing.assert_close(host(ids()).logits, want)
    again = mg.Host(host.model)
    saved = host["p"].state_dict()
    host.remove("p")
    again.implant("p", mg.SoftPrompt(length=2))
    again["p"].load_state_dict(saved)
    torch.testing.assert_close(again(ids()).logits, want)


def test_a_forward_that_is_patched_later_is_run_with_the_changed_weight() -> None:
    host = stirred(nn.Sequential(nn.Linear(6, 4)), "0", "a")
    x = torch.randn(5, 6, dtype=torch.float64)
    layer = host.model[0]
    layer.forward = lambda value: F.linear(value, layer.weight, layer.bias).tanh()
    theta, place = layer._parameters, host["a"].places[0]
    changed = F.linear(x, theta["weight"] + place.B @ place.A, theta["bias"]).tanh()
    torch.testing.assert_close(host(x), changed)
    with pytest.raises(mg.ModgraftError, match="holds on to this Linear"):
        host.merge("a")
    torch.testing.assert_close(host(x, modules=None), F.linear(x, **dict(theta)).tanh())


# -- a forward of another class -------------------------------------------------------------------


class Standardised(nn.Conv2d):
    """Norms its weight before it convolves, as the layers of BiT do."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, padding=1)


def gemma() -> nn.Module:
    config = Gemma3TextConfig(
        **SMALL, num_key_value_heads=1, intermediate_size=24, head_dim=8, tie_word_embeddings=False
    )
    return Gemma3ForCausalLM(config).eval()


def opt() -> nn.Module:
    return OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0))


ODD = [
    pytest.param(gemma, "model.embed_tokens", ids, id="scaled embedding"),
    pytest.param(opt, "model.decoder.embed_positions", ids, id="position table"),
    pytest.param(
        lambda: nn.Sequential(Standardised(2, 4, 3)),
        "0",
        lambda: torch.randn(3, 2, 5, 5, dtype=torch.float64),
        id="standardised convolution",
    ),
    pytest.param(lambda: nn.Sequential(nn.Embedding(41, 8, max_norm=0.5)), "0", ids, id="max_norm"),
]


def logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize(("make", "at", "batch"), ODD)
def test_the_layers_own_forward_runs_with_the_changed_weight(
    make: Callable[[], nn.Module], at: str, batch: Callable[[], Tensor]
) -> None:
    host, x = stirred(make(), at, "a", "b"), batch()
    host(x, modules=None)  # max_norm writes to the rows that it looks up

    def at_modules(modules: Any) -> Tensor:
        return logits(host(x, modules=modules))

    want = {
        text: logits(edited(host, weights, x))
        for text, weights in {
            "a": {"a": 1.0}, "0.5*b": {"b": 0.5}, "a + 2*b": {"a": 1.0, "b": 2.0},
        }.items()
    }  # fmt: skip
    for text, expected in want.items():
        torch.testing.assert_close(at_modules(text), expected)
        torch.testing.assert_close(logits(host.merge(text)(x)), expected)
    each = at_modules(["a", "0.5*b", None])
    torch.testing.assert_close(each[0], want["a"][0])
    torch.testing.assert_close(each[1], want["0.5*b"][1])
    torch.testing.assert_close(each[2], at_modules(None)[2])


@pytest.mark.parametrize(("make", "at", "batch"), ODD[:2])
def test_weights_of_each_example_add_effects_there(
    make: Callable[[], nn.Module], at: str, batch: Callable[[], Tensor]
) -> None:
    host, x = stirred(make(), at, "a", "b"), batch()
    weights = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]], dtype=torch.float64)
    out = logits(host(x, modules=mg.Weighted(["a", "b"], weights)))
    for row, (a, b) in enumerate(weights.tolist()):
        expected = logits(edited(host, {"a": a, "b": b}, x))[row]  # a table is linear in its weight
        torch.testing.assert_close(out[row], expected)


def test_a_mixture_of_them_is_of_their_outputs() -> None:
    host, x = stirred(gemma(), "model.embed_tokens", "a", "b"), ids()
    host.implant("mix", mg.Mixture(["a", "b"], router=mg.Soft(level="token")), active=False)
    host.implants.double()
    with torch.no_grad():
        for p in host["mix"].parameters():  # a router that weights all alike
            p.zero_()
    out = logits(host(x, modules="mix"))
    assert not torch.allclose(out, logits(host(x, modules=None)))
    half = logits(edited(host, {"a": 0.5, "b": 0.5}, x))
    torch.testing.assert_close(out, half)


def test_a_compiled_host_runs_it_too() -> None:
    host, x = stirred(gemma(), ["model.embed_tokens", "query"], "a", "b"), ids()
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    for text in ("a", "b", "a + 0.5*b", None):
        host.use(text)
        torch.testing.assert_close(compiled(x).logits, host(x).logits)


def test_rescale_is_a_change_of_the_weight_there() -> None:
    host = mg.Host(gemma().double()).eval()
    host.implant("s", mg.Rescale(), at="model.embed_tokens")
    with torch.no_grad():
        host["s"].places[0].phi.normal_()
    torch.testing.assert_close(host(ids()).logits, host.merge("s")(ids()).logits)


# -- weights that are computed --------------------------------------------------------------------


def pruned(layer: nn.Linear) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm, weight_norm_by_hook, pruned])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_computed_weight_is_changed_and_merged(norm: Callable[..., nn.Module]) -> None:
    host = stirred(nn.Sequential(norm(nn.Linear(6, 4))), "0", "a")
    x = torch.randn(5, 6, dtype=torch.float64)
    bare, place = host(x, modules=None), host["a"].places[0]
    expected = bare + x @ (place.B @ place.A).T
    torch.testing.assert_close(host(x), expected)
    plain = host.merge("a")
    torch.testing.assert_close(plain(x), expected)
    assert type(plain[0]) is nn.Linear
    assert set(plain.state_dict()) == {"0.weight", "0.bias"}
    torch.testing.assert_close(host(x), expected)  # the host is as it was
    assert torch.equal(host(x, modules=None), bare)


# -- hosts that write to what a layer puts out ----------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 64, 512])
def test_outputs_may_be_written_to_in_place(rows: int) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            y += x
            return F.relu(self.two(y), inplace=True)

    host = stirred(Adds(), "{one,two}", "a")
    x = torch.randn(rows, 8, dtype=torch.float64)
    host(x).sum().backward()
    got = [p.grad for p in host["a"].parameters()]
    want = torch.autograd.grad(edited(host, {"a": 1.0}, x).sum(), list(host["a"].parameters()))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


# -- half precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_born_as_the_identity_where_the_input_is_not_contiguous(grad: bool) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(32, 32).bfloat16())).eval()
    x = torch.randn(3, 32, 16).bfloat16().transpose(1, 2)
    with torch.set_grad_enabled(grad):
        bare = host(x)
        host.implant("a", mg.LoRA(rank=2), at="0")
        assert torch.equal(host(x), bare)


def test_a_host_that_halves_its_weights_in_evaluation_is_refused() -> None:
    config = RwkvConfig(vocab_size=41, hidden_size=16, num_hidden_layers=8, rescale_every=6)
    host = mg.Host(RwkvForCausalLM(config))
    with pytest.raises(mg.ModgraftError, match=r"set model\.config\.rescale_every = 0"):
        host.implant("a", mg.LoRA(rank=2), at="*.attention.output")
    host.model.config.rescale_every = 0
    host.implant("a", mg.LoRA(rank=2), at="*.attention.output")
    with torch.no_grad():
        for p in host["a"].parameters():
            p.normal_(0.0, 0.3)
    train = host.train()(ids()).logits
    torch.testing.assert_close(host.eval()(ids()).logits, train)


def test_weights_that_are_offloaded_between_calls() -> None:
    host = stirred(llama(), ["query", "down"], "a")
    want, saved = host(ids()).logits, host["a"].state_dict()
    host.remove("a")
    cpu_offload(host.model, execution_device=torch.device("cpu"))
    assert host.model.lm_head.weight.is_meta
    host.implant("a", mg.LoRA(rank=2), at=["query", "down"])
    host["a"].double().load_state_dict(saved)
    torch.testing.assert_close(host(ids()).logits, want)
    assert {p.device.type for p in host["a"].parameters()} == {"cpu"}
