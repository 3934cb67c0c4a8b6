"""One product with changed weights equals the layer plus each effect, gradients included."""

from __future__ import annotations

from itertools import product as product_of
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import modgraft as mg
from common import WEIGHTS
from modgraft.engine import own_forward, run
from modgraft.engine.kernels import linear, low_rank
from modgraft.engine.kernels.linear import Change, one_product
from modgraft.engine.kernels.low_rank import LowRank
from modgraft.engine.own_forward import by_weight

METHODS = {**WEIGHTS, "rslora": lambda: mg.LoRA(rank=3, rslora=True, bias=True)}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 12), "0"),
    "conv1d": (lambda: Conv1D(12, 6), "0"),
    "part": (lambda: Conv1D(12, 6), "0[1/3]"),
}


def host_with(make: Any, at: str, dtype: torch.dtype = torch.float64, **modules: Any) -> mg.Host:
    torch.manual_seed(0)
    host = mg.Host(nn.Sequential(make()).to(dtype))
    for name, module in modules.items():
        host.implant(name, module, at=at)
    for p in host.implants.parameters():
        nn.init.normal_(p, 0.0, 0.3)
    return host


def results(host: mg.Host, x: Tensor, composition: str) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = host(x, modules=composition)
    learn = [p for p in host.parameters() if p.requires_grad]
    grads = torch.autograd.grad(
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(),
        [x, *learn],
        allow_unused=True,
    )
    return [y.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("composition", ["m", "-0.5*m", "m + 2*n", "m >> n >> low"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_layer_and_its_effects(
    method: str, layer: str, composition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, at = LAYERS[layer]
    modules = {"m": METHODS[method](), "n": METHODS[method](), "low": mg.LoRA(rank=2)}
    host = host_with(make, at, **modules)
    many = torch.randn(2, 9, 6, dtype=torch.float64)
    few = many[:, :1, :]  # of which effects are cheaper
    for host.model[0].weight.requires_grad, x in product_of((False, True), (many, few)):
        fast = results(host, x, composition)
        with monkeypatch.context() as patch:
            patch.setattr(run, "one_product", lambda *a: None)
            slow = results(host, x, composition)
        assert len(fast) == len(slow)
        for one, other in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("cached", [2**21, 80])  # all of G at once, or two rows of it
@pytest.mark.parametrize("vector", [16, 3])  # a rank below it is computed the other way round
def test_gradcheck(
    transposed: bool, twice: bool, cached: int, vector: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "CACHED", cached)
    monkeypatch.setattr(low_rank, "VECTOR", vector)
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, b, B, A = leaf(2, 3, 4), leaf(5), leaf(5, 2), leaf(2, 4)
    W = leaf(4, 5).T if transposed else leaf(5, 4)
    check = torch.autograd.gradgradcheck if twice else torch.autograd.gradcheck
    assert check(lambda *given: LowRank.apply(given[0], (0.7,), *given[1:])[0], (x, W, b, B, A))
    last = (x[0, 0], W.detach(), None, B, A)
    assert check(lambda *given: LowRank.apply(given[0], (0.7,), *given[1:])[0], last)
    beside = (leaf(7, 4), None, leaf(7, 3), leaf(3, 4))
    both = (x, W, b, B, A, *beside)
    assert check(lambda *given: LowRank.apply(given[0], (0.7, -2.0), *given[1:])[:2], both)


@pytest.mark.parametrize("read", [(0,), (1,), (0, 1)])
def test_layers_whose_output_nobody_reads(read: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, W, V, b, B, D, A, C = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 4), (5, 4), (6, 4), (5,), (5, 2), (6, 3), (2, 4), (3, 4))
    )
    ys = LowRank.apply(x, (0.7, 0.7), W, b, B, A, V, None, D, C)
    alone = (x @ (W + 0.7 * B @ A).T + b, x @ (V + 0.7 * D @ C).T)
    leaves = (x, W, b, B, A, V, D, C)
    for found, wanted in zip(
        torch.autograd.grad(sum(ys[i].sin().sum() for i in read), leaves),
        torch.autograd.grad(
            sum(alone[i].sin().sum() for i in read), leaves, materialize_grads=True
        ),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def product(host: mg.Host, x: Tensor, *names: str) -> Tensor | None:
    layer = host.model[0]
    changes = [Change(host[name].places[0], 1.0, None) for name in names]
    return one_product(layer, lambda x: own_forward.run(layer, (), (x,), {}), x, changes)


def test_keeps_nothing_of_the_size_of_the_weight() -> None:
    """Backward keeps the input, the host's weight, the factors and x Aᵀ, and nothing else."""
    host = host_with(lambda: nn.Linear(32, 24), "0", torch.float32, m=mg.LoRA(rank=2))
    x = torch.randn(50, 32, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        host(x)
    own = {x.data_ptr(), host.model[0].weight.data_ptr()}
    assert own <= {t.data_ptr() for t in kept}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) <= 2 * (50 + 32 + 24)


def test_few_tokens_take_the_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """The changed weight is computed only where N·(in + out) ≥ in·out, for N tokens."""
    modules = {"m": mg.SparseDelta(), "low": mg.LoRA(rank=2), "b": mg.LoRA(rank=2, bias=True)}
    host = host_with(lambda: nn.Linear(30, 60), "0", torch.float32, **modules)
    for names in (["m"], ["m", "low"]):
        assert product(host, torch.randn(19, 30), *names) is None
        assert product(host, torch.randn(1, 20, 30), *names) is not None
    for names in (["low"], ["b"], ["b", "low"]):
        x, plain = torch.randn(19, 30), host.merge(" + ".join(names))
        torch.testing.assert_close(product(host, x, *names), plain(x))
        assert product(host, torch.randn(1, 20, 30), *names) is not None
    monkeypatch.setattr(linear, "LowRank", None)  # fails if it is used
    with torch.profiler.profile() as profile:
        y = product(host, x := torch.randn(19, 30), "low")
    products = [e for e in profile.events() if e.name in ("aten::addmm", "aten::mm")]
    assert len(products) == 3
    layer, place = host.model[0], host["low"].places[0]
    torch.testing.assert_close(y, host(x, modules=None) + place.effect(x, layer, layer.weight))


def test_where_rounding_or_dropout_forbids_it() -> None:
    modules = {"m": mg.LoRA(2, dropout=0.5), "n": mg.SparseDelta()}
    host = host_with(lambda: nn.Linear(6, 12), "0", torch.float32, **modules).eval()
    x = torch.randn(50, 6)
    assert product(host, x, "m") is not None
    assert product(host, x, "n") is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(host, x, "m") is None
        assert product(host, x, "n") is None
    assert product(host.train(), x, "m") is None
    host = host.eval().bfloat16()
    assert product(host, x.bfloat16(), "m") is not None  # in factors nothing is lost
    assert product(host, x.bfloat16(), "n") is None


@pytest.mark.parametrize("module", [mg.LoRA(rank=1), mg.SparseDelta()], ids=["low", "dense"])
def test_a_small_change_is_not_lost_in_half_precision(module: mg.Computation) -> None:
    """Each entry of Δ is a 2000th of its weight: W + Δ rounded to 8 bits would be W."""
    host = mg.Host(nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()).eval()
    host.implant("m", module, at="0")
    starts = {"A": 0.02, "B": 0.025, "values": 0.0005}
    with torch.no_grad():
        host.model[0].weight.copy_(torch.tensor([1.0, -1.0]).repeat(32))  # f(1, 1, …) = 0
        for name, parameter in host["m"].places[0].named_parameters():
            parameter.fill_(starts[name])
    y = host(torch.ones(64, 64).bfloat16())
    torch.testing.assert_close(y.float(), torch.full((64, 64), 64 * 0.0005), rtol=0.02, atol=0)


def test_another_forward_or_weight_is_left_to_itself() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Packed(nn.Parameter):
        """Stands for a quantised weight."""

    x = torch.randn(50, 6)
    host = host_with(lambda: Doubled(6, 12), "0", torch.float32, m=mg.LoRA(2))
    assert by_weight(host.model[0]) is None
    plain = host.merge("m")
    torch.testing.assert_close(host(x), 2 * F.linear(x, plain[0].weight, plain[0].bias))
    host = host_with(lambda: nn.Linear(6, 12), "0", torch.float32, m=mg.LoRA(2))
    host.model[0].weight = Packed(host.model[0].weight.detach(), requires_grad=False)
    assert product(host, x, "m") is None


def test_rescaling_runs_the_layer_once() -> None:
    for where in ("output", "input"):
        host = host_with(lambda: nn.Linear(6, 12), "0", m=mg.Rescale(where=where))
        x = torch.randn(5, 6, dtype=torch.float64)
        host(x)  # the first call is looked at, and the profiler would see that
        with torch.profiler.profile() as profile:
            host(x)
        products = [e for e in profile.events() if e.name in ("aten::addmm", "aten::mm")]
        assert len(products) == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_example_by_example() -> None:
    host = host_with(lambda: nn.Linear(6, 12), "0", m=mg.LoRA(2))
    own, x = dict(host.named_parameters()), torch.randn(4, 6, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(host, parameters, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(own, x[:, None])
    for i, row in enumerate(x):
        host.zero_grad()
        loss(own, row[None]).backward()
        for name, parameter in host["m"].named_parameters(prefix="implants.m"):
            torch.testing.assert_close(each[name][i], parameter.grad)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning")
def test_forward_mode_and_a_batch_of_modules(rows: int, grad: bool) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(8, 8)).double())
    host.implant("a", mg.LoRA(rank=2), at="0")
    for p in host["a"].parameters():
        nn.init.normal_(p)
    x, plain = torch.randn(rows, 8, dtype=torch.float64), host.merge("a")
    torch.testing.assert_close(jvp(host, (x,), (x,))[1], jvp(plain, (x,), (x,))[1])
    own = {name: p for name, p in host.named_parameters() if "implants" in name}
    some = {name: torch.stack([p, 2 * p]).detach() for name, p in own.items()}
    with torch.set_grad_enabled(grad):
        both = vmap(lambda given: functional_call(host, given, (x,)))(some)
        alone = [functional_call(host, {n: p[i] for n, p in some.items()}, (x,)) for i in (0, 1)]
    torch.testing.assert_close(both, torch.stack(alone))
