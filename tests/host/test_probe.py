"""``host.probe`` finds each kind of fault on a host that has it, and leaves it as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modgraft as mg
from contract.hosts import HOSTS
from modgraft.core.errors import ModgraftError

WIDTH = 8


def tokens(count: int = 3, length: int = 4) -> dict[str, Any]:
    return {"x": torch.randn(count, length, WIDTH)}


def implanted(model: nn.Module, at: Any, module: mg.Computation | None = None) -> mg.Host:
    host = mg.Host(model).eval()
    host.implant("m", module or mg.LoRA(rank=2), at=at)
    return host


class Two(nn.Module):
    """Two layers, of which ``first`` may be another."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Reads(Two):
    """Reads the weight of its first layer, and never calls it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.linear(x, self.first.weight, self.first.bias))


class Skips(Two):
    """Never comes to its first layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


class Scaled(nn.Linear):
    """Is a Linear by class alone: f(x) = 3·(W·x + b)²."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x).square()


class BatchSecond(Two):
    """Takes [n, B, d], and looks at all tokens of an example."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.mean(0, keepdim=True))


class Keeps(nn.Module):
    """Adds what it saw last to what it sees, and its residual to both."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(WIDTH, WIDTH), torch.zeros(())

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.layer(x) + self.kept
        self.kept = y.detach()
        return y + residual


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Keeps()

    def forward(self, x: Tensor) -> Tensor:
        self.block.kept = torch.zeros(())
        return self.block(x, x)


class Narrow(nn.Module):
    """Says in its config that it is wider than it is."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"hidden_size": 2 * WIDTH})()
        self.body = nn.ModuleDict({"inner": nn.Linear(WIDTH, WIDTH)})
        self.block = Wrapped(self.body["inner"])

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def said(host: mg.Host, batch: dict[str, Any]) -> str:
    """Return all that is wrong, as text."""
    return "\n".join(fault for faults in host.probe(batch).faults.values() for fault in faults)


# -- hosts in which nothing is wrong --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", ["t5", "bert", "gpt2", "llama", "vit", "cnn", "mha", "rnn"])
def test_nothing_is_wrong(name: str) -> None:
    case = HOSTS[name]
    host = implanted(case.model(shallow=True), case.lora_at)
    host.implant("adapter", mg.Adapter(width=3), at=case.adapter_at)
    found = host.probe(case.batch())
    assert not found.faults, found
    assert all(row.acts and row.learns for row in found.sites), found
    assert {verdict.merged for verdict in found.modules} == {"equal", "–"}
    assert {verdict.each for verdict in found.modules} <= {"equal", "refused"}
    assert "Nothing is wrong" in str(found)


def test_it_says_where_things_lie() -> None:
    host = implanted(HOSTS["bert"].model(), "query")
    rows = host.probe(HOSTS["bert"].batch()).sites
    assert [(r.called, r.examples, r.features, r.merged) for r in rows] == [
        (1, "axis 0", "axis 2: 16", 0.0)
    ] * 2
    assert rows[0].site.endswith("layer.0.attention.self.query")


def test_prompts_and_prefixes_act() -> None:
    host = mg.Host(HOSTS["gpt2"].model()).eval()
    host.implant("p", mg.SoftPrompt(length=2))
    host.implant("k", mg.Prefix(length=2))
    found = host.probe(HOSTS["gpt2"].batch())
    assert all(row.acts and row.learns for row in found.sites), found
    assert not found.faults


# -- the faults -----------------------------------------------------------------------------------


def test_a_weight_that_is_read_by_the_layer_above() -> None:
    """It acts, or it is said that it does not: one of both."""
    found = implanted(Reads(), ["first", "second"]).probe(tokens())
    first, second = found.sites
    assert second.acts
    assert not second.faults
    assert first.acts or "reads the weight" in first.faults[0], found
    assert "weight" in said(implanted(Reads(), "first", mg.Adapter(width=2)), tokens())


def test_a_layer_that_a_batch_does_not_come_to_is_no_fault() -> None:
    found = implanted(Skips(), ["first", "second"]).probe(tokens())
    assert [row.called for row in found.sites] == [0, 1]
    assert not found.faults


def test_a_forward_on_the_instance() -> None:
    model = Two()
    model.first.forward = lambda x, before=model.first.forward: 2 * before(x)  # type: ignore[method-assign]
    try:
        host = implanted(model, "first")
    except ModgraftError:
        return  # refused at once
    found = host.probe(tokens())
    assert found.sites[0].acts or "put on this very Linear" in found.sites[0].faults[0], found


def test_a_forward_of_its_own() -> None:
    try:
        host = implanted(Two(Scaled(WIDTH, WIDTH)), "first")
    except ModgraftError:
        return
    found = host.probe(tokens())
    right = found.sites[0].merged == 0.0 and found.modules[0].merged == "equal"
    assert right or "something else than its forward" in found.sites[0].faults[0], found


def test_a_sub_module_that_was_replaced() -> None:
    host = implanted(Two(), ["first", "second"])
    host.model.first = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(mg.ModgraftError, match=r"first.* is no longer part of the host"):
        host.probe(tokens())


def test_the_batch_on_the_second_axis() -> None:
    host = implanted(BatchSecond(), "first")
    found = host.probe(tokens(4, 4))
    assert found.sites[0].examples == "axis 1"
    assert "axis 1 of this batch" in str(found)
    assert found.modules[0].each == "equal" or "call the host once for each" in said(
        host, tokens(4, 4)
    )


class Split(nn.Linear):
    """A linear layer with some more outputs, of a layer inside it."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.more = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), self.more(x)], -1)


def test_a_layer_that_is_changed_inside_too() -> None:
    host = mg.Host(nn.Sequential(nn.Linear(8, 8), Split()))
    host.implant("a", mg.LoRA(rank=2), at=["1", "1.more"])
    found = host.probe({"input": torch.randn(3, 8)})
    assert not found.faults
    assert [row.merged for row in found.sites] == [0.0, 0.0]


def test_a_residual_that_runs_a_layer_twice() -> None:
    try:
        host = implanted(Recurrent(), "block[residual]", mg.Adapter(width=2))
    except ModgraftError:
        host = None  # its width cannot be told, and that is said at once
    if host is not None:
        assert "run twice" in said(host, tokens()) or not said(host, tokens())


def test_a_width_that_the_config_says_wrongly() -> None:
    try:
        host = implanted(Narrow(), "block", mg.Adapter(width=2))
    except ModgraftError:
        return
    found = host.probe(tokens())
    assert found.faults or found.sites[0].acts


def test_writing_in_place_to_what_a_layer_put_out() -> None:
    """Training works, or the probe says that it does not."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    host = implanted(model, "0")
    found = host.probe({"input": torch.randn(64, 8)})
    try:
        host(torch.randn(64, 8)).sum().backward()
    except RuntimeError:
        assert "writes in place to the output of 0; training raises" in str(found)
    else:
        assert not found.faults


# -- the host is as it was ------------------------------------------------------------------------


class Noisy(Two):
    """Draws random numbers, counts its calls, and keeps a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.norm.running_mean.add_(1)  # type: ignore[union-attr]
        return super().forward(self.norm(x) + torch.rand(()) * 0)


@pytest.mark.parametrize("training", [True, False])
def test_the_host_is_left_as_it_was(training: bool) -> None:
    host = implanted(Noisy(), ["first", "second"])
    host.train(training)
    host["m"].places[0].A.requires_grad_(False)
    before = copy.deepcopy(host.state_dict())
    flags = [p.requires_grad for p in host.parameters()]
    batch, hooks = tokens(), [len(module._forward_hooks) for module in host.modules()]
    modes = [module.training for module in host.modules()]
    state, calls = torch.get_rng_state(), host.model.calls
    host.probe(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert host.model.calls == calls
    assert [p.requires_grad for p in host.parameters()] == flags
    assert all(p.grad is None for p in host.parameters())
    assert [module.training for module in host.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    assert [len(module._forward_hooks) for module in host.modules()] == hooks


def test_the_host_is_left_as_it_was_after_an_error() -> None:
    host = implanted(Two(), "first", mg.GatedFusion(source="image", dim=3))
    before = copy.deepcopy(host.state_dict())
    with pytest.raises(TypeError):
        host.probe({"y": torch.randn(2, 3, WIDTH)})
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())
    assert "image" in said(host, tokens()), "a side input that is missing is said"
    found = host.probe({**tokens(), "side": {"image": mg.Side(torch.randn(3, 2, 3))}})
    assert not found.faults, found


# -- batches and modules of other kinds -----------------------------------------------------------


class Given(Two):
    """Takes its batch in a container, and gives it to its layers as [n, B, d]."""

    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        return super().forward(x.transpose(0, 1)).mean(0)


class OneByOne(Two):
    """Runs its layers once for each of a list of examples."""

    def forward(self, batch: list[Tensor]) -> Tensor:  # type: ignore[override]
        return torch.stack([super(OneByOne, self).forward(x).mean(0) for x in batch])


@pytest.mark.parametrize("way", [lambda x: {"x": x}, lambda x: [x], lambda x: (x, None)])
def test_a_batch_in_a_container(way: Callable[[Tensor], Any]) -> None:
    with torch.inference_mode():
        batch = {"batch": way(torch.randn(3, 4, WIDTH))}
    found = implanted(Given(), ["first", "second"]).probe(batch)
    assert not found.faults, found
    assert [row.examples for row in found.sites] == ["axis 1", "axis 1"]
    assert found.modules[0].each == "equal"


def test_a_list_of_examples() -> None:
    host = implanted(OneByOne(), "first")
    found = host.probe({"batch": [torch.randn(n, WIDTH) for n in (4, 4, 4)]})
    assert not found.faults, found
    assert (found.sites[0].called, found.modules[0].each) == (3, "equal")


@pytest.mark.parametrize("active", [True, False])
def test_a_module_without_its_side_input_is_not_tried(active: bool) -> None:
    """It is a fault of a call of the host where the module is in force, and else none."""
    host = implanted(Two(), "second")
    host.implant("g", mg.GatedFusion(source="image", dim=3), at="first", active=active)
    found, words = host.probe(tokens()), r"host.probe(batch, side={'image': mg.Side(tensor, mask)})"
    assert list(found.faults) == (["g"] if active else [])
    assert words in (found.faults["g"][0] if active else found.notes[0])
    assert [row.acts for row in found.sites] == [True, None]
    found = host.probe(tokens(), side={"image": mg.Side(torch.randn(3, 2, 3))})
    assert not found.faults
    assert [row.acts for row in found.sites] == [True, True]


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda: {"x": torch.ones(3, 4, WIDTH)}, "different ones"),
        (lambda: {"x": torch.randn(1, 1, WIDTH)}, "two different examples"),
    ],
)
def test_a_batch_that_shows_nothing(batch: Callable[[], dict[str, Any]], words: str) -> None:
    host = implanted(Two(), "first")
    with pytest.raises(ModgraftError, match=words):
        host.probe(batch())


def test_a_host_without_modules() -> None:
    with pytest.raises(ModgraftError, match="implant"):
        mg.Host(Two()).probe(tokens())


def test_an_empty_batch() -> None:
    with pytest.raises(ModgraftError, match="keyword arguments of a call"):
        implanted(Two(), "first").probe({})


ROUTERS = [mg.Soft(level="token"), mg.TopK(1, level="token"), mg.SkillMatrix(tasks=("u", "v"))]


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_mixtures_are_probed(router: mg.Router) -> None:
    host = mg.Host(Two()).eval()
    for name in "ab":
        host.implant(name, mg.LoRA(rank=2), at="first", active=False)
    host.implant("mix", mg.Mixture(["a", "b"], router=router), active=False)
    assert not host.probe(tokens()).faults


def test_in_inference_mode() -> None:
    host = implanted(Two(), "first")
    with torch.inference_mode():
        found = host.probe(tokens())
    assert not found.faults
    assert found.sites[0].learns


def test_between_a_forward_and_its_backward() -> None:
    host, batch = implanted(Two(), "first"), tokens()
    with torch.no_grad():
        host["m"].places[0].get_parameter("B").normal_()
    gradients = []
    for probes in (False, True):
        host.zero_grad()
        loss = host(**batch).square().sum()
        if probes:
            host.probe(batch)
        loss.backward()
        gradients.append([p.grad.clone() for p in host["m"].parameters()])
    assert all(map(torch.equal, *gradients))


class Compares(Two):
    """Puts out how alike the examples are, which is no row of one of them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x).mean(1)
        return y, y @ y.T


class FromZero(Two):
    """Runs its first layer on 0, where no change of a weight has an effect."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x) + self.first(torch.zeros_like(x))


@pytest.mark.parametrize("model", [Compares(), FromZero()], ids=lambda m: type(m).__name__)
def test_what_is_right_is_no_fault(model: nn.Module) -> None:
    assert not implanted(model, "first").probe(tokens()).faults


@pytest.mark.parametrize("batch", [None, torch.ones(2, 3), (torch.ones(2, 3),)])
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    with pytest.raises(ModgraftError, match=r"a batch as host\(\*\*batch\) does"):
        implanted(Two(), "first").probe(batch)


class Yields(Two):
    def forward(self, x: Tensor) -> Any:
        x = self.first(x).tanh()
        yield x
        yield {"out": [self.second(x)]}


class Mapped(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(super().forward)(x)


class ByName(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.linear(x, self.get_parameter("first.weight")).tanh())


@pytest.mark.parametrize("kind", [Yields, Mapped, ByName])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
def test_a_host_that_runs_in_another_way_is_read_to_its_end(kind: type[Two]) -> None:
    found = implanted(kind(), "first").probe(tokens())
    assert not found.faults
    assert all(row.acts and row.learns for row in found.sites)
    assert found.modules[0].merged == "equal"


class Silent(Two):
    def forward(self, x: Tensor) -> Any:
        return lambda: super(Silent, self).forward(x)


def test_a_host_that_puts_out_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ModgraftError, match="returned a function without a floating tensor"):
        implanted(Silent(), "first").probe(tokens())
