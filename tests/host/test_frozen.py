"""A frozen host does not move while modules train: no running statistics, no other buffer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import ResNetConfig, ResNetForImageClassification

import modgraft as mg


class Codebook(nn.Module):
    """Follows the mean of what it has seen: in place, by new objects, and by counting."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("cache", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            self.last = x.detach()[0].clone()
            self.count += 1
            self.cache.add_(1)
        return x * (1 + self.mean)


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


def without_weights() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4))


def spectral() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), spectral_norm(nn.Linear(4, 4)))


def codebook() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), Codebook(), nn.Linear(4, 4))


NETS = [batch_norm, without_weights, spectral, codebook]


def host_of(net: Callable[[], nn.Module]) -> mg.Host:
    torch.manual_seed(0)
    host = mg.Host(net())
    host.implant("a", mg.LoRA(rank=2), at="0")
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.normal_()
    return host


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) * 2 + 5 for _ in range(5)]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("asked", [True, False], ids=["host.train()", "as it was made"])
def test_training_a_module_moves_nothing_of_the_host(net: Callable, asked: bool) -> None:
    host = host_of(net)
    if asked:
        host.eval()
        host.train()
    tensors = dict(host.model.state_dict(keep_vars=True))
    before = copy.deepcopy(host.model.state_dict())
    x = batches()[0]
    bare = copy.deepcopy(host).eval()(x, modules=None)
    for batch in batches():
        host(batch).square().mean().backward()
    assert all(p.grad is not None for p in host["a"].parameters())
    for name, value in host.model.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert dict(host.model.state_dict(keep_vars=True))[name] is tensors[name]
    host.eval()
    host.remove("a")
    assert torch.equal(host(x), bare)


@pytest.mark.parametrize("net", NETS)
def test_a_host_that_trains_moves_as_it_would_alone(net: Callable) -> None:
    host = host_of(net)
    alone = copy.deepcopy(host).merge(None).requires_grad_(True).train()
    host.use(None)
    host.model.requires_grad_(True)
    host.train()
    for batch in batches():
        assert torch.equal(host(batch), alone(batch))
    moved = 0
    for name, value in alone.state_dict().items():
        assert torch.equal(host.model.state_dict()[name], value)
        moved += not torch.equal(value, host_of(net).model.state_dict()[name])
    assert moved


def test_the_part_that_trains_moves_and_no_other() -> None:
    torch.manual_seed(0)
    host = mg.Host(nn.ModuleDict({"body": batch_norm(), "head": batch_norm()}))
    host.model.forward = None  # type: ignore[assignment]
    with host.training_only("host.head"):
        host.train()
        assert host.model["head"][1].training
        assert not host.model["body"][1].training
        assert host.model["body"].training
    host.train()
    assert not host.model["head"][1].training


def test_statistics_without_a_memory_are_those_of_the_batch() -> None:
    """A layer that keeps none has nothing that could move, and computes as it does."""
    host = mg.Host(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    x = batches()[0]
    assert torch.equal(host.train()(x), host.eval()(x))
    assert host(x).mean().abs() < 1e-4


def test_layers_that_were_converted_later_and_a_merged_model() -> None:
    host = host_of(batch_norm).train()
    nn.SyncBatchNorm.convert_sync_batchnorm(host.model)
    assert isinstance(host.model[1], nn.SyncBatchNorm)
    host.train()
    assert not host.model[1].training
    assert host.merge("a")[1].training  # no host's any more


def test_modules_on_a_resnet_do_not_see_each_others_training() -> None:
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic",
        num_labels=3,
    )  # fmt: skip
    host = mg.Host(ResNetForImageClassification(config))
    for name in "ab":
        host.implant(name, mg.LoRA(rank=2), at="*.convolution", active=False)
        with torch.no_grad():
            for parameter in host[name].parameters():
                parameter.normal_(0, 0.3)
    images = torch.randn(6, 3, 16, 16) * 3 + 2
    host.eval()
    with torch.no_grad():
        before = [host(images, modules=name).logits for name in (None, "a")]
    host.train()
    optimiser = torch.optim.SGD(host["b"].parameters(), 0.1)
    for _ in range(3):
        host(images, labels=torch.arange(6) % 3, modules="b").loss.backward()
        optimiser.step()
    host.eval()
    with torch.no_grad():
        for was, name in zip(before, (None, "a"), strict=True):
            assert torch.equal(host(images, modules=name).logits, was)


def test_what_is_derived_is_left_alone() -> None:
    """A buffer that is not saved is a cache of the layer's own, and follows what it computes."""
    host = host_of(codebook).train()
    host(batches()[0])
    assert host.model[1].cache.eq(1).all()


def test_a_gradient_through_what_moved() -> None:
    """The layer's own copy of the call is what backward reads, not what was given back."""
    host = host_of(codebook).train()
    x = batches()[0]
    host(x).sum().backward()
    twin = host_of(codebook)
    hidden = nn.functional.linear(
        x, twin.model[0].weight + twin["a"].places[0].delta(None), twin.model[0].bias
    )
    scale = 1 + 0.1 * hidden.detach().mean(0)
    twin.model[2](hidden * scale).sum().backward()
    for one, other in zip(host["a"].parameters(), twin["a"].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class Follower(nn.Module):
    """A teacher that follows its student by the weights, by ``.data`` or in a buffer's mean."""

    def __init__(self, how: str, every: int = 1) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.how, self.every, self.calls = how, every, 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.student(x) if self.how != "read" else x @ self.student.weight.T + self.student.bias
        self.calls += 1
        if self.calls % self.every == 0:
            self.follow(y)
        return y - self.teacher(y) + self.mean

    @torch.no_grad()
    def follow(self, y: Tensor) -> None:
        own, new = self.teacher.weight, self.student.weight
        if self.how == "buffer":
            self.mean.mul_(0.5).add_(y.mean(0), alpha=0.5)
        elif self.how == "data":
            own.data = 0.5 * own.data + 0.5 * new.data
        else:
            own.mul_(0.5).add_(new, alpha=0.5)


@pytest.mark.parametrize("how", ["weights", "read", "data", "buffer"])
@pytest.mark.parametrize("training", [False, True])
def test_what_follows_the_modules_does_not_stay(how: str, training: bool) -> None:
    """A call is that of the host with θ + Δ, and its gradient too; the host is then as before."""
    torch.manual_seed(0)
    host = mg.Host(Follower(how).double())
    host.implant("a", mg.LoRA(rank=2), at="student")
    host.double()
    with torch.no_grad():
        host["a"].places[0].B.normal_()
    host.train(training)
    before = copy.deepcopy(host.model.state_dict())
    twin = copy.deepcopy(host).merge("a")
    x = batches()[0].double()
    place = host["a"].places[0]
    theta = host.model.student.weight + place.delta(None)
    y = x @ theta.T + host.model.student.bias
    teacher, mean = host.model.teacher.weight, host.model.mean
    if how == "buffer":
        mean = 0.5 * y.detach().mean(0)
    else:
        teacher = 0.5 * teacher + 0.5 * theta.detach()
    right = y - (y @ teacher.T + host.model.teacher.bias) + mean
    gradient = torch.autograd.grad(right.square().sum(), [place.A, place.B])
    torch.testing.assert_close(twin(x), right)
    if how == "buffer" and training:
        assert torch.equal(host(x), host(x))
    else:
        with pytest.warns(UserWarning, match=r"writes to (teacher.weight|mean)\..*stays as it is"):
            assert torch.equal(host(x), host(x))
    out = host(x)
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), [place.A, place.B]), gradient
    )
    for name, value in host.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_first_gradient_is_right_as_well() -> None:
    torch.manual_seed(0)
    host = mg.Host(Follower("weights"))
    host.implant("a", mg.LoRA(rank=2), at="student")
    first, second = [], []
    for found in (first, second):
        host.implants.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            host(batches()[0]).square().sum().backward()
        found += [p.grad.clone() for p in host["a"].parameters()]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_host_that_begins_to_write_later_says_what_it_has_written() -> None:
    host = mg.Host(Follower("weights", every=3)).eval()
    host.implant("a", mg.LoRA(rank=2), at="student")
    x, before = batches()[0], host.model.teacher.weight.clone()
    host(x), host(x)
    with pytest.warns(UserWarning, match="teacher.weight.*is still there.*anew"):
        host(x)
    with torch.no_grad():
        host.model.teacher.weight.copy_(before)
    for _ in range(4):
        host(x)
    assert torch.equal(host.model.teacher.weight, before)


def test_a_bare_host_and_one_that_trains_move_in_evaluation_as_they_did() -> None:
    host = mg.Host(Follower("buffer")).eval()
    host.implant("a", mg.LoRA(rank=2), at="student", active=False)
    host(batches()[0])
    assert host.model.mean.any()
    host.model.mean.zero_()
    host.model.requires_grad_(True)
    host(batches()[0], modules="a")
    assert host.model.mean.any()


def test_a_part_that_is_compiled_to_torchscript_is_let_be() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of jit
        host = mg.Host(nn.Sequential(nn.Linear(4, 4), torch.jit.script(Codebook())))
    host.implant("a", mg.LoRA(rank=2), at="0")
    for mode in (host.train(), host.eval()):
        mode(batches()[0])
