"""A frozen host does not move while modules train: no running statistics, no other buffer."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint
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
    """A teacher that follows its student by the weights, in some way, or in a buffer's mean."""

    def __init__(self, how: str, begins: int = 1) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.how, self.begins, self.calls = how, begins, 0
        self.double()
        self.alias, self.kept = self.mean, list(self.teacher.parameters())

    def forward(self, x: Tensor) -> Tensor:
        y = self.student(x)
        self.calls += 1
        if self.calls >= self.begins:
            with torch.no_grad():
                self.follow(y)
        return y - self.teacher(y) + self.mean

    def follow(self, y: Tensor) -> None:
        own, new = self.teacher.weight, self.student.weight
        match self.how:
            case "buffer":
                self.mean.mul_(0.5).add_(y.mean(0), alpha=0.5)
            case "alias":
                self.alias.mul_(0.5).add_(y.mean(0), alpha=0.5)
            case "data":
                own.data.mul_(0.5).add_(new, alpha=0.5)
            case "exchanged":
                own.data = 0.5 * own.data + 0.5 * new.data
            case "replaced":
                self.teacher.weight = nn.Parameter(0.5 * own + 0.5 * new, requires_grad=False)
            case "replaced by one that trains":
                self.teacher.weight = nn.Parameter(0.5 * own + 0.5 * new)
            case "kept":
                for each in self.kept:
                    each.mul_(0.5)
            case "where it acts":
                self.student.weight.mul_(0.5)
            case "weights":
                own.mul_(0.5).add_(new, alpha=0.5)


def followed(how: str, begins: int = 1, training: bool = False) -> mg.Host:
    torch.manual_seed(0)
    host = mg.Host(Follower(how, begins))
    host.implant("a", mg.LoRA(rank=2), at="student")
    host.double()
    with torch.no_grad():
        host["a"].places[0].B.normal_()
    return host.train(training)


WAYS = [
    "weights",
    "data",
    "exchanged",
    "replaced",
    "replaced by one that trains",
    "kept",
    "alias",
    "where it acts",
]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_write_to_what_is_frozen_is_refused_and_put_back(
    how: str, training: bool, gradients: bool
) -> None:
    host = followed(how, training=training)
    before = copy.deepcopy(host.model.state_dict())
    own = dict(host.model.named_parameters())
    with torch.set_grad_enabled(gradients):
        for _ in range(3):
            with pytest.raises(mg.ModgraftError, match=r"writes to .* put back"):
                host(batches()[0].double())
    assert host.model.calls == 0  # attributes too
    for name, value in host.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in host.model.named_parameters():
        assert parameter is own[name]


@pytest.mark.parametrize("how", ["weights", "replaced", "kept", "where it acts", "data"])
@pytest.mark.parametrize("training", [False, True])
def test_a_write_that_begins_later_is_refused_as_well(how: str, training: bool) -> None:
    host = followed(how, begins=5, training=training)
    x = batches()[0].double()
    before = host.model.teacher.weight.clone()
    for _ in range(4):
        host(x)
    with pytest.raises(mg.ModgraftError, match="writes to"):
        host(x)
    if how in ("replaced", "data"):  # the 5th call is watched
        assert torch.equal(host.model.teacher.weight, before)
    host = followed(how, begins=4, training=training)
    for _ in range(3):
        host(x)
    said = "put back" if how == "replaced" else "is still there.*anew"
    if how == "data":
        host(x)  # which PyTorch does not count
        said = "put back"
    with pytest.raises(mg.ModgraftError, match=said):
        host(x)


def test_a_call_that_fails_is_not_the_first() -> None:
    host = followed("data")
    before = host.model.teacher.weight.clone()
    handle = host.model.teacher.register_forward_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            host(batches()[0].double())
        assert torch.equal(host.model.teacher.weight, before)
    handle.remove()
    with pytest.raises(mg.ModgraftError, match=r"writes to teacher.weight.*put back"):
        host(batches()[0].double())


@pytest.mark.parametrize("how", ["codebook", "buffer"])
@pytest.mark.parametrize("training", [False, True])
def test_compiled_code_writes_to_copies(how: str, training: bool) -> None:
    host = host_of(codebook).train(training) if how == "codebook" else followed(how, 1, training)
    x = batches()[0].to(next(host.parameters()).dtype)
    before = copy.deepcopy(host.model.state_dict())
    compiled = torch.compile(host, backend="aot_eager", fullgraph=True)
    outs = [compiled(x) for _ in range(2)]
    with warnings.catch_warnings(action="ignore"):
        right = host(x)
    for out in outs:
        torch.testing.assert_close(out, right)
    for name, value in host.model.state_dict().items():
        assert torch.equal(value, before[name]) or name.endswith("cache"), name


def test_what_is_refused_may_train_or_prepare_itself_bare() -> None:
    x = batches()[0].double()
    host = followed("weights")
    host.model.teacher.requires_grad_(True)
    host(x)
    assert not torch.equal(host.model.teacher.weight, followed("weights").model.teacher.weight)

    class Prepared(Follower):
        ready = False

        def follow(self, y: Tensor) -> None:
            if not self.ready:
                self.teacher.weight.mul_(0.5)
            self.ready = True

    torch.manual_seed(0)
    host = mg.Host(Prepared(""))
    host.implant("a", mg.LoRA(rank=2), at="student")
    host.double()
    for _ in range(2):  # still unprepared after the first
        with pytest.raises(mg.ModgraftError, match="prepares itself"):
            host(x)
    bare = host(x, modules=None)
    host(x)
    assert torch.equal(host(x, modules=None), bare)


def test_equal_numbers_may_be_written_until_they_are_others() -> None:
    """A teacher is its student to begin with, and a LoRA that is new changes nothing."""
    host = followed("data")
    host.model.student.load_state_dict(host.model.teacher.state_dict())
    B = host["a"].places[0].B
    value = B.detach().clone()
    with torch.no_grad():
        B.zero_()
    host(batches()[0].double())
    host(batches()[0].double())
    with torch.no_grad():
        B.copy_(value)
    with pytest.raises(mg.ModgraftError, match=r"writes to teacher.weight.*put back"):
        host(batches()[0].double())


@pytest.mark.parametrize("training", [False, True])
def test_a_mean_that_follows_the_modules_does_not_stay(training: bool) -> None:
    """A call is that of the host with θ + Δ, and its gradient too; the host is then as before."""
    host = followed("buffer", training=training)
    before = copy.deepcopy(host.model.state_dict())
    x, place = batches()[0].double(), host["a"].places[0]
    theta = host.model.student.weight + place.delta(None)
    y = x @ theta.T + host.model.student.bias
    right = y - host.model.teacher(y) + 0.5 * y.detach().mean(0)
    gradient = torch.autograd.grad(right.square().sum(), [place.A, place.B])
    if training:
        assert torch.equal(host(x), host(x))
    else:
        with pytest.warns(UserWarning, match=r"writes to mean\..*stays as it is") as told:
            assert torch.equal(host(x), host(x))
        assert [each.filename for each in told] == [__file__]
    out = host(x)
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), [place.A, place.B]), gradient
    )
    for name, value in host.model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Made(nn.Module):
    """What is saved, and is made or exchanged while the host runs, or later than the host."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.other, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how
        self.proto = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        with torch.no_grad():
            if self.how == "a buffer" and not hasattr(self, "mean"):
                self.register_buffer("mean", y.mean(0))
            elif self.how == "a part":
                self.other = copy.deepcopy(self.other)
                self.other.weight.data.mul_(0.5)
            elif self.how == "beside what trains":
                self.proto.lerp_(y.mean(0), 0.5)
        return self.head(self.other(y) * self.proto)


@pytest.mark.parametrize("how", ["a buffer", "a part", "beside what trains"])
def test_what_is_made_or_exchanged_in_a_call_is_refused(how: str) -> None:
    torch.manual_seed(0)
    host = mg.Host(Made(how)).eval()
    host.implant("a", mg.LoRA(rank=2), at="inner")
    host.model.head.requires_grad_(True)
    before, other = copy.deepcopy(host.model.state_dict()), host.model.other
    for _ in range(2):
        with pytest.raises(mg.ModgraftError, match=r"writes to .* put back"):
            host(batches()[0])
    assert host.model.other is other
    assert host.model.state_dict().keys() == before.keys()
    for name, value in host.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_part_that_came_after_the_host_is_kept_too() -> None:
    host = host_of(codebook).eval()
    host.model[2] = Follower("weights").float().requires_grad_(False)
    before = copy.deepcopy(host.model.state_dict())
    with pytest.raises(mg.ModgraftError, match=r"writes to 2.teacher.weight"):
        host(batches()[0])
    for name, value in host.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_maximum_that_rises_later_does_not_stay() -> None:
    class Maximum(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("most", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.most.copy_(torch.maximum(self.most, x.abs().max()))
            return super().forward(x) / self.most

    host = mg.Host(nn.Sequential(nn.Linear(4, 4), Maximum())).eval()
    host.implant("a", mg.LoRA(rank=2), at="0")
    host(batches()[0] * 1e-3)
    with pytest.warns(UserWarning, match=r"writes to 1.most"):
        host(batches()[0] * 10)
    assert host.model[1].most == 1


def test_a_call_that_is_interrupted_says_what_it_has_written() -> None:
    host = followed("weights", begins=2)
    host(x := batches()[0].double())
    handle = host.model.teacher.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        host(x)
    assert "writes to teacher.weight" in raised.value.__notes__[0]
    handle.remove()


def test_weights_in_one_memory_of_which_some_train() -> None:
    host = followed("weights")
    flat = torch.cat([p.data.flatten() for p in host.model.parameters()])
    begin = 0
    for p in host.model.parameters():
        p.data = flat[begin : begin + p.numel()].view_as(p)
        begin += p.numel()
    host.model.teacher.requires_grad_(True)
    before = host.model.teacher.weight.detach().clone()
    host(batches()[0].double())
    assert not torch.equal(host.model.teacher.weight, before)


class Odd(nn.Module):
    """Buffers of which none is like the next: None as yet, NaN, and two views of one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("filled", None)
        self.register_buffer("nan", torch.full((3,), torch.nan))
        both = torch.zeros(8)
        self.register_buffer("first", both[:4])
        self.register_buffer("whole", both)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.filled is None:
            self.filled = y.detach().mean(0)
        self.first += 1
        return y + self.whole[:4]


def test_odd_buffers() -> None:
    host = mg.Host(Odd()).eval()
    host.implant("a", mg.LoRA(rank=2), at="inner")
    x = batches()[0]
    with pytest.warns(UserWarning, match=r"writes to filled, first, whole\.") as told:
        out = host(x)
    assert "nan" not in str(told[0].message)
    assert host.model.filled is None
    assert host.model.whole.eq(0).all()
    torch.testing.assert_close(out, host.model.inner(x) + 1)
    assert torch.equal(host(x), out)


class Counts(nn.Linear):
    """A linear layer of one's own, which counts its calls in a buffer that it assigns."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("calls", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x) * self.calls


def test_what_a_layer_with_modules_assigns_is_its_own() -> None:
    host = mg.Host(nn.Sequential(Counts())).eval()
    host.implant("a", mg.LoRA(rank=2), at="0")
    x, twin = batches()[0], Counts()
    twin.load_state_dict(host.model[0].state_dict())
    for _ in range(3):
        torch.testing.assert_close(host(x, modules=None), twin(x))
    assert host.model[0].calls == 3
    with pytest.warns(UserWarning, match="writes to 0.calls"):
        host(x)
    assert host.model[0].calls == 3


def test_a_bare_call_beside_another_moves_as_it_would_alone() -> None:
    inside, go = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.current_thread().name == "with a module":
            inside.set()
            go.wait(10)

    host, twin, x = followed("buffer"), followed("buffer"), batches()[0].double()
    right = twin(x, modules=None)
    host.model.teacher.register_forward_hook(wait)
    outs: dict[str, Tensor] = {}
    with warnings.catch_warnings(action="ignore"):
        module = threading.Thread(target=lambda: host(x), name="with a module")
        bare = threading.Thread(target=lambda: outs.update(bare=host(x, modules=None)))
        module.start()
        inside.wait(10)
        bare.start()
        bare.join(0.2)
        go.set()
        module.join()
        bare.join()
    torch.testing.assert_close(outs["bare"], right)
    assert torch.equal(host.model.mean, twin.model.mean)


def test_calls_in_threads_do_not_share_a_copy() -> None:
    host = host_of(codebook).train()
    xs = batches()
    alone = [host(x).detach() for x in xs]
    with ThreadPoolExecutor(5) as pool:
        for _ in range(10):
            for right, out in zip(alone, pool.map(host, xs), strict=True):
                torch.testing.assert_close(out, right, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_block_that_is_computed_once_more_reads_what_it_read(
    reentrant: bool, training: bool
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("scale", torch.ones(4))
            self.checkpoints = False

        def block(self, y: Tensor) -> Tensor:
            return torch.tanh(self.lin(y) * self.scale)

        def forward(self, x: Tensor) -> Tensor:
            self.scale.copy_(x.detach().abs().mean(0))
            if self.checkpoints:
                return checkpoint(self.block, x, use_reentrant=reentrant)
            return self.block(x)

    torch.manual_seed(0)
    host = mg.Host(Net()).train(training)
    host.implant("a", mg.LoRA(rank=2), at="lin")
    with torch.no_grad():
        for parameter in host["a"].parameters():
            parameter.normal_()
    found = []
    with warnings.catch_warnings(action="ignore"):
        for host.model.checkpoints in (False, True):
            host.zero_grad()
            host(batches()[0].requires_grad_()).square().sum().backward()
            found.append([p.grad.clone() for p in host["a"].parameters()])
    torch.testing.assert_close(found[0], found[1])
    assert host.model.scale.eq(1).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_that_is_computed_once_more_moves_nothing(reentrant: bool) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    plain = host_of(codebook).train()
    host = mg.Host(Checkpointed(*codebook()))
    host.model.load_state_dict(plain.model.state_dict())
    host.implant("a", mg.LoRA(rank=2), at="0")
    host["a"].load_state_dict(plain["a"].state_dict())
    host.train()
    before = copy.deepcopy(host.model[1].state_dict())
    x = batches()[0].requires_grad_()
    for each in (host, plain):
        each(x).square().sum().backward()
    for name, value in host.model[1].state_dict().items():
        assert torch.equal(value, before[name]), name
    for one, other in zip(host["a"].parameters(), plain["a"].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_bare_host_and_one_that_trains_move_in_evaluation_as_they_did() -> None:
    host, x = followed("buffer"), batches()[0].double()
    host(x, modules=None)
    assert host.model.mean.any()
    host.model.mean.zero_()
    host.model.requires_grad_(True)
    host(x, modules="a")
    assert host.model.mean.any()


def test_a_part_that_is_compiled_to_torchscript_is_let_be() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of jit
        host = mg.Host(nn.Sequential(nn.Linear(4, 4), torch.jit.script(Codebook())))
    host.implant("a", mg.LoRA(rank=2), at="0")
    for mode in (host.train(), host.eval()):
        mode(batches()[0])
