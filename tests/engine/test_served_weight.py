"""Layers that their host never calls, since another module computes with their weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WavLMConfig,
    WavLMModel,
)

import modgraft as mg
from modgraft.engine.served_weight import ServedWeight


class Reads(nn.Module):
    """Computes with the weights of one layer, and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(x, self.read.weight, self.read.bias).tanh())


def stirred(model: nn.Module, at: Any, module: mg.Computation, active: bool = True) -> mg.Host:
    host = mg.Host(model.double()).eval()
    host.implant("a", module, at=at, active=active)
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0.0, 0.3)
    return host


def mamba() -> nn.Module:
    config = MambaConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3)
    return model


def wavlm() -> nn.Module:
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8,), conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return WavLMModel(config)


def out_of(host: nn.Module, x: Tensor, **kw: Any) -> Tensor:
    out = host(x, **kw)
    return out if isinstance(out, Tensor) else out[0]


IDS = torch.randint(3, 41, (2, 7), generator=torch.Generator().manual_seed(0))
HOSTS = {
    "reads": (Reads, "{read,called}", torch.randn(3, 6, dtype=torch.float64)),
    "mamba": (mamba, "*.{dt_proj,conv1d,in_proj}", IDS),
    "wavlm": (wavlm, "*.attention.*_proj", torch.randn(2, 80, dtype=torch.float64)),
}


@pytest.mark.parametrize(("make", "at", "x"), HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_changed_weight_is_what_others_read(make: Any, at: str, x: Tensor, bias: bool) -> None:
    if bias and make is not Reads:
        pytest.skip("some of its layers have no bias")
    host = stirred(make(), at, mg.LoRA(rank=2, bias=bias))
    bare, plain = out_of(host, x, modules=None), host.merge("a")
    got = out_of(host, x)
    torch.testing.assert_close(got, out_of(plain, x))
    assert (got - bare).abs().max() > 1e-3
    torch.testing.assert_close(out_of(host.model, x), got)  # called without the host
    host.use(None)
    with host.using("0.5*a"):
        torch.testing.assert_close(out_of(host.model, x), out_of(host.merge("0.5*a"), x))
    assert torch.equal(out_of(host, x), bare)
    assert not any(isinstance(v, ServedWeight) for v in copy.deepcopy(host).state_dict().values())


@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_the_module_through_the_weight(training: bool) -> None:
    host, x = stirred(mamba(), "*.dt_proj", mg.LoRA(rank=2)), IDS
    host.train(training)
    if training:
        host.model.activation_checkpointing_enable()
    out_of(host, x).square().sum().backward()
    for layer, place in zip((0, 1), host["a"].places, strict=True):
        twin = copy.deepcopy(host.model)
        host.use(None)
        plain = host.merge(None)
        host.use("a")
        factors = {k: p.detach().clone().requires_grad_() for k, p in place.named_parameters()}
        other = host["a"].places[1 - layer]
        weights = {
            f"backbone.layers.{layer}.mixer.dt_proj.weight": factors["B"] @ factors["A"],
            f"backbone.layers.{1 - layer}.mixer.dt_proj.weight": (other.B @ other.A).detach(),
        }
        tensors = {k: plain.get_parameter(k) + v for k, v in weights.items()}
        loss = torch.func.functional_call(plain.eval(), tensors, (x,))[0].square().sum()
        loss.backward()
        for key, factor in factors.items():
            torch.testing.assert_close(place.get_parameter(key).grad, factor.grad)
        del twin


def test_decoding_reads_it_as_well() -> None:
    host = stirred(mamba(), "*.{dt_proj,conv1d}", mg.LoRA(rank=2))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    want = host.merge("a").generate(IDS, **settings)
    assert torch.equal(host.generate(IDS, **settings), want)
    assert torch.equal(host.model.generate(IDS, **settings), want)


def test_a_compiled_host_reads_it_in_one_graph() -> None:
    host, x = stirred(Reads(), "{read,called}", mg.LoRA(rank=2)), HOSTS["reads"][2]
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    for text in ("a", None, "0.5*a"):
        host.use(text)
        torch.testing.assert_close(compiled(x), host(x))


def test_outside_of_a_call_a_layer_shows_its_own_weight() -> None:
    host = stirred(Reads(), "{read,called}", mg.LoRA(rank=2))
    layer = host.model.read
    assert layer.weight is layer._parameters["weight"]
    with host.using("a"):
        assert layer.weight is layer._parameters["weight"]
    with torch.no_grad():
        layer.weight.zero_()
    assert not layer._parameters["weight"].any()


def test_asking_a_weight_for_its_type_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = T5Config(
        vocab_size=41, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    host = stirred(T5ForConditionalGeneration(config), "down", mg.LoRA(rank=2))
    host(input_ids=IDS, labels=IDS)  # now it is known that its layers are called
    made: list[str] = []
    from modgraft.engine.state import State

    monkeypatch.setattr(State, "with_changes", lambda *a: made.append("Δ"))
    host(input_ids=IDS, labels=IDS)  # its feed-forward asks for wo.weight.dtype
    assert not made


def test_what_cannot_act_there_is_refused() -> None:
    host = stirred(Reads(), "{read,called}", mg.LoRA(rank=2))
    x = HOSTS["reads"][2]
    each, alone = host(x, modules=["a", None, "a"]), host(x, modules="a")
    torch.testing.assert_close(each[[0, 2]], alone[[0, 2]])
    torch.testing.assert_close(each[1], host(x, modules=None)[1])
    host.implant("b", mg.Adapter(width=2), at="read", active=False)
    with pytest.raises(mg.ModgraftError, match=r"'b' acts on the output of read.*never calls"):
        host(x, modules="b")
    host.remove("b")
    host.implant("b", mg.Adapter(width=2), at="called", active=False)
    host(x, modules="b")


class ByName(nn.Module):
    """Reads the tensors of a layer by their names."""

    def __init__(self, read: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.read, self.inner = read, nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.read(self.inner[0])
        return F.linear(x, weight, bias)


NAMED: dict[str, Callable[[nn.Module], Any]] = {
    "get_parameter": lambda layer: map(layer.get_parameter, ("weight", "bias")),
    "parameters": lambda layer: layer.parameters(),
    "named_parameters": lambda layer: dict(layer.named_parameters()).values(),
    "with a prefix": lambda layer: dict(layer.named_parameters(prefix="a")).values(),
    "getattr": lambda layer: [getattr(layer, name) for name, _ in layer.named_parameters()],
    "state_dict": lambda layer: layer.state_dict().values(),
    "keep_vars": lambda layer: layer.state_dict(keep_vars=True).values(),
}


@pytest.mark.parametrize("read", NAMED.values(), ids=NAMED)
def test_a_layer_shows_it_by_any_name(read: Callable[[nn.Module], Any]) -> None:
    host, x = stirred(ByName(read), "inner.0", mg.LoRA(rank=2, bias=True)), HOSTS["reads"][2]
    got, plain = host(x), host.merge("a")
    torch.testing.assert_close(got, plain(x))
    assert (got - host(x, modules=None)).abs().max() > 1e-3
    layer = host.model.inner[0]  # type: ignore[index]
    for values in (layer.parameters(), dict(layer.named_parameters()).values()):
        assert all(one is own for one, own in zip(values, layer._parameters.values(), strict=True))
    assert not any(isinstance(v, ServedWeight) for v in layer.state_dict(keep_vars=True).values())
    if read is not NAMED["state_dict"]:  # which has no graph
        got.sum().backward()
        assert host["a"].places[0].B.grad.abs().max() > 0


class Given(nn.Module):
    """Runs its layer with tensors that ``give`` makes of it."""

    def __init__(self, give: Callable[[nn.Module], dict[str, Tensor]]) -> None:
        super().__init__()
        self.layer, self.give = nn.Linear(6, 6), give

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.layer, self.give(self.layer), (x,))


def test_a_layer_that_the_host_gives_other_weights() -> None:
    """What modules change is refused, since they would change it twice; its own is right."""
    x = HOSTS["reads"][2]
    for give in (
        lambda layer: {"weight": 2 * layer.weight},
        lambda layer: {"weight": layer.weight},
        lambda layer: {"weight": torch.ones(6, 6, dtype=torch.float64), "bias": layer.bias},
    ):
        host = stirred(Given(give), "layer", mg.LoRA(rank=2))
        bare = host.merge(None)(x)
        with pytest.raises(mg.ModgraftError, match="layer is run with another weight"):
            host(x)
        assert torch.equal(host(x, modules=None), bare)
        assert host.model.layer.weight is host.model.layer._parameters["weight"]
    for give in (
        lambda layer: {"bias": 3 * layer.bias},
        lambda layer: {"weight": layer._parameters["weight"].detach()},
        lambda layer: {},
    ):
        host = stirred(Given(give), "layer", mg.LoRA(rank=2))
        torch.testing.assert_close(host(x), host.merge("a")(x))


def test_a_whole_host_may_be_given_other_weights() -> None:
    host, x = stirred(Reads(), "called", mg.LoRA(rank=2)), HOSTS["reads"][2]
    weights = {"model.called.weight": torch.randn(6, 6, dtype=torch.float64)}
    got = torch.func.functional_call(host, weights, (x,))
    with torch.no_grad():
        host.model.called.weight.copy_(weights["model.called.weight"])
    torch.testing.assert_close(got, host(x))


# -- parameters of a layer that others read -------------------------------------------------------


class Held(nn.Module):
    """A layer with a weight, and no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))


class Runs(Held):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T


class ReadsParameters(nn.Module):
    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.some = nn.ParameterList(torch.randn(4, 4) for _ in range(2))
        self.named = nn.ParameterDict({"k": torch.randn(4, 4)})
        self.held, self.runs, self.read = Held(), Runs(), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


READ_BY: dict[str, list[Callable[[Any, Tensor], Tensor]]] = {
    "some.0": [
        lambda m, x: x @ m.some[0].T,
        lambda m, x: x @ m.some[-2].T,
        lambda m, x: F.linear(x, m.some[0]),
        lambda m, x: sum(x @ w.T for w in m.some),
        lambda m, x: sum(x @ w.T for w in m.some[0:1]),
        lambda m, x: x @ torch.stack(list(m.some))[0].T,
        lambda m, x: x @ next(m.some.parameters()).T,
    ],
    "named.k": [
        lambda m, x: x @ m.named["k"].T,
        lambda m, x: x @ m.named.k.T,
        lambda m, x: sum(x @ w.T for _, w in m.named.items()),
        lambda m, x: x @ {**m.named}["k"].T,
    ],
    "held.w": [lambda m, x: x @ m.held.w.T, lambda m, x: x @ m.held.get_parameter("w").T],
    "runs.w": [
        lambda m, x: m.runs(x),
        lambda m, x: x @ m.runs.w.T,
        lambda m, x: m.runs(x) @ m.runs.w,
    ],
}


@pytest.mark.parametrize(("at", "read"), [(at, r) for at, some in READ_BY.items() for r in some])
def test_a_parameter_that_is_read_has_the_change_of_its_merge(
    at: str, read: Callable[[Any, Tensor], Tensor]
) -> None:
    host = mg.Host(ReadsParameters(read).double()).eval()
    host.implant("a", mg.LoRA(rank=2), at=at)
    host.implant("b", mg.LoRA(rank=2), at=at, active=False)
    for p in host.implants.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 4, dtype=torch.float64)
    wanted = {name: host.merge(name)(x) for name in ("a", "b", "a + 0.5*b", None)}
    for name, expected in wanted.items():
        torch.testing.assert_close(host(x, modules=name), expected)
    rows = torch.stack([wanted["a"][0], wanted[None][1], wanted["b"][2]])
    torch.testing.assert_close(host(x, modules=["a", None, "b"]), rows)
    assert not torch.equal(wanted["a"], wanted[None])
    host(x).square().sum().backward()
    place = host["a"].places[0]
    assert place.get_parameter("A").grad.abs().sum() > 0
    twin = copy.deepcopy(host)
    host.remove("a")
    host.remove("b")
    assert torch.equal(host(x), wanted[None])
    torch.testing.assert_close(twin(x), wanted["a"])
    assert not isinstance(twin.state_dict()[f"model.{at}"], ServedWeight)


def test_a_probe_and_a_plan_of_a_parameter_that_is_read() -> None:
    host = mg.Host(ReadsParameters(READ_BY["some.0"][0])).eval()
    host.implant("a", mg.LoRA(rank=2), at="some.0")
    assert "the weight, changed where it is read" in host.plan("a")
    assert not host.probe({"x": torch.randn(3, 4)}).faults
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    nn.init.normal_(host["a"].places[0].get_parameter("B"))
    for name in ("a", None):
        host.use(name)
        torch.testing.assert_close(compiled(torch.ones(3, 4)), host(torch.ones(3, 4)))
