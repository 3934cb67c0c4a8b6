"""A block that is recomputed in backward runs under the call of its forward, whoever does it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import modgraft as mg

Run = Callable[[nn.Module, Tensor], Tensor]


class Recompute(torch.autograd.Function):
    """A checkpoint of somebody's own, which goes past torch's."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.run(x), gradient)
        return None, x.grad


class Net(nn.Module):
    """Two blocks, each run by ``how``."""

    def __init__(self, how: Run) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)])
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.how(block, x)
        return x


FORMS: dict[str, Run] = {
    "not reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "whole": lambda block, x: checkpoint(block, x, use_reentrant=False, early_stop=False),
    "in segments": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=False),
    "nested": lambda block, x: checkpoint(
        lambda z: checkpoint(block, z, use_reentrant=False), x, use_reentrant=True
    ),
}


def plain(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def made(how: Run) -> mg.Host:
    torch.manual_seed(0)
    host = mg.Host(Net(how))
    for name in "pq":
        host.implant(name, mg.LoRA(rank=2), at="blocks.*.0", active=False)
    host.implant("f", mg.GatedFusion(source="image", dim=5), at="blocks.1.0", active=False)
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.normal_()
    return host


def by_use(host: mg.Host, x: Tensor) -> list[Tensor]:
    out = []
    for name in "pq":
        host.use(name)
        out.append(host(x))
    return out


def by_modules(host: mg.Host, x: Tensor) -> list[Tensor]:
    sides = [{"image": mg.Side(torch.full((4, 2, 5), value))} for value in (1.0, -1.0)]
    return [host(x, side=side, modules="p >> f") for side in sides]


def by_using(host: mg.Host, x: Tensor) -> list[Tensor]:
    out = []
    for name in ("p", "p - 2*q"):
        with host.using(name):
            out.append(host.model(x))
    return out


def of_the_model(host: mg.Host, x: Tensor) -> list[Tensor]:
    out = []
    for name in "pq":
        host.use(name)
        out.append(host.model(x))
    return out


WAYS = [by_use, by_modules, by_using, of_the_model]


def gradients(
    host: mg.Host, way: Callable[..., list[Tensor]], of_input: bool = True
) -> list[Tensor | None]:
    host.zero_grad()
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_(of_input)
    first, second = way(host, x)
    host.use("q")
    (first.square() + second).sum().backward()
    return [x.grad, *(p.grad for p in host.implants.parameters())]


# where the examples lie is asked without gradients, of which the reentrant form warns
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_without_checkpointing(form: str, way: Any, of_input: bool) -> None:
    expected = gradients(made(plain), way, of_input)
    for one, other in zip(gradients(made(FORMS[form]), way, of_input), expected, strict=True):
        torch.testing.assert_close(one, other)


class Head(nn.Module):
    """Two blocks of which each does ``how``, in the reentrant form or plainly, and a head."""

    def __init__(self, how: Callable[[nn.Linear, Tensor], Any], reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.head, self.how, self.reentrant, self.runs = nn.Linear(6, 2), how, reentrant, 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            run = partial(self.run, block)
            out = checkpoint(run, x, use_reentrant=True) if self.reentrant else run(x)
            x = out[0] if isinstance(out, tuple) else out
        return self.head(x)

    def run(self, block: nn.Linear, x: Tensor) -> Any:
        self.runs += 1
        return self.how(block, x)


LEARNING: dict[str, tuple[Callable[[nn.Linear, Tensor], Any], Any, int]] = {
    # what a block computes, where it learns, and how often the two blocks run in all
    "in a layer": (lambda block, x: block(x).tanh(), "blocks.*", 4),
    "in the second": (lambda block, x: block(x).tanh(), "blocks.1", 3),
    "in the first": (lambda block, x: block(x).tanh(), "blocks.0", 4),
    "in the head": (lambda block, x: block(x).tanh(), "head", 2),
    "of several outputs": (lambda block, x: (block(x).tanh(), 3, x.long()), "blocks.*", 4),
    "in a weight that is read": (lambda b, x: F.linear(x, b.weight).tanh(), "blocks.*", 4),
    "in a choice": (
        lambda block, x: x + block(x).argmax(-1, keepdim=True),
        ["blocks.*", "head"],
        4,
    ),
}


@pytest.mark.parametrize(("how", "at", "runs"), LEARNING.values(), ids=LEARNING)
def test_a_frozen_block_whose_input_has_no_gradient(how: Any, at: Any, runs: int) -> None:
    """What learns in it has its gradient, and a block that learns nothing runs once."""
    x, found = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), []
    for reentrant in (False, True):
        torch.manual_seed(0)
        host = mg.Host(Head(how, reentrant))
        implant = host.implant("a", mg.LoRA(rank=2), at=at)
        with torch.no_grad():
            for p in implant.parameters():
                p.normal_()
        host(x).square().sum().backward()
        found.append([p.grad for p in implant.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert host.model.runs == runs


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("kind", list(CheckpointImpl))
def test_layers_that_are_wrapped_after_implanting(kind: CheckpointImpl) -> None:
    expected = gradients(made(plain), by_modules)
    host = made(plain)
    apply_activation_checkpointing(
        host.model, lambda m: checkpoint_wrapper(m, kind), lambda m: isinstance(m, nn.Linear)
    )
    for one, other in zip(gradients(host, by_modules), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_backward_in_another_thread() -> None:
    expected = gradients(made(plain), by_using)
    host = made(FORMS["not reentrant"])
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    first, second = by_using(host, x)
    host.use("q")
    thread = threading.Thread(target=(first.square() + second).sum().backward)
    thread.start()
    thread.join()
    for one, other in zip(
        [x.grad, *(p.grad for p in host.implants.parameters())], expected, strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_checkpoint_that_is_not_torchs() -> None:
    """It is right under one composition, which is the one in force, and is refused otherwise."""

    def own(block: nn.Module, x: Tensor) -> Tensor:
        return Recompute.apply(block, x)

    def twice(host: mg.Host, x: Tensor) -> list[Tensor]:
        host.use("q")
        with torch.no_grad():
            host(x, modules="p")  # makes no graph
        return [host(x), host.model(x)]

    for one, other in zip(gradients(made(own), twice), gradients(made(plain), twice), strict=True):
        torch.testing.assert_close(one, other)
    for way in WAYS:
        with pytest.raises(mg.ModgraftError, match=r"torch\.utils\.checkpoint\.checkpoint"):
            gradients(made(own), way)


def test_a_hook_in_backward_may_call_the_host() -> None:
    host = made(plain)
    x = torch.randn(4, 3, 6).requires_grad_()
    seen: list[Tensor] = []
    host(x, modules="p").register_hook(lambda _: seen.append(host(x, modules="q")))
    out = host(x, modules="p")
    out.register_hook(lambda _: seen.append(host(x, modules="q")))
    out.sum().backward()
    torch.testing.assert_close(seen[0], host(x, modules="q"))
