"""``mg.Weighted``, weights of modules for each example, equals sums written out."""

from __future__ import annotations

import doctest
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import modgraft as mg
from contract.hosts import BATCH, FEATURES, HOSTS, HostCase, side, tensor_of

NAMES = ["lora", "wide", "dora", "scale", "adapter", "parallel", "fusion"]
WEIGHTS = torch.tensor(
    [
        [1.0, 0.0, 0.5, 0.0, -1.0, 0.3, 1.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.25, -2.0, 0.0, 0.7, 0.5, 0.0, 0.4],
    ],
    dtype=torch.float64,
)
hosts = pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "plain"])


def made(name: str) -> mg.Host:
    case = HOSTS[name]
    host = mg.Host(case.model().double()).eval()
    site = "2" if name == "plain" else "down"
    beside = "attention" if name == "bert" else case.parallel_at
    for own, module, at in (
        ("lora", mg.LoRA(rank=2), case.lora_at),
        ("wide", mg.LoRA(rank=3, bias=name != "t5"), site),
        ("dora", mg.LoRA(rank=2, dora=True), site),
        ("scale", mg.Rescale(), case.keys_at),
        ("adapter", mg.Adapter(width=4), case.adapter_at),
        ("parallel", mg.ParallelAdapter(width=4), beside),
        ("fusion", mg.GatedFusion(dim=FEATURES), case.output_at),
    ):  # fmt: skip
        host.implant(own, module, at, active=False)
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0, 0.2)
    return host


def batch_of(case: HostCase) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}


def given() -> dict[str, Any]:
    return {"side": {"image": side(dtype=torch.float64)}}


def sums(host: mg.Host, case: HostCase, weights: Tensor, around: str = "{}") -> Tensor:
    """Run each example alone under a composition with its weights as numbers."""
    batch, features, rows = batch_of(case), side(dtype=torch.float64), []
    assert features.mask is not None
    for i, row in enumerate(weights.tolist()):
        total = " + ".join(f"({w!r})*{n}" for w, n in zip(row, NAMES, strict=False))
        own = mg.Side(features.tensor[i : i + 1], features.mask[i : i + 1])
        one = {k: v[i : i + 1] for k, v in batch.items()}
        rows.append(host(**one, side={"image": own}, modules=around.format(total)))
    return torch.cat([tensor_of(row) for row in rows])


@hosts
@torch.no_grad()
def test_each_example_has_its_sum(name: str) -> None:
    host, case = made(name), HOSTS[name]
    seen, batch = case.seen(), batch_of(case)
    weighted = mg.Weighted(NAMES, WEIGHTS)

    def check(composition: Any, expected: Tensor) -> None:
        out = tensor_of(host(**batch, **given(), modules=composition))
        torch.testing.assert_close(out[seen], expected[seen], rtol=1e-10, atol=1e-11)

    check(weighted, sums(host, case, WEIGHTS))
    check(0.5 * weighted, sums(host, case, 0.5 * WEIGHTS))
    check(host["adapter"] >> weighted, sums(host, case, WEIGHTS, "adapter >> ({})"))
    check(
        mg.average(weighted >> host["lora"], -host["scale"]),
        sums(host, case, WEIGHTS, "average(({}) >> lora, -scale)"),
    )
    host.use(weighted)
    out = tensor_of(host(**batch, **given()))
    torch.testing.assert_close(out[seen], sums(host, case, WEIGHTS)[seen], rtol=1e-10, atol=1e-11)
    bare = tensor_of(host(**batch, modules=None))
    assert torch.equal(out[1][seen[1]], bare[1][seen[1]])  # all its weights are 0


# T5 takes its softmax in float32, whatever its weights are: no differences of 1e-6 there
@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "plain"])
def test_gradients_of_the_weights_are_those_of_finite_differences(name: str) -> None:
    host, case = made(name), HOSTS[name]
    host.requires_grad_(False)
    names, batch = ["wide", "scale", "adapter", "fusion"], batch_of(case)

    def loss(weights: Tensor) -> Tensor:
        out = tensor_of(host(**batch, **given(), modules=mg.Weighted(names, weights)))
        return out.square().mean()

    weights = WEIGHTS[:, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, weights, fast_mode=True, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_gradients_of_modules_and_weights_are_those_of_the_sums(name: str) -> None:
    host, case = made(name), HOSTS[name]
    names, seen = NAMES[:6], HOSTS[name].seen()
    weights = WEIGHTS[:, :6].clone().requires_grad_()

    def gradients(of: Any) -> list[Tensor]:
        host.zero_grad()
        learn = [p for n in names for p in host[n].parameters()]
        return list(torch.autograd.grad(of[seen].square().sum(), learn))

    out = tensor_of(host(**batch_of(case), modules=mg.Weighted(names, weights)))
    for one, other in zip(gradients(out), gradients(sums(host, case, WEIGHTS[:, :6])), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
@torch.no_grad()
def test_generated(name: str, settings: dict[str, Any]) -> None:
    host, case = made(name), HOSTS[name]
    batch = {k: v for k, v in batch_of(case).items() if k != "labels"}
    length = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **settings}
    together = host.generate(**batch, **given(), modules=mg.Weighted(NAMES, WEIGHTS), **length)
    features = side(dtype=torch.float64)
    for i in range(BATCH):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        assert features.mask is not None
        own = mg.Side(features.tensor[i : i + 1], features.mask[i : i + 1])
        alone = mg.Weighted(NAMES, WEIGHTS[i : i + 1])
        text = host.generate(**one, side={"image": own}, modules=alone, **length)
        assert torch.equal(text[0], together[i])


def test_recomputed_under_the_weights_of_its_call() -> None:
    host, case = made("bert"), HOSTS["bert"]
    host.train()

    def gradient() -> Tensor:
        weights = WEIGHTS[:, :6].clone().requires_grad_()
        with host.using(mg.Weighted(NAMES[:6], weights)):
            loss = host(**batch_of(case)).logits.square().mean()
        loss.backward()
        assert weights.grad is not None
        return weights.grad

    expected = gradient()
    host.model.activation_checkpointing_enable()  # type: ignore[operator]
    torch.testing.assert_close(gradient(), expected)


def test_bf16_autocast() -> None:
    host, case = made("gpt2").float(), HOSTS["gpt2"]
    weights = WEIGHTS[:, :6].float().requires_grad_()
    composition = mg.Weighted(NAMES[:6], weights)
    exact = host(**case.batch(), modules=composition).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = host(**case.batch(), modules=composition).logits
    half.float().square().mean().backward()
    assert weights.grad is not None
    assert torch.isfinite(weights.grad).all()
    assert (half.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def counted(host: mg.Host) -> tuple[Any, list[Any]]:
    """Compile the host; also return the list of its graphs."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    return torch.compile(host, backend=counting, fullgraph=True), graphs


@pytest.mark.parametrize("name", ["gpt2", "plain"])
@torch.no_grad()
def test_one_compiled_graph_for_different_weights(name: str) -> None:
    host, case = made(name), HOSTS[name]
    if name == "gpt2":
        host.implant("prefix", mg.Prefix(length=2))  # in force, and not in the weights' modules
        with torch.no_grad():
            for p in host["prefix"].parameters():
                p.normal_(0, 0.5)
    compiled, graphs = counted(host)
    batch = batch_of(case)
    for scale in (1.0, 0.0, -0.5, 3.0):
        composition = mg.Weighted(NAMES[:6], scale * WEIGHTS[:, :6])
        out = tensor_of(compiled(**batch, modules=composition))
        expected = tensor_of(host(**batch, modules=composition))
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    assert len(graphs) == 1


@torch.no_grad()
def test_compiled_means_of_prompts_and_prefixes() -> None:
    """The compiled graph of a chain is not used for a mean, which is no chain."""
    case = HOSTS["gpt2"]
    host = mg.Host(case.model().double()).eval()
    for name in ("p", "q"):
        host.implant(name, mg.SoftPrompt(length=2), active=False)
    for name in ("x", "y"):
        host.implant(name, mg.Prefix(length=2), active=False)
    host.implant("f", mg.Adapter(width=4), "down", active=False)
    for p in host.implants.parameters():
        p.normal_(0, 0.5)
    compiled, _ = counted(host)
    for composition in ("average(p, q) >> average(x, x, y) >> f", "p >> p >> x >> x"):
        host.use(composition)
        out, expected = compiled(**case.batch()).logits, host(**case.batch()).logits
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)


def test_weights_that_are_trained_in_place() -> None:
    """Each step under one ``use`` sees the current weights and frees its graph."""
    host, case = made("plain"), HOSTS["plain"]
    host.requires_grad_(False)
    weights = torch.nn.Parameter(WEIGHTS[:, 2:5].clone())
    host.use(host["lora"] >> mg.Weighted(NAMES[2:5], weights))
    optimiser = torch.optim.SGD([weights], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        out = tensor_of(host(**batch_of(case)))
        fresh = host["lora"] >> mg.Weighted(NAMES[2:5], weights.detach().clone())
        assert torch.equal(out, tensor_of(host(**batch_of(case), modules=fresh)))
        out.square().mean().backward()
        optimiser.step()
        del out
    assert not torch.allclose(weights, WEIGHTS[:, 2:5])


def test_weights_of_a_call_are_not_kept() -> None:
    host, case = made("plain"), HOSTS["plain"]
    weights = WEIGHTS.clone()
    gone = weakref.ref(weights)
    host(**batch_of(case), **given(), modules=0.5 * mg.Weighted(NAMES, weights))
    del weights
    gc.collect()
    assert gone() is None


def test_the_example_of_the_docstring() -> None:
    found = doctest.DocTestFinder().find(mg.Weighted, "Weighted", globs={})
    results = [doctest.DocTestRunner().run(test) for test in found if test.examples]
    assert [(r.failed, r.attempted > 3) for r in results] == [(0, True)]
