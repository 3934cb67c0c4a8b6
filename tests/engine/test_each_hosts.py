"""``mg.Each`` on hosts of every kind: without text, with side inputs, and in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import modgraft as mg
from contract.hosts import BATCH, FEATURES, HOSTS, HostCase, side, tensor_of

NAMES = ["vit", "plain", "cnn", "mha", "bert", "t5"]
LISTS = [
    ["lora", "lora_2", None],
    ["lora", "scale", "adapter"],
    ["fusion", None, "fusion_2"],
    ["fusion >> lora", "adapter >> fusion", "0.5*fusion_2 - lora_2"],
    ["average(fusion, fusion_2)", "lora_2 >> adapter_2", "fusion_2 >> fusion"],
    ["compacter", "compacter + adapter", "compacter"],
    ["average(lora, adapter)", "average(lora_2, adapter_2)", "average(lora, adapter_2)"],
]
INPUTS = [
    ["prompt >> lora", "prefix", "average(prompt, prompt_2) >> fusion"],
    ["concat(prompt, prompt_2)", None, "average(prefix, prefix_2) >> adapter"],
]


def made(name: str) -> mg.Host:
    case = HOSTS[name]
    torch.manual_seed(0)
    host = mg.Host(case.model().double()).eval()
    parts: list[tuple[str, Any, Any]] = [
        ("lora", lambda: mg.LoRA(rank=3), case.inner_at if name == "mha" else case.lora_at),
        ("scale", mg.Rescale, case.keys_at),
        ("adapter", lambda: mg.Adapter(width=4), case.adapter_at),
        ("fusion", lambda: mg.GatedFusion(dim=FEATURES), case.output_at),
        ("compacter", lambda: mg.Compacter(width=4, n=2, rank=1), case.adapter_at),
    ]
    if name in ("vit", "bert", "t5"):
        parts += [
            ("prompt", lambda: mg.SoftPrompt(length=2), None),
            ("prefix", lambda: mg.Prefix(length=2), None),
        ]
    for own, make, at in parts:
        for each in (own, f"{own}_2"):
            host.implant(each, make(), at, active=False)
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0, 0.3)
    return host


def batch_of(case: HostCase) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}


def rows_of(case: HostCase, i: int) -> dict[str, Any]:
    """Take the i-th example with its side input."""
    features = side(dtype=torch.float64)
    assert features.mask is not None
    own = mg.Side(features.tensor[i : i + 1], features.mask[i : i + 1])
    return {**{k: v[i : i + 1] for k, v in batch_of(case).items()}, "side": {"image": own}}


def cases() -> list[Any]:
    return [
        pytest.param(name, modules, id=f"{name}-{i}")
        for name in NAMES
        for i, modules in enumerate(LISTS + (INPUTS if name in ("vit", "bert", "t5") else []))
        if not (name == "mha" and "scale" in str(modules))
    ]


@pytest.mark.parametrize(("name", "modules"), cases())
@torch.no_grad()
def test_each_example_as_if_alone(name: str, modules: list[Any]) -> None:
    host, case = made(name), HOSTS[name]
    everything = {"image": side(dtype=torch.float64)}
    out = tensor_of(host(**batch_of(case), side=everything, modules=modules))
    seen = case.seen()
    for i, own in enumerate(modules):
        alone = tensor_of(host(**rows_of(case, i), modules=own))[0]
        torch.testing.assert_close(out[i][seen[i]], alone[seen[i]], rtol=1e-9, atol=1e-10)
        handled = host(**rows_of(case, i), modules=[own])
        torch.testing.assert_close(tensor_of(handled)[0][seen[i]], alone[seen[i]])


@torch.no_grad()
def test_examples_without_an_image_and_without_a_need_of_one() -> None:
    host, case = made("bert"), HOSTS["bert"]
    seen, everything = case.seen(), {"image": side(dtype=torch.float64)}
    bare = host(**batch_of(case), modules=None).logits
    out = host(**batch_of(case), side=everything, modules=["fusion", "fusion", None]).logits
    assert not torch.allclose(out[0], bare[0])
    for i in (1, 2):  # no image is seen; nothing asks for one
        assert torch.equal(out[i][seen[i]], bare[i][seen[i]])
    with pytest.raises(mg.ModgraftError, match="'fusion' needs the side input 'image'"):
        host(**batch_of(case), modules=["lora", "fusion", None])
    assert torch.equal(host(**batch_of(case), modules=None).logits, bare)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_recomputed_under_the_compositions_of_its_call(name: str) -> None:
    host, case = made(name), HOSTS[name]
    host.train()

    def gradients() -> dict[str, Tensor]:
        host.zero_grad()
        everything = {"image": side(dtype=torch.float64)}
        with host.using(["lora >> prefix", "fusion", "adapter + lora_2"]):
            loss = tensor_of(host(**batch_of(case), side=everything)).square().mean()
        loss.backward()
        found = {n: p.grad for n, p in host.implants.named_parameters() if p.grad is not None}
        return {n: grad.clone() for n, grad in found.items()}

    expected = gradients()
    assert {n.split(".")[0] for n in expected} >= {"lora", "prefix", "fusion", "adapter", "lora_2"}
    host.model.activation_checkpointing_enable()  # type: ignore[operator]
    again = gradients()
    assert again.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(again[key], gradient)


@pytest.mark.parametrize("name", ["bert", "vit", "plain"])
def test_bf16_autocast(name: str) -> None:
    host, case = made(name).float(), HOSTS[name]
    modules = ["lora >> adapter", "lora_2 >> adapter_2", "fusion + scale"]
    if name != "plain":
        modules[1] = "prefix >> compacter"
    exact = tensor_of(host(**case.batch(), side={"image": side()}, modules=modules))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = tensor_of(host(**case.batch(), side={"image": side()}, modules=modules))
        half.float().square().mean().backward()
    seen, grads = case.seen(), [p.grad for p in host.implants.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(grad).all() for grad in grads)
    apart = (half.float() - exact).detach()[seen].abs().mean()
    assert apart < 0.1 * exact.detach()[seen].abs().mean()


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generated_with_images_and_returned_several_times(beams: int) -> None:
    host, case = made("t5"), HOSTS["t5"]
    modules = ["fusion >> lora", "prefix", "fusion_2 + adapter"]
    settings: dict[str, Any] = {
        "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False,
        "num_return_sequences": min(beams, 2),
    }  # fmt: skip
    batch = {k: v for k, v in batch_of(case).items() if k != "labels"}
    everything = {"image": side(dtype=torch.float64)}
    together = host.generate(**batch, side=everything, modules=modules, **settings)
    uncached = host.generate(**batch, side=everything, modules=modules, use_cache=False, **settings)
    assert torch.equal(together, uncached)
    several = settings["num_return_sequences"]
    for i in range(BATCH):
        one = {k: v for k, v in rows_of(case, i).items() if k != "labels"}
        alone = host.generate(**one, modules=modules[i], **settings)
        assert torch.equal(alone, together[i * several : (i + 1) * several])


@pytest.mark.parametrize("kind", ["lora", "scale", "adapter", "compacter"])
@torch.no_grad()
def test_examples_of_one_module_side_by_side(kind: str) -> None:
    """Examples of one module run as one where they stand in equal blocks, and only there."""
    host = made("gpt2")
    a, b = kind, f"{kind}_2"
    ids = torch.randint(3, 40, (6, 5), generator=torch.Generator().manual_seed(4))
    for modules in ([a, a, a, b, b, b], [a, b, a, b, a, b], [b, b, a, a, b, b], [b] * 6):
        together = host(input_ids=ids, modules=modules).logits
        for i, own in enumerate(modules):
            alone = host(input_ids=ids[i : i + 1], modules=own).logits[0]
            torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["plain", "cnn", "vit"])
def test_odd_numbers_of_an_example_reach_no_other(name: str, odd: float) -> None:
    """Neither in value nor in gradient: the last example's are NaN, the loss is of the others."""
    host = made(name)
    (key, given), *_ = batch_of(HOSTS[name]).items()

    def outcome(modules: list[Any], last: float) -> list[Tensor]:
        x = given.clone()
        x[-1] = last
        x.requires_grad_()
        host.zero_grad()
        out = tensor_of(
            host(**{key: x}, side={"image": side(dtype=torch.float64)}, modules=modules)
        )
        out[:-1].square().sum().backward()
        first, second, third = (() if m is None else host.read(m).names() for m in modules)
        used = [n for n in (*first, *second) if n not in third]
        grads = [p.grad for n in used for p in host[n].parameters() if p.grad is not None]
        return [out[:-1].detach(), x.grad[:-1], *(grad.clone() for grad in grads)]

    for modules in LISTS + (INPUTS if name == "vit" else []):
        zero = outcome(modules, 0.0)
        assert all(tensor.isfinite().all() for tensor in zero)
        for got, want in zip(outcome(modules, odd), zero, strict=True):
            assert torch.equal(got, want)
