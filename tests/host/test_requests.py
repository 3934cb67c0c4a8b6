"""Concurrent requests, in threads and in asyncio tasks, each with its own composition."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import modgraft as mg
from contract.hosts import BATCH, HOSTS

CASE = HOSTS["gpt2"]
ONES = ["a", "b >> f", None, "a + b", "f - 0.5*a", "p >> a", "x >> f", "average(x, y) >> b"]
LISTS = [["a", None, "b >> f"], ["p", "x >> a", "f"], [None, None, "average(a, b)"]]


def made(name: str) -> mg.Host:
    host = mg.Host(HOSTS[name].model()).eval()
    at, down = (HOSTS[name].lora_at, "down") if name == "gpt2" else (["0", "2"], "2")
    host.implant("a", mg.LoRA(rank=2), at, active=False)
    host.implant("b", mg.LoRA(rank=3), at, active=False)
    host.implant("f", mg.Adapter(width=4), down, active=False)
    if name == "gpt2":
        host.implant("p", mg.SoftPrompt(length=2), active=False)
        host.implant("x", mg.Prefix(length=2), active=False)
        host.implant("y", mg.Prefix(length=2), active=False)
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0, 0.3)
    host.use("b")
    return host


@pytest.fixture(scope="module")
def host() -> mg.Host:
    return made("gpt2")


@torch.no_grad()
def run(host: mg.Host, **kw: Any) -> Tensor:
    return host(**CASE.batch(), **kw).logits


def weights(i: int) -> mg.Weighted:
    return mg.Weighted(["a", "f"], torch.arange(2.0 * BATCH).view(BATCH, 2) - i)


@pytest.mark.parametrize("composition", [*ONES, *LISTS, "weights"], ids=str)
def test_a_nested_block_ends_with_what_was_around_it(host: mg.Host, composition: Any) -> None:
    inner = weights(1) if composition == "weights" else composition
    around, within = run(host, modules="a >> f"), run(host, modules=inner)
    with host.using("a >> f"):
        assert torch.equal(run(host), around)
        with host.using(inner):
            assert torch.equal(run(host), within)
            assert torch.equal(run(host, modules="a >> f"), around)
            with pytest.raises(mg.ModgraftError, match="did you mean"), host.using("b >> ff"):
                pass
            with host.using(None):
                assert torch.equal(run(host), run(host, modules=None))
            with pytest.raises(ValueError, match="non-empty"), host.using("a"):
                torch.cat([])
            assert torch.equal(run(host), within)
        assert torch.equal(run(host), around)
    assert torch.equal(run(host), run(host, modules="b"))


def request(host: mg.Host, i: int) -> tuple[Any, str]:
    """Choose the composition of the i-th request, and the way of asking for it."""
    wanted = [*ONES, *LISTS, weights(i % 3), weights(i % 2)]
    return wanted[i % len(wanted)], ("using", "modules", "nested", "generate", "in force")[i % 5]


def answer(host: mg.Host, i: int) -> Tensor:
    composition, how = request(host, i)
    with torch.no_grad():
        match how:
            case "using":
                with host.using(composition):
                    return run(host)
            case "modules":
                return run(host, modules=composition)
            case "nested":
                with host.using(LISTS[i % 3]):
                    run(host)
                    with host.using(composition):
                        run(host, modules=ONES[i % 7])
                        return run(host)
            case "generate":
                return host.generate(
                    **CASE.batch(), modules=composition, max_new_tokens=3, min_new_tokens=3,
                    num_beams=1 + i % 2, do_sample=False,
                )  # fmt: skip
    return run(host)


def test_threads(host: mg.Host) -> None:
    several = list(range(65))
    alone = [answer(host, i) for i in several]
    order = several * 2
    random.shuffle(order)
    with ThreadPoolExecutor(6) as pool:
        for i, out in zip(order, pool.map(lambda i: answer(host, i), order), strict=True):
            assert torch.equal(out, alone[i]), request(host, i)
    assert str(host.composition) == "b"


def test_tasks(host: mg.Host) -> None:
    """Tasks of one thread switch inside their ``using`` blocks."""

    async def task(i: int) -> list[Tensor]:
        composition, _ = request(host, i)
        out = []
        with host.using(composition):
            await asyncio.sleep(0)
            out.append(run(host))
            with host.using(LISTS[i % 3]):
                await asyncio.sleep(0)
                out.append(run(host))
                out.append(await asyncio.to_thread(run, host))  # a thread of the task's own
            await asyncio.sleep(0)
            out.append(run(host))
        out.append(run(host))
        return out

    async def all_of_them() -> list[list[Tensor]]:
        return await asyncio.gather(*(task(i) for i in range(26)))

    for i, out in enumerate(asyncio.run(all_of_them())):
        composition, _ = request(host, i)
        own, inner = run(host, modules=composition), run(host, modules=LISTS[i % 3])
        for found, wanted in zip(
            out, [own, inner, inner, own, run(host, modules="b")], strict=True
        ):
            assert torch.equal(found, wanted)


def test_more_compositions_than_are_remembered() -> None:
    """Threads evict one another's parsed expressions and plans from the caches."""
    host, x = made("plain"), HOSTS["plain"].batch()["input"]
    texts = [f"{u}*a + {v}*b >> f" for u, v in product(range(20), range(20))]

    @torch.no_grad()
    def out(text: str) -> Tensor:
        return host(x, modules=text)

    alone = [out(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            together = list(pool.map(out, texts))
            assert all(map(torch.equal, together, alone))


def test_another_is_put_in_force_while_requests_run() -> None:
    """``host.use`` in one thread does not change a request that names its composition."""
    host, x = made("plain").double(), HOSTS["plain"].batch()["input"].double()
    wanted = ["a", "b", "a >> f", "a + b"]

    @torch.no_grad()
    def one(i: int) -> bool:
        if i % 5 == 0:
            host.use(wanted[i // 5 % 4])
            host(x)  # runs, whichever composition is in force by now
        # rounding differs, as weights in force are merged
        return torch.allclose(host(x, modules=wanted[i % 4]), alone[i % 4], rtol=1e-10)

    with torch.no_grad():
        alone = [host(x, modules=c) for c in wanted]
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(one, range(600)))
    assert str(host.composition) in wanted
