"""A compiled host computes what the host does, whatever runs first, and where the graph breaks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg

FIRST = ["a", ["a", "b"], ["a + 0.5*b", None], "average(a, b) >> c"]


class Broken(nn.Module):
    """A model that ``torch.compile`` cannot make one graph of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


def host_of(model: nn.Module) -> mg.Host:
    host = mg.Host(model).eval()
    for name in "ab":
        host.implant(name, mg.LoRA(rank=2), at=nn.Linear, active=False)
    host.implant("c", mg.Adapter(width=2), at=nn.Linear, active=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return host


def check(compiled: object, host: mg.Host, first: object) -> None:
    x = torch.randn(2, 3, 8)
    for composition in (first, "b", ["b", None], "a", first):
        with host.using(composition), torch.no_grad():  # type: ignore[arg-type]
            got = compiled(x)  # type: ignore[operator]
            torch.testing.assert_close(got, host(x), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(got, host(x, modules=None), atol=1e-2)


@pytest.mark.parametrize("first", FIRST, ids=str)
def test_whatever_composition_runs_first(first: object) -> None:
    torch._dynamo.reset()
    host = host_of(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))
    check(torch.compile(host, backend="eager", fullgraph=True), host, first)


@pytest.mark.parametrize("first", FIRST, ids=str)
def test_a_model_that_breaks_the_graph_runs_with_its_modules(first: object) -> None:
    torch._dynamo.reset()
    host = host_of(Broken())
    with pytest.warns(UserWarning, match=r"torch.compile\(host.model\) compiles the parts"):
        check(torch.compile(host, backend="eager"), host, first)


def test_a_forward_that_was_set_on_a_layer() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    own = model[0].forward
    model[0].forward = lambda x: 2 * own(x)  # type: ignore[method-assign]
    host = host_of(model)
    with pytest.warns(UserWarning, match="cannot make one graph"):
        check(torch.compile(host, backend="eager"), host, "a")


@torch.no_grad()
def test_a_model_in_parts() -> None:
    torch._dynamo.reset()
    host = host_of(Broken())
    x = torch.randn(2, 3, 8)
    expected = {name: host(x, modules=name) for name in ("a", "b", "a >> c")}
    host.model.compile(backend="eager")
    for name, result in expected.items():
        with host.using(name):
            torch.testing.assert_close(host(x), result, rtol=1e-5, atol=1e-5)
