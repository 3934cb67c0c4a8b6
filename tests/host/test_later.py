"""Layers that a host runs outside of its forward's thread, or when the forward has returned."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import modgraft as mg

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Runs its layer as a function tells."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Any:
        return self.how(self.f, x)


def host_of(how: Callable[[nn.Module, Tensor], Any]) -> mg.Host:
    host = mg.Host(Net(how)).eval()
    host.implant("a", mg.LoRA(rank=2), at="f", active=False)
    nn.init.normal_(
        host["a"].places[0].get_parameter("B"), generator=torch.Generator().manual_seed(2)
    )
    return host


def in_threads(f: nn.Module, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(f, [x, 2 * x]))  # type: ignore[return-value]


def with_their_call(f: nn.Module, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(contextvars.copy_context().run, f, each) for each in (x, 2 * x)]
        return sum(run.result() for run in runs)  # type: ignore[return-value]


@torch.no_grad()
def test_threads_of_a_forward_run_its_call_or_are_refused() -> None:
    host = host_of(in_threads)
    wanted = {name: host.merge(name)(X) for name in ("a", None)}
    for force in ("a", None):
        host.use(force)
        other = None if force else "a"
        torch.testing.assert_close(host(X), wanted[force])  # by what is in force: all the same
        torch.testing.assert_close(host(X, modules=force), wanted[force])
        torch.testing.assert_close(host.model(X), wanted[force])
        words = "a layer runs in a thread of its own.*copy_context"
        for given in (other, [other] * 3):
            with pytest.raises(mg.ModgraftError, match=words):
                host(X, modules=given)
        with host.using(other):
            for call in (host, host.model):
                with pytest.raises(mg.ModgraftError, match=words):
                    call(X)
        vars(host.model)["how"] = with_their_call  # the remedy
        for given in ("a", None, ["a"] * 3):
            out = host(X, modules=given)
            torch.testing.assert_close(out, wanted["a" if given else None])
        vars(host.model)["how"] = in_threads


def reading_in_threads(f: nn.Module, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: nn.functional.linear(x, f.weight, f.bias)).result()  # type: ignore[arg-type]


@torch.no_grad()
def test_a_refusal_that_a_thread_ends_with_is_raised_by_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def in_a_thread(f: nn.Module, x: Tensor) -> Tensor:
        out = torch.zeros(3, 4)
        thread = threading.Thread(target=lambda: out.copy_(f(x)))
        thread.start()
        thread.join()
        return out

    host = host_of(in_a_thread)
    with pytest.raises(mg.ModgraftError, match="a layer runs in a thread of its own"):
        host(X, modules="a")
    host.use("a")
    torch.testing.assert_close(host(X), host.merge("a")(X))


@torch.no_grad()
def test_a_weight_that_a_thread_of_a_forward_reads_is_that_of_its_call_or_refused() -> None:
    host = host_of(reading_in_threads)
    wanted = {name: host.merge(name)(X) for name in ("a", None)}
    for force in ("a", None):
        host.use(force)  # the thread is outside of all calls either way
        with pytest.raises(mg.ModgraftError, match=r"a layer.s weight is read in a thread.*copy_c"):
            host(X, modules="a")
        torch.testing.assert_close(host(X, modules=None), wanted[None])
    f = host.model.get_submodule("f")
    with ThreadPoolExecutor(1) as pool:  # no call runs
        assert pool.submit(lambda: f.weight).result() is f.weight

    def with_its_call(f: nn.Module, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            run = contextvars.copy_context().run
            return pool.submit(run, lambda: nn.functional.linear(x, f.weight, f.bias)).result()  # type: ignore[arg-type]

    vars(host.model)["how"] = with_its_call
    torch.testing.assert_close(host(X, modules="a"), wanted["a"])


def test_routers_in_the_threads_of_a_forward_choose_with_their_call_or_are_refused() -> None:
    host = host_of(in_threads)
    host.implant("b", mg.LoRA(rank=2), at="f", active=False)
    router = mg.NoisyTopK(k=1, level="token")
    host.implant("m", mg.Mixture(["a", "b"], router=router))
    x = X[:, None]
    with pytest.raises(
        mg.ModgraftError, match=r"a layer runs in a thread of its own.*copy_context"
    ):
        host(x)
    vars(host.model)["how"] = with_their_call
    host(x)


def test_a_probe_of_a_host_with_threads_ends() -> None:
    host = host_of(in_threads)
    assert "a layer runs in a thread of its own" in host.probe({"x": X}).faults["a"][0]
    host.use("a")
    with pytest.raises(mg.ModgraftError, match="a layer runs in a thread of its own"):
        host.probe({"x": X})
    host.use(None)
    vars(host.model)["how"] = with_their_call
    assert not host.probe({"x": X}).faults
    assert torch.equal(host(X), host(X, modules=None))


@torch.no_grad()
def test_a_whole_model_in_a_thread_of_a_forward() -> None:
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    bert = BertModel(config)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(self.bert, x).result()[0]

    host = mg.Host(Around()).eval()
    host.implant("a", mg.LoRA(rank=2), at="*.query", active=False)
    with pytest.raises(mg.ModgraftError, match="a layer runs in a thread of its own"):
        host(ids, modules="a")
    assert torch.equal(host(ids), host.merge(None)(ids))


@torch.no_grad()
def test_another_thread_calls_the_model_or_a_layer_while_a_call_runs() -> None:
    host = host_of(lambda f, x: (f(x), between())[0])
    seen: list[Tensor] = []

    def between() -> None:
        if not seen:
            seen.append(X)
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(host.model, X).result())
                seen.append(pool.submit(host, X).result())

    acts = host(X, modules="a")
    assert torch.equal(seen[1], host(X))
    assert torch.equal(seen[2], host(X))
    assert not torch.equal(acts, host(X))
    f = host.model.get_submodule("f")
    with ThreadPoolExecutor(1) as pool, host.using("a"):  # no call runs
        assert torch.equal(pool.submit(f, X).result(), seen[1])
        assert torch.equal(f(X), acts)


# -- when the forward has returned ----------------------------------------------------------------


def steps(f: nn.Module, x: Tensor) -> Iterator[Tensor]:
    for _ in range(2):
        x = f(x)
        more = yield x
        x = x if more is None else x + more
    return x + 1


def read(out: Any) -> Tensor:
    return torch.stack(list(out))


async def at_last(f: nn.Module, x: Tensor) -> Tensor:
    return f(x)


class Steps:
    """An iterator that is no generator, and may have a protocol of its own."""

    def __init__(self, f: nn.Module, x: Tensor) -> None:
        self.steps = steps(f, x)

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> Tensor:
        return next(self.steps)


REFUSED = "forward returns a (coroutine|Steps), which runs when the call"

LATER: dict[str, tuple[Callable[[nn.Module, Tensor], Any], Callable[[Any], Tensor]]] = {
    "a generator": (steps, read),
    "map": (lambda f, x: map(f, [x, 2 * x]), read),
    "a function": (lambda f, x: lambda: f(x), lambda out: out()),
    "a method": (lambda f, x: f.forward, lambda out: out(X)),
    "in a dictionary": (lambda f, x: {"out": [steps(f, x)], "x": x}, lambda o: read(o["out"][0])),
    "in a tuple": (lambda f, x: (x, lambda: f(x)), lambda out: out[1]()),
    "in an object": (lambda f, x: Namespace(x=x, run=lambda: f(x)), lambda out: out.run()),
    "in an object without tensors": (lambda f, x: Namespace(run=lambda: f(x)), lambda o: o.run()),
    "in a deque": (lambda f, x: deque([steps(f, x)]), lambda out: read(out[0])),
    "a coroutine": (at_last, asyncio.run),
    "an iterator of one's own": (Steps, read),
    "such an iterator in a list": (lambda f, x: [Steps(f, x)], lambda out: read(out[0])),
}


@pytest.mark.parametrize("kind", LATER)
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@torch.no_grad()
def test_what_a_forward_leaves_to_be_run_is_run_in_its_call(kind: str) -> None:
    how, run = LATER[kind]
    host = host_of(how)
    wanted = {name: run(host.merge(name)(X)) for name in ("a", None)}
    for force in ("a", None):
        host.use(force)
        torch.testing.assert_close(run(host(X)), wanted[force])
        other = None if force else "a"
        if "iterator" in kind or kind == "a coroutine":
            with pytest.raises(mg.ModgraftError, match=REFUSED):
                host(X, modules=other)
            with host.using(other), pytest.raises(mg.ModgraftError, match=REFUSED):
                host(X)  # it may be read behind the block
            continue
        torch.testing.assert_close(run(host(X, modules=other)), wanted[other])
        with host.using(other):
            out = host(X)
        torch.testing.assert_close(run(out), wanted[other])
    if "iterator" in kind or kind == "a coroutine":
        return
    out = host(X, modules="a")
    host.remove("a")
    with pytest.raises(mg.ModgraftError, match="no module 'a'"):
        run(out)


@torch.no_grad()
def test_the_steps_of_a_generator() -> None:
    host = host_of(steps)
    plain, merged = (read(host.merge(name)(X)) for name in (None, "a"))
    rows = torch.tensor([True, False, True])[:, None]
    out = read(host(X, modules=["a", None, "a"]))
    torch.testing.assert_close(out, torch.where(rows, merged, plain))

    out, f = host(X, modules="a"), host.merge("a").get_submodule("f")
    first = next(out)
    torch.testing.assert_close(first, f(X))
    second = out.send(X)  # what is sent to it goes to it
    torch.testing.assert_close(second, f(first + X))
    with pytest.raises(StopIteration) as end:
        next(out)
    torch.testing.assert_close(end.value.value, second + 1)

    out = host(X, modules="a")
    first = next(out)
    for parameter in host["a"].parameters():  # between two steps
        parameter.mul_(2)
    torch.testing.assert_close(next(out), host.merge("a").get_submodule("f")(first))
