"""Weights that something computes, or that are read by code which is no function of torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import modgraft as mg

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, go: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l1, self.l2 = nn.Linear(4, 5), nn.Linear(5, 2)
        self.go = go or (lambda s, x: s.l2(torch.tanh(s.l1(x))))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.go(self, x)


def host_of(net: nn.Module, at: str = "l1") -> mg.Host:
    host = mg.Host(net).eval()
    host.implant("a", mg.LoRA(rank=2), at=at)
    for parameter in host["a"].parameters():
        nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(2))
    return host


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "weight": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_g": weight_norm,
    "weight_u": spectral_norm,
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*deprecated")
@torch.no_grad()
def test_a_weight_that_a_hook_computes(name: str, tmp_path: Path) -> None:
    net = Net()
    HOOKS[name](net.l1)
    host = host_of(net)
    merged = host.merge("a")  # before the first call
    torch.testing.assert_close(merged(X), host(X))
    assert (host(X) - host(X, modules=None)).abs().max() > 0.01
    torch.testing.assert_close(host.merge("a")(X), host(X))
    assert not host.probe({"x": X}).faults
    host.save("a", tmp_path / "a")
    stored = {"weight": "weight_orig", "weight_g": "weight_v", "weight_u": "weight_orig"}[name]
    with pytest.raises(mg.ModgraftError, match=rf"l1.{stored}: a hook.*at='l1' changes the weight"):
        host.implant("b", mg.LoRA(rank=2), at=f"l1.{stored}")


def test_an_rnn_with_a_weight_that_a_hook_computes_is_refused() -> None:
    net = Net(lambda s, x: s.r(x)[0])
    net.r = prune.l1_unstructured(nn.LSTM(4, 6).double(), "weight_hh_l0", 0.5)
    with pytest.raises(mg.ModgraftError, match="computes this LSTM's weight_hh_l0 before each"):
        mg.Host(net).implant("a", mg.LoRA(rank=2), at="r.weight_ih_l0")


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


def scripted(x: Tensor, w: Tensor) -> Tensor:
    example = torch.randn(5, 4, dtype=torch.float64)
    return torch.jit.trace(lambda x, w: x @ w.t(), (x.detach(), example))(x, w)


READ: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a function": lambda s, x: F.linear(x, s.l1.weight),
    "vmap": lambda s, x: torch.vmap(lambda w: x @ w, out_dims=1)(s.l1.weight),
    "TorchScript": lambda s, x: scripted(x, s.l1.weight),
    "an autograd function": lambda s, x: Product.apply(x, s.l1.weight),
    "checkpoint": lambda s, x: checkpoint(F.linear, x, s.l1.weight, use_reentrant=False),
    "reentrant checkpoint": lambda s, x: checkpoint(F.linear, x, s.l1.weight, use_reentrant=True),
    "as a parameter": lambda s, x: (
        F.linear(x, s.l1.weight) if isinstance(s.l1.weight, nn.Parameter) else x
    ),
}


@pytest.mark.parametrize("how", READ)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_weight_that_any_code_reads_is_the_changed_one(how: str) -> None:
    host = host_of(Net(lambda s, x: s.l2(READ[how](s, x).tanh())))
    out = host(X)
    torch.testing.assert_close(out, host.merge("a")(X))
    out.square().sum().backward()
    found = [parameter.grad for parameter in host["a"].parameters()]
    host.zero_grad()
    other = host_of(Net())
    with torch.no_grad():
        other.model.l1.bias.zero_()
    other(X).square().sum().backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in other["a"].parameters()])


BESIDE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a function": lambda s, x: F.linear(x, s.l1.weight),
    "vmap": lambda s, x: torch.vmap(lambda w: x @ w, out_dims=1)(s.l1.weight),
    "TorchScript": lambda s, x: scripted(x, s.l1.weight),
    "an autograd function": lambda s, x: Product.apply(x, s.l1.weight),
    "copied": lambda s, x: x @ torch.zeros(5, 4, dtype=x.dtype).copy_(s.l1.weight).T,
    "added": lambda s, x: x @ torch.zeros(5, 4, dtype=x.dtype).add_(s.l1.weight).T,
    "filled": lambda s, x: x @ _filled(x, s.l1.weight).T,
}


def _filled(x: Tensor, weight: Tensor) -> Tensor:
    new = torch.zeros(5, 4, dtype=x.dtype)
    new[:] = weight
    return new


@pytest.mark.parametrize("how", BESIDE)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_weight_of_a_layer_that_is_also_called(how: str) -> None:
    host = host_of(Net(lambda s, x: s.l2((s.l1(x) + BESIDE[how](s, x)).tanh())))
    merged = host.merge("a")
    with torch.no_grad():
        for _ in range(2):  # at first it is not known yet that the layer is called
            torch.testing.assert_close(host(X), merged(X))
    if how in ("vmap", "TorchScript", "an autograd function"):
        words = "TorchScript int" if how == "TorchScript" else "l1, which this host also calls"
        with pytest.raises((mg.ModgraftError, RuntimeError), match=words):
            host(X).sum().backward()
        flops = FlopCounterMode(display=False)  # which looks at what autograd has passed on
        with flops, pytest.raises((mg.ModgraftError, RuntimeError), match=words):
            host(X).sum().backward()
        return
    host(X).square().sum().backward()
    found = [parameter.grad for parameter in host["a"].parameters()]
    host.zero_grad()
    other = host_of(Net(lambda s, x: s.l2((s.l1(x) + F.linear(x, s.l1.weight)).tanh())))
    other(X).square().sum().backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in other["a"].parameters()])


@torch.no_grad()
def test_a_layer_that_was_moved_or_parametrised_after_the_implant(tmp_path: Path) -> None:
    def calls(host: mg.Host) -> list[Callable[[], Any]]:
        return [
            lambda: host.merge("a"),
            lambda: host.probe({"x": X}),
            lambda: host.save("a", tmp_path / "a"),
        ]

    net = Net()
    host = host_of(net)
    net.was, net.l1 = net.l1, nn.Linear(4, 5).double()
    for call in calls(host):
        with pytest.raises(mg.ModgraftError, match="l1, the Linear that 'a' acts in, was moved or"):
            call()
    net = Net()
    host = host_of(net)
    wanted = host(X)
    net.l1 = nn.Sequential(net.l1)
    assert torch.equal(host(X), wanted)  # where it acts, it acts
    for call in calls(host):
        with pytest.raises(mg.ModgraftError, match="l1, the Linear that 'a' acts in, was moved or"):
            call()
    net = Net()
    host = host_of(net)
    parametrizations.weight_norm(net.l1)
    for call in (lambda: host(X), lambda: host.remove("a")):
        with pytest.raises(mg.ModgraftError, match="l1 is of another class since 'a' was implant"):
            call()
    torch.nn.utils.parametrize.remove_parametrizations(net.l1, "weight")
    host(X)
    net = Net()
    host = host_of(net)
    net.l1 = nn.DataParallel(net.l1)
    for call in calls(host):
        with pytest.raises(mg.ModgraftError, match="l1, the Linear that 'a' acts in, was moved or"):
            call()
