"""A batch within dictionaries, lists, tuples and dataclasses is asked for as a tensor is."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

import modgraft as mg
from modgraft.core.errors import CompositionError

B = 3


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Any


class Named(NamedTuple):
    x: Tensor
    scale: float = 1.0


class Own:
    """A batch of a class that nothing knows; what it holds beside tensors is handed on."""

    def __init__(self, x: Any) -> None:
        self.x, self.kind, self.names = x, Kind.TRAIN, {"a", "b"}


class Slots:
    __slots__ = ("__dict__", "x")

    def __init__(self, x: Any) -> None:
        self.x, self.seen = x, object()


class Kind(Enum):
    TRAIN = 1


class TimeFirst(nn.Module):
    """Reads ``[B, n, d]`` wherever it is, and gives it to its layer as ``[n, B, d]``."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, batch: Any) -> Tensor:
        while not isinstance(batch, Tensor):
            batch = batch.x if hasattr(batch, "x") else batch[next(iter(self.keys(batch)))]
        return self.f(batch.transpose(0, 1)).tanh().mean(0)

    @staticmethod
    def keys(batch: Any) -> Any:
        return batch.keys() if hasattr(batch, "keys") else [0]


def stirred(model: nn.Module) -> mg.Host:
    host = mg.Host(model.double()).eval()
    modules = {
        "a": mg.LoRA(rank=2),
        "c": mg.ConvAdapter(kernel=3),
        "g": mg.GatedFusion(source="image", dim=5),
    }
    generator = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        host.implant(name, module, at="f", active=False)
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.normal_(generator=generator)
    return host


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda x: {"x": x},
    "list": lambda x: [x],
    "tuple": lambda x: (x, None),
    "named tuple": Named,
    "dataclass": Frozen,
    "another mapping": lambda x: UserDict(x=x),
    "a mapping that cannot be written to": lambda x: MappingProxyType({"x": x}),
    "an object": Own,
    "an object with slots": Slots,
    "a namespace": lambda x: SimpleNamespace(x=Own(x)),
    "within one another": lambda x: {"x": [Frozen((x, 0.5))]},
    "as many as examples": lambda x: [x] * B,
}

HOW: dict[str, dict[str, Any]] = {
    "each": {"modules": ["a", None, "a"]},
    "weighted": {"modules": mg.Weighted(["a"], torch.eye(B, 1, dtype=torch.float64))},
    "side": {"modules": "g", "side": {"image": mg.Side(randn(B, 2, 5))}},
    "neighbours": {"modules": "c"},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_container_is_looked_into(way: Callable[[Tensor], Any], how: dict[str, Any]) -> None:
    x = randn(B, B, 4)  # as many steps as examples: the numbers tell nothing
    host = stirred(TimeFirst())
    other = copy.deepcopy(host)
    torch.testing.assert_close(host(way(x), **how), other(x, **how))
    if how is HOW["each"]:
        alone = [host(way(x[i : i + 1]), modules=m)[0] for i, m in enumerate(how["modules"])]
        torch.testing.assert_close(host(way(x), **how), torch.stack(alone))


class WithMore(TimeFirst):
    """Takes something beside the batch."""

    def forward(self, batch: Any, more: Any) -> Tensor:
        if isinstance(more, Memory):
            more.seen.add_(batch.sum())
        return super().forward(batch)


class Memory:
    """What the host writes to."""

    def __init__(self) -> None:
        self.seen = torch.zeros(7, dtype=torch.float64)


MORE: dict[str, Callable[[], Any]] = {
    "an enumeration": lambda: Kind.TRAIN,
    "a type": lambda: torch.float64,
    "a function": lambda: torch.tanh,
    "a range": lambda: range(3),
    "an object without tensors": object,
    "an object with tensors": Memory,
}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_what_comes_beside_a_batch_does_not_hide_it(more: Callable[[], Any]) -> None:
    x, one, other = randn(B, B, 4), more(), more()
    host = stirred(WithMore())
    out = host(x, one, modules=["a", None, "a"])
    alone = [host(x[i : i + 1], other, modules=m)[0] for i, m in enumerate(["a", None, "a"])]
    torch.testing.assert_close(out, torch.stack(alone))
    if isinstance(one, Memory):  # only the call itself has written to it
        torch.testing.assert_close(one.seen, x.sum().expand(7))


def test_what_cannot_be_given_twice_is_refused_where_nothing_tells() -> None:
    x = randn(B, B, 4)
    for once in (iter([1]), (i for i in range(2)), torch.Generator(), DynamicCache()):
        host = stirred(WithMore())
        with pytest.raises(CompositionError, match=f"with a {type(once).__name__}, which can"):
            host(x, once, modules=["a", None, "a"])
        wanted = host(x, None, modules=["a", None, "a"])  # once known it is the same
        torch.testing.assert_close(host(x, once, modules=["a", None, "a"]), wanted)


class OneByOne(TimeFirst):
    """Runs its layer once for each of a list of examples."""

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        return torch.stack([self.f(x).tanh().mean(0) for x in xs])


class InARow(TimeFirst):
    """Runs its layer on the tokens of all examples in one row."""

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        ys = self.f(torch.cat(list(xs))).split([len(x) for x in xs])
        return torch.stack([y.tanh().mean(0) for y in ys])


class Padded(TimeFirst):
    """Runs its layer on ``[n, B, d]``, filled up."""

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        return self.f(pad_sequence(list(xs))).tanh().mean(0)


LENGTHS = [(3, 3, 3), (2, 2, 2), (1, 5, 2), (5, 2, 2), (1, 2, 3), (5, 2, 2, 5, 1, 6)]
"""The fourth and the fifth add up to a multiple of three."""


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("model", [OneByOne, InARow, Padded], ids=lambda m: m.__name__)
@pytest.mark.parametrize("first", [None, (2, 2, 2), (2, 4, 3)], ids=str)
def test_a_list_of_examples(
    model: type[TimeFirst], lengths: tuple[int, ...], first: tuple[int, ...] | None
) -> None:
    """Whatever lengths the host has seen before."""
    host = stirred(model())
    if first is not None:
        host([randn(n, 4) for n in first], modules=["a", None, None])
    xs, names = [randn(n, 4) for n in lengths], ["a", None, "a", None, "a", "a"][: len(lengths)]
    weights = torch.tensor([[0.0 if name is None else 1.0] for name in names]).double()
    alone = {name: host(xs, modules=name) for name in ("a", None)}
    right = torch.stack([alone[name][i] for i, name in enumerate(names)])
    torch.testing.assert_close(host(xs, modules=names), right)
    torch.testing.assert_close(host(xs, modules=mg.Weighted(["a"], weights)), right)


class Steps(TimeFirst):
    """Keeps apart the entries of a list, and the rows of each."""

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        return torch.stack([self.f(x).tanh() for x in xs])


class Total(TimeFirst):
    """Puts out a number for all that it is given."""

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        return torch.stack([self.f(x).tanh() for x in xs]).square().mean()


@pytest.mark.parametrize("model", [Steps, Total], ids=lambda m: m.__name__)
def test_what_may_be_examples_in_two_ways_is_refused(model: type[TimeFirst]) -> None:
    host, xs = stirred(model()), [*randn(B, B, 4)]
    for modules in (["a", None, "a"], HOW["weighted"]["modules"]):
        with pytest.raises(mg.ModgraftError, match=r"holds a list of 3.*call the host once"):
            host(xs, modules=modules)
    host(xs, modules="a")  # as it says


@pytest.mark.parametrize("count", [2, 4])
def test_a_list_of_features_has_the_examples_in_its_tensors(count: int) -> None:
    host, xs = stirred(Steps()), [*randn(B, count, 4)]
    names = ["a", None, "a", None][:count]
    out, alone = host(xs, modules=names), {name: host(xs, modules=name) for name in ("a", None)}
    for i, name in enumerate(names):
        torch.testing.assert_close(out[:, i], alone[name][:, i])


def test_another_number_of_examples_is_refused() -> None:
    with pytest.raises(mg.ModgraftError, match="5 compositions for a batch of 3 examples"):
        stirred(TimeFirst())({"x": randn(B, B, 4)}, modules=["a"] * 5)
    with pytest.raises(mg.ModgraftError, match="5 compositions"):
        stirred(OneByOne())([*randn(B, B, 4)], modules=["a"] * 5)
