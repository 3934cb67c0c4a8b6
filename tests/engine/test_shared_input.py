"""Layers with the same input and low-rank changes run as one product.

Outputs and gradients are bit by bit those of each layer run alone. A layer that gets another input
runs alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from contract.hosts import HOSTS, tensor_of
from modgraft.engine import shared_input
from modgraft.engine.kernels.low_rank import LowRank
from modgraft.engine.state import STATE

SHARED = {"bert": ["query", "key", "value"], "t5": ["query", "key", "value", "up"]}
SHARED |= {"llama": ["query", "key", "value", "up"], "vit": ["query", "key", "value"]}


def host_of(name: str, at: Any = None, **modules: mg.Computation) -> tuple[mg.Host, dict[str, Any]]:
    case = HOSTS[name]
    host = mg.Host(case.model().double())
    for key, module in (modules or {"m": mg.LoRA(rank=2, alpha=3)}).items():
        host.implant(key, module, at=at or SHARED[name])
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}
    # enough tokens for a changed weight to be cheaper than an effect beside it
    return host.eval(), {k: torch.cat([v] * 6) for k, v in batch.items()}


def results(host: mg.Host, batch: dict[str, Any]) -> list[Tensor]:
    host.zero_grad()
    y = tensor_of(host(**batch))
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad for p in host.parameters() if p.grad is not None)]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many layers each low-rank product covered."""
    made: list[int] = []
    apply = LowRank.apply

    def counted(x: Tensor, scales: tuple[float, ...], *of: Tensor) -> Any:
        made.append(len(scales))
        return apply(x, scales, *of)

    monkeypatch.setattr(LowRank, "apply", counted)
    return made


def alone(host: mg.Host) -> None:
    for module in host.model.modules():
        if STATE in module.__dict__:
            module.__dict__[STATE].same_input = ()


@pytest.mark.parametrize("composition", ["m", "-0.5*m", "m + 2*n", "m >> n"])
@pytest.mark.parametrize("name", SHARED)
def test_as_each_alone(name: str, composition: str, nodes: list[int]) -> None:
    host, batch = host_of(name, m=mg.LoRA(rank=2, alpha=3), n=mg.LoRA(rank=3, bias=name == "bert"))
    with host.using(composition):
        one = results(host, batch)
        assert max(nodes) > 1
        joined = len(nodes)
        nodes.clear()
        alone(host)
        other = results(host, batch)
    assert set(nodes) == {1}
    assert len(nodes) > joined
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_query_key_and_value_are_one_node_each_layer(nodes: list[int]) -> None:
    host, batch = host_of("bert")
    results(host, batch)
    assert nodes == [3, 3]


def test_another_kind_at_one_of_them(nodes: list[int]) -> None:
    """A change of another kind runs by itself, after the shared product or instead of it."""
    host, batch = host_of("bert")
    host.implant("scale", mg.Rescale(), at="key")
    host.implant("bottle", mg.Adapter(reduction=4), at="value", active=False)
    host.use("m >> bottle")
    results(host, batch)
    assert nodes == [3, 3]
    host.use("scale >> m")
    nodes.clear()
    results(host, batch)
    assert nodes == [2, 2]  # at the key, Rescale comes first and LoRA is added as an effect


def test_sites_that_come_and_go(nodes: list[int]) -> None:
    host, batch = host_of("bert", at="query")
    results(host, batch)
    assert nodes == [1, 1]
    host.implant("n", mg.LoRA(rank=2), at="value")
    nodes.clear()
    results(host, batch)
    assert nodes == [2, 2]
    host.remove("n")
    nodes.clear()
    results(host, batch)
    assert nodes == [1, 1]


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_computed_again_in_backward(name: str) -> None:
    host, batch = host_of(name)
    host.train()
    want = results(host, batch)
    host.model.activation_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(want, results(host, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_another_input_is_computed_for_itself(nodes: list[int]) -> None:
    """Where a hook gives the key layer another input, the key layer is computed from it."""
    host, batch = host_of("bert")
    for path, layer in host.model.named_modules():
        if path.endswith("self.key"):
            layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    one = results(host, batch)
    assert set(nodes) == {1, 3}
    alone(host)
    for a, b in zip(one, results(host, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_input_written_to_in_between(nodes: list[int]) -> None:
    host, batch = host_of("bert")
    layers = [m for p, m in host.model.named_modules() if p.endswith("self.key")]

    def write(_: nn.Module, args: tuple[Tensor]) -> None:
        with torch.no_grad():
            args[0].mul_(1.0)  # the same numbers, but a new version of the tensor

    for layer in layers:
        layer.register_forward_pre_hook(write)
    tensor_of(host(**batch))
    assert nodes == [3, 1, 1, 3, 1, 1]


def test_a_layer_called_by_itself_leaves_nothing(nodes: list[int]) -> None:
    """Outside of the host's call no output is stored for other layers."""
    host, _ = host_of("bert")
    layer = next(m for p, m in host.model.named_modules() if p.endswith("self.query"))
    layer(torch.randn(4, 9, 16, dtype=torch.float64))
    assert nodes == [1]


def test_nothing_is_left_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[dict[Any, Any]] = []
    run = shared_input.run

    def watched(site: Any, group: Any, x: Tensor) -> Tensor | None:
        if site.call.outputs not in left:
            left.append(site.call.outputs)
        return run(site, group, x)

    monkeypatch.setattr(shared_input, "run", watched)
    host, batch = host_of("t5")
    host(**batch)
    assert left == [{}]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_example_by_example(nodes: list[int]) -> None:
    """``torch.func`` gives the gradients of each example."""
    host, _ = host_of("bert")
    own = {name: p for name, p in host.named_parameters() if name.startswith("implants.m")}
    ids = torch.randint(3, 41, (3, 20), generator=torch.Generator().manual_seed(0))

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        given = {"input_ids": row[None]}
        return torch.func.functional_call(host, parameters, (), given).logits.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(own, ids)
    assert nodes == [3, 3]
    for i, row in enumerate(ids):
        host.zero_grad()
        loss(own, row).backward()
        for name, parameter in own.items():
            torch.testing.assert_close(each[name][i], parameter.grad)
