"""``modgraft.testing.check``: methods with one fault each are found out by the rule they break."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import modgraft as mg
from modgraft.core.config import REGISTRY
from modgraft.core.errors import ContractError
from modgraft.testing import Report, check
from modgraft.testing.hosts import drawn, ids, padded_right, small_bert
from modgraft.testing.rules import RULES


@pytest.fixture(autouse=True, scope="module")
def forgotten() -> Iterator[None]:
    """Take the classes of this file out of the names that a saved module may have."""
    before = dict(REGISTRY)
    yield
    for name in REGISTRY.keys() - before.keys():
        del REGISTRY[name]


class ShiftBy(mg.FunctionComposition):
    """y + b, b [d]: born as the identity, and right."""

    identity: ClassVar[bool] = True
    scale: float = 1.0

    def build(self, site: mg.Site) -> None:
        self.b = nn.Parameter(torch.zeros(site.width))

    def forward(self, y: Tensor, x: Tensor | None, side: mg.Side | None) -> Tensor:
        return y + self.scale * self.b


class Factored(mg.ParameterComposition):
    """Δ = s·BA, B = 0 at the start, and right."""

    identity: ClassVar[bool] = True
    scale: float = 2.0

    def build(self, site: mg.Site) -> None:
        from modgraft.core.layers import weight_matrix

        rows, columns = weight_matrix(site.module, site.part, site.parameter).shape
        self.A, self.B = nn.Parameter(torch.randn(2, columns)), nn.Parameter(torch.zeros(rows, 2))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.B, self.A, self.scale

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * (self.B @ self.A)


class NoIdentity(ShiftBy):
    """It says that it is born as the identity, and is not."""

    def build(self, site: mg.Site) -> None:
        self.b = nn.Parameter(torch.ones(site.width))


class Unsaid(ShiftBy):
    """It is born as the identity, and does not say so."""

    identity: ClassVar[bool] = False


class IgnoresItsScale(Factored):
    """Its factors forget the scale that its delta has."""

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.B, self.A, 1.0


class Scaled(Factored):
    """Its effect on activations is not that of its delta."""

    def effect(
        self, x: Tensor, layer: nn.Module, weight: Tensor, y: Tensor | None = None
    ) -> Tensor:
        return 2 * super().effect(x, layer, weight, y)

    def factors(self) -> None:  # type: ignore[override]
        return None


class Draws(ShiftBy):
    """It draws random numbers in evaluation."""

    def forward(self, y: Tensor, x: Tensor | None, side: mg.Side | None) -> Tensor:
        return y + self.b * torch.rand(())


class Remembers(ShiftBy):
    """It adds what it saw in the call before."""

    def build(self, site: mg.Site) -> None:
        super().build(site)
        self.last = 0.0

    def forward(self, y: Tensor, x: Tensor | None, side: mg.Side | None) -> Tensor:
        out = y + self.b * (1 + self.last)
        self.last = float(y.mean())
        return out


class ReadsTheBatch(ShiftBy):
    """It centres the batch: an example depends on the others."""

    def forward(self, y: Tensor, x: Tensor | None, side: mg.Side | None) -> Tensor:
        return y + self.b * y.mean(dim=0, keepdim=True)


class ReadsOtherTokens(ShiftBy):
    """It centres the tokens, and does not say that a token depends on the others."""

    def forward(self, y: Tensor, x: Tensor | None, side: mg.Side | None) -> Tensor:
        return y + self.b * y.mean(dim=1, keepdim=True)


class LosesATensor(ShiftBy):
    """It projects by a random matrix that is no buffer, and is not saved."""

    def build(self, site: mg.Site) -> None:
        super().build(site)
        self.mixer = torch.randn(site.width)

    def forward(self, y: Tensor, x: Tensor | None, side: mg.Side | None) -> Tensor:
        return y + (self.b * self.mixer).to(y.dtype)


class LosesItsArgument(ShiftBy):
    """It changes its argument, so that what is built from the saved one is another."""

    def __post_init__(self) -> None:
        self.scale = self.scale / 2


class WritesTheHost(ShiftBy):
    """It writes into the layer that it acts at."""

    def build(self, site: mg.Site) -> None:
        super().build(site)
        with torch.no_grad():
            next(site.module.parameters()).add_(1e-3)


class TakesTheHostsWeight(ShiftBy):
    """It trains a weight of the host as its own."""

    def build(self, site: mg.Site) -> None:
        super().build(site)
        self.theirs = next(site.module.parameters())

    def forward(self, y: Tensor, x: Tensor | None, side: mg.Side | None) -> Tensor:
        return y + self.b + 0 * self.theirs.sum()


class LearnsNothing(ShiftBy):
    """No gradient reaches its parameters."""

    def forward(self, y: Tensor, x: Tensor | None, side: mg.Side | None) -> Tensor:
        return y + self.b.detach()


class Raises(ShiftBy):
    """It is not defined where it is tried, and says so in an error of its own kind."""

    def build(self, site: mg.Site) -> None:
        raise IndexError("list index out of range")


FAULTS: dict[type[mg.Computation], tuple[str, str]] = {
    NoIdentity: ("is_born_as_declared", "identity is True, and yet"),
    Unsaid: ("is_born_as_declared", "say identity: ClassVar[bool] = True"),
    IgnoresItsScale: ("has_one_delta", "s·BA of factors(), against delta(weight)"),
    Scaled: ("keeps_examples_apart", "alone, against it in the batch"),
    Draws: ("is_repeatable", "a second call gives something else"),
    Remembers: ("is_repeatable", "something else"),
    ReadsTheBatch: ("keeps_examples_apart", "example 0 alone, against it in the batch"),
    ReadsOtherTokens: ("keeps_tokens_apart", "token 0 changes another token"),
    LosesATensor: ("is_saved_whole", "a tensor is missing, or the configuration"),
    LosesItsArgument: ("is_saved_whole", "a tensor is missing, or the configuration"),
    WritesTheHost: ("leaves_the_host", "after host.implant, the host's"),
    TakesTheHostsWeight: ("learns_alone", ""),
    LearnsNothing: ("learns_alone", "no gradient reaches"),
    Raises: ("build", "IndexError: list index out of range"),
}


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_a_planted_fault_is_found(kind: type[mg.Computation]) -> None:
    rule, says = FAULTS[kind]
    at = "query" if issubclass(kind, mg.ParameterComposition) else "output"
    with pytest.raises(ContractError) as error:  # on one host, which is quicker than on all
        check(kind(), model=drawn(small_bert), batch=padded_right(ids()), at=at)
    said = str(error.value)
    line = next((x for x in said.splitlines() if x.strip().startswith(rule)), "")
    assert line, said
    assert says in line, said


def test_a_right_method_holds_on_every_host() -> None:
    report = check(ShiftBy())
    assert not report.broken
    assert not report.undefined
    assert list(report.held) == ["bert", "gpt2", "t5", "cnn"]
    asked = {rule for rules in report.held.values() for rule in rules}
    assert {rule.__name__ for rule in RULES} - asked == {
        "has_one_delta", "leaves_examples_without_its_side_input",
    }  # fmt: skip
    assert re.search(r"Newly built, .*held +held +held +held", str(report))


def test_a_right_change_of_weights_holds() -> None:
    batch = padded_right(ids())
    report = check(Factored(), model=drawn(small_bert), batch=batch, at=["query", "value"])
    assert {"has_one_delta", "merges_or_is_refused"} <= {*report.held["BertForMaskedLM"]}


def test_a_method_with_a_side_input_and_one_with_tasks() -> None:
    features = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    given = {"batch": padded_right(ids()), "side": {"image": mg.Side(features)}}
    host = {"model": drawn(small_bert), **given}
    report = check(mg.GatedFusion(dim=6), at="encoder.output", **host)
    assert "leaves_examples_without_its_side_input" in report.held["BertForMaskedLM"]
    hyper = mg.HyperNetwork(mg.LoRA(rank=2), tasks=("fr", "de"), embedding=3)
    report = check(hyper, at="query", model=drawn(small_bert), batch=padded_right(ids()))
    assert "merges_or_is_refused" in report.held["BertForMaskedLM"]


def test_a_model_of_ones_own() -> None:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=30, num_attention_heads=2, **size))
    model.requires_grad_(True).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = {"input_ids": torch.randint(3, 30, (4, 6))}
    report = check(ShiftBy(), model=model, batch=batch, at="block")
    assert list(report.held) == ["BertModel"]
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ContractError, match=r"keeps_examples_apart \(BertModel\)"):
        check(ReadsTheBatch(), model=model, batch=batch, at="block")


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a class": (ShiftBy, {}, r"write check\(ShiftBy\(…\)\)"),
    "a side input left out": (mg.GatedFusion(dim=6), {}, "reads the side input 'image': give one"),
    "a side input of other examples": (
        mg.GatedFusion(dim=6), {"side": {"image": mg.Side(torch.ones(2, 4, 6))}},
        "is of 2 examples, and the batch of bert has 3",
    ),
    "a model without a batch": (ShiftBy(), {"model": nn.Linear(2, 2)}, "give both, or neither"),
    "one example": (
        ShiftBy(), {"model": nn.Linear(2, 2), "batch": {"input": torch.ones(1, 2)}},
        "with two examples at least",
    ),
    "nowhere defined": (ShiftBy(), {"at": "no.such"}, "defined on no host: .*matches no site"),
    "a mixture": (mg.Mixture(["a", "b"], router=mg.Fixed()), {}, "combines other modules"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    method, given, says = BAD[what]
    with pytest.raises(mg.ModgraftError, match=says):
        check(method, **given)


def test_random_numbers_are_left_as_they_were() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    check(ShiftBy(), at="mix")  # a layer of the convolutional network alone
    assert torch.equal(torch.rand(2), wanted)


def test_it_needs_no_pytest_and_is_a_public_name() -> None:
    code = (
        "import sys, modgraft as mg\n"
        "sys.modules['pytest'] = None\n"
        "import torch\n"
        "batch = {'input': torch.randn(2, 3)}\n"
        "model = torch.nn.Sequential(torch.nn.Linear(3, 4))\n"
        "report = mg.testing.check(mg.Rescale(), at='0', model=model, batch=batch)\n"
        "assert 'hypothesis' not in sys.modules\n"
        "print(report)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Sequential" in done.stdout
    assert isinstance(Report(), mg.testing.Report)


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_norm_at_the_end_of_a_host_is_no_fault_of_a_method(seed: int) -> None:
    torch.manual_seed(seed)
    model = BertModel(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24,
        )
    ).eval()  # fmt: skip
    batch = {"input_ids": torch.randint(3, 30, (3, 5))}
    assert not check(mg.LoRA(rank=2), model=model, batch=batch, at="query").broken
