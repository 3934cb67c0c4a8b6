"""``host.probe`` finds what reads a layer in ways that no module reaches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modgraft as mg

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Kept(nn.Module):
    """Keeps a weight of its layer from the beginning, in one way or another."""

    def __init__(self, keep: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        keep(self, self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        own = self.kept
        if isinstance(own, partial):
            return self.last(own(x).tanh())
        own = own[0][0] if isinstance(own, list) else own
        return self.last(F.linear(x, own).tanh())  # type: ignore[arg-type]


class Both(Kept):
    """Calls the layer too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.layer(x))


KEEPS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "tensor": lambda model, weight: object.__setattr__(model, "kept", weight),
    "list": lambda model, weight: setattr(model, "kept", [(weight, "student")]),
    "partial": lambda model, weight: setattr(model, "kept", partial(F.linear, weight=weight)),
    "parameter": lambda model, weight: setattr(model, "kept", weight),
}


class ByClass(nn.Module):
    """Scales its layer where the layer is of the very class ``nn.Linear``."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.layer, self.scale = nn.Linear(8, 8), nn.Linear(8, 8), scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.first(x))
        return y if type(self.layer) is nn.Linear else self.scale * y


class Read(nn.Module):
    """Reads the weight of its layer as ``read`` does."""

    def __init__(self, read: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.layer, self.read = nn.Linear(8, 8), read

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read(self))


def implanted(model: nn.Module, at: object = "layer") -> mg.Host:
    host = mg.Host(model).eval()
    host.implant("m", mg.LoRA(rank=2), at=at)  # type: ignore[arg-type]
    return host


def said(host: mg.Host) -> str:
    before = copy.deepcopy(host.state_dict())
    kinds = [type(module) for module in host.modules()]
    found = host.probe({"x": X})
    assert kinds == [type(module) for module in host.modules()]
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    return "\n".join(fault for faults in found.faults.values() for fault in faults)


@pytest.mark.parametrize("kind", [Kept, Both])
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_a_weight_that_the_host_keeps(kind: type[Kept], keep: Callable) -> None:
    with pytest.warns(UserWarning, match=r"weight of layer itself, in its attribute kept.*read l"):
        host = implanted(kind(keep))
    faults = said(host)
    if kind is Both and keep is KEEPS["parameter"]:
        return  # a parameter of the module itself, tied, which acts as what it is
    assert "kept" in faults, faults
    assert "layer.weight" in faults or "has to read there" in faults


def test_it_is_warned_of_only_where_a_change_of_that_weight_is_implanted() -> None:
    host = mg.Host(Kept(KEEPS["tensor"])).eval()
    host.implant("a", mg.Adapter(width=2), at="last")
    host.implant("b", mg.LoRA(rank=2), at="last")


def test_what_only_computes_with_the_weight_itself_can_tell() -> None:
    model = Both(KEEPS["tensor"])
    kept = model.layer.weight
    model.kept = None  # type: ignore[assignment]
    model.forward = lambda x: F.linear(model.layer(x), kept)  # type: ignore[method-assign]
    assert "the host keeps the weight of this Linear, and computes" in said(implanted(model))


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_a_host_that_asks_for_the_very_class(scale: float) -> None:
    for at, found in (("layer", True), ("first", False), (["first", "layer"], True)):
        host = implanted(ByClass(scale), at)
        faults = said(host)
        assert ("in layer, also where none acts" in faults) is found, faults
        assert "isinstance(layer, Linear)" in faults or not found
        assert "in first" not in faults


@pytest.mark.parametrize(
    "read",
    [
        lambda model: model.layer._parameters["weight"],
        lambda model: dict(model.named_parameters())["layer.weight"],
        lambda model: next(model.parameters()),
    ],
)
def test_a_weight_that_is_read_past_its_layer(read: Callable[[nn.Module], Tensor]) -> None:
    host = implanted(Read(read))
    assert "reads the weight of this Linear and never calls it" in said(host)


def test_a_weight_that_is_read_without_a_gradient() -> None:
    host = implanted(Read(lambda model: model.state_dict()["layer.weight"]))
    assert said(host).startswith("the module acts and no gradient reaches it")


class Drops(nn.Module):
    """Draws random numbers in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5, training=True)


def test_a_host_that_draws_random_numbers_is_not_taken_for_another() -> None:
    assert not said(implanted(Drops()))
