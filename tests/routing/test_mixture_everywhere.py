"""The contract's rules for a mixture on every host.

A router weighs two modules: LoRA, or adapters where LoRA would act inside a layer. Routed by task,
all tokens share one row α = softmax(z), so that the equation can be written out.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import modgraft as mg
from common import counted
from contract.hosts import BATCH, FEATURES, HOSTS, HostCase, tensor_of
from contract.references import at_each_site, bottleneck, weights

INSIDE = ("mha", "rnn")  # their projections are no separate layers
NAMES = ("a", "b")

pytestmark = [
    pytest.mark.parametrize("case", HOSTS.values(), ids=list(HOSTS)),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def mixed(
    case: HostCase, router: mg.Router | None = None, shallow: bool = False, width: int | None = None
) -> mg.Host:
    host = mg.Host(case.model(shallow=shallow)).eval()
    for name in NAMES:
        module = mg.Adapter(reduction=4) if case.name in INSIDE else mg.LoRA(rank=4, alpha=3.0)
        at = case.adapter_at if case.name in INSIDE else case.lora_at
        host.implant(name, module, at, active=False)
    mixture = mg.Mixture(NAMES, router=router or mg.Soft(level="task"), width=width)
    host.implant("m", mixture)
    with torch.no_grad():
        for implant in host.implants.values():
            for parameter in implant.parameters():
                parameter.normal_(0.0, 0.3)
    return host


def run(host: torch.nn.Module, case: HostCase, **kw: object) -> Tensor:
    with torch.no_grad():
        return tensor_of(host(**case.batch(), **kw))


def table_of(host: mg.Host) -> Tensor:
    return host["m"].places[0].get_parameter("route.table")


def test_forward_and_gradient_equal_the_written_out_equation(case: HostCase) -> None:
    host = mixed(case).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}
    plain = copy.deepcopy(case.model()).double().requires_grad_(False)
    for sub in list(plain.modules()):
        for name in list(sub._parameters):
            value = sub._parameters.pop(name)
            setattr(sub, name, None if value is None else value.detach())
    z = table_of(host).detach().clone().requires_grad_()
    alpha = z[0].softmax(0)
    own = {
        name: {
            f"{path}:{key}": value.detach().clone().requires_grad_()
            for path, place in zip(host[name].paths, host[name].places, strict=True)
            for key, value in place.named_parameters()
        }
        for name in NAMES
    }
    if case.name in INSIDE:
        tensors = {
            key.replace(":", f":{name}."): value
            for name in NAMES
            for key, value in own[name].items()
        }

        def both(y: Tensor, x: Tensor, t: dict[str, Tensor]) -> Tensor:
            of = [{k.removeprefix(f"{n}."): v for k, v in t.items()} for n in NAMES]
            return y + alpha[0] * bottleneck(y, of[0]) + alpha[1] * bottleneck(y, of[1])

        at_each_site(both)({"m": host["a"]}, plain, tensors)
    else:
        for a, name in zip(alpha, NAMES, strict=True):
            rule = weights(lambda W, t, place, a=a: W + a * 3.0 / 4 * t["B"] @ t["A"])
            rule({"m": host[name]}, plain, own[name])
    expected, out = tensor_of(plain(**batch)), tensor_of(host(**batch))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)

    probe = torch.randn(out.shape, dtype=out.dtype)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(table_of(host).grad, z.grad, rtol=1e-7, atol=1e-10)
    for name in NAMES:
        for key, value in own[name].items():
            path, _, tensor = key.rpartition(":")
            place = host[name].places[host[name].paths.index(path)]
            got = place.get_parameter(tensor).grad
            torch.testing.assert_close(got, value.grad, rtol=1e-7, atol=1e-10)


def test_examples_are_routed_by_what_is_given(case: HostCase) -> None:
    host = mixed(case, mg.TopK(1), width=FEATURES)
    query = torch.randn(BATCH, 1, FEATURES, generator=torch.Generator().manual_seed(3))
    side = {"example": mg.Side(query)}
    got = run(host, case, side=side)
    with torch.no_grad():
        chosen = host["m"].places[0].get_submodule("route")(query[:, 0]).weights.argmax(-1)
    alone = [run(host, case, modules=NAMES[j]) for j in chosen.tolist()]
    for i in range(BATCH):
        torch.testing.assert_close(got[i], alone[i][i], rtol=1e-5, atol=1e-5)


def test_the_host_is_untouched_and_gets_rid_of_it(case: HostCase) -> None:
    model = case.model()
    tree = {path: (type(sub), set(sub.__dict__)) for path, sub in model.named_modules()}
    bare = run(mg.Host(model).eval(), case)
    host = mixed(case)
    off = run(host, case, modules=None)
    assert torch.equal(off, bare)
    assert not torch.allclose(run(host, case), bare)
    with pytest.raises(mg.ModgraftError, match="'m'"):
        host.remove("a")  # the mixture mixes it
    for name in ("m", *NAMES):
        host.remove(name)
    assert torch.equal(run(host, case), bare)
    assert {p: (type(s), set(s.__dict__)) for p, s in host.model.named_modules()} == tree


def test_only_what_was_asked_trains(case: HostCase) -> None:
    host = mixed(case)
    for train, names in (("m", ["m"]), (["m", "a"], ["m", "a"])):
        with host.training_only(train):
            learn = {id(p) for p in host.parameters() if p.requires_grad}
            assert learn == {id(p) for name in names for p in host[name].parameters()}
            host.zero_grad()
            tensor_of(host(**case.batch())).square().mean().backward()
            assert all(p.grad is not None for name in names for p in host[name].parameters())


def test_saved_loaded_and_copied(case: HostCase, tmp_path: Path) -> None:
    host = mixed(case)
    expected = run(host, case)
    for name in (*NAMES, "m"):
        host.save(name, tmp_path / name)
    for first in ((), NAMES):  # the mixed modules come with the mixture, unless they are there
        fresh = mg.Host(case.model()).eval()
        for name in first:
            fresh.load(tmp_path / name)
        fresh.load(tmp_path / "m")
        assert set(fresh.implants) == {*NAMES, "m"}
        assert torch.equal(run(fresh, case, modules="m"), expected)
    fresh.remove("m")
    with torch.no_grad():
        for parameter in fresh["a"].parameters():
            parameter.add_(1)
    with pytest.raises(mg.ModgraftError, match="'a' is implanted already"):
        fresh.load(tmp_path / "m")  # another module of that name
    assert set(fresh.implants) == set(NAMES)
    twin = copy.deepcopy(host)
    with torch.no_grad():
        for parameter in twin["a"].parameters():
            parameter.mul_(2)
    assert torch.equal(run(host, case), expected)
    assert not torch.equal(run(twin, case), expected)
    twin.load_state_dict(host.state_dict())
    assert torch.equal(run(twin, case), expected)


@torch._dynamo.config.patch(allow_rnn=True)
def test_compiled_once_for_every_composition(case: HostCase) -> None:
    host = mixed(case, shallow=True)
    compiled, graphs = counted(host)
    for composition in ("m", None, "a", "b >> 0.5*m", "a >> m", "-1*m"):
        host.use(composition)
        torch.testing.assert_close(run(compiled, case), run(host, case), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_half_precision_and_checkpointing(case: HostCase) -> None:
    host = mixed(case)
    exact = run(host, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = tensor_of(host(**case.batch()))
        half.float().square().mean().backward()
    learn = [p for implant in host.implants.values() for p in implant.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learn)
    assert (half.float() - exact).abs().mean() < 0.1 * exact.abs().mean()
    if not getattr(host.model, "supports_gradient_checkpointing", False):
        return

    def gradients() -> list[Tensor]:
        host.zero_grad()
        tensor_of(host(**case.batch())).square().mean().backward()
        return [p.grad.clone() for p in learn if p.grad is not None]

    host.train()
    expected = gradients()
    host.model.activation_checkpointing_enable()
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_generate_is_that_of_the_sum_of_weights(case: HostCase) -> None:
    host = mixed(case)
    if not case.generates:
        pytest.skip(f"{case.name} does not generate")
    batch = case.batch()
    batch.pop("labels", None)
    how = {"max_new_tokens": 6, "min_new_tokens": 6}
    a, b = table_of(host)[0].softmax(0).tolist()
    for beams in (1, 3):
        got = host.generate(**batch, **how, num_beams=beams)
        same = host.generate(**batch, **how, num_beams=beams, modules=f"{a!r}*a + {b!r}*b")
        assert torch.equal(got, same)
