"""The contract: what must always hold, for every module on every host.

A new module is one row of ``MODULES`` in ``modules.py``; a new host one row of ``hosts.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from contract.hosts import BATCH, DEVICE, FEATURES, HOSTS, HostCase, side, tensor_of
from contract.modules import MODULES, ModuleCase, implanted

DEFINED = [
    pytest.param(case, module, id=f"{module.name}-{case.name}")
    for module in MODULES.values()
    for case in HOSTS.values()
    if case.name not in module.refused
]  # computation/test_function_composition.py tests that the others are refused
pytestmark = [
    pytest.mark.parametrize(("case", "module"), DEFINED),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


def extra(module: ModuleCase, rows: int = BATCH, **kw: Any) -> dict[str, Any]:
    return {"side": {"image": side(rows, **kw)}} if module.needs_side else {}


def run(host: nn.Module, case: HostCase, **kw: Any) -> Tensor:
    with torch.no_grad():
        return tensor_of(host(**case.batch(), **kw))


# 1 -- the host is untouched --------------------------------------------------------------------


def test_host_tree_is_untouched(case: HostCase, module: ModuleCase) -> None:
    model = case.model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {path: (type(m), str(type(m))) for path, m in model.named_modules()}
    attributes = {path: set(m.__dict__) for path, m in model.named_modules()}
    host = mg.Host(model).eval()
    bare = run(host, case)

    def same_tree() -> None:
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[k], before[k]) for k in before)
        assert [p for p, _ in model.named_modules()] == list(kinds)
        for path, sub in model.named_modules():
            assert isinstance(sub, kinds[path][0])
            assert str(type(sub)) == kinds[path][1]

    host.implant("m", module.make(), at=module.at(case))
    same_tree()
    run(host, case, **extra(module))
    same_tree()
    with pytest.raises(mg.ModgraftError, match="implanted already"):
        host.implant("m", module.make(), at=module.at(case))
    host.remove("m")
    same_tree()
    for path, sub in model.named_modules():
        assert type(sub) is kinds[path][0]
        assert set(sub.__dict__) == attributes[path]
    assert torch.equal(run(host, case), bare)
    assert not list(host.implants.parameters())


# 2 -- identity at birth ------------------------------------------------------------------------


def test_identity_at_birth(case: HostCase, module: ModuleCase) -> None:
    host = mg.Host(case.model()).eval()
    bare = run(host, case)
    host.implant("m", module.make(), at=module.at(case))
    if module.make().identity:
        assert torch.equal(run(host, case, **extra(module)), bare)
    else:
        assert not torch.equal(run(host, case, **extra(module)), bare)
    if module.needs_side:  # no example has it: exactly the bare host, trained or not
        nothing = mg.Side(side().tensor, torch.zeros(BATCH, 4, dtype=torch.bool))
        absent = run(host, case, side={"image": nothing})
        some = run(host, case, **extra(module))
        if module.before_input:  # masked tokens change only how sums are rounded
            seen = case.seen()
            torch.testing.assert_close(absent[seen], bare[seen], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(some[1][seen[1]], bare[1][seen[1]], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(absent, bare)
            assert torch.equal(some[1], bare[1])
        assert not torch.allclose(some[0], bare[0])
    host.use(None)
    assert torch.equal(run(host, case), bare)


# 3 -- only the named modules train -------------------------------------------------------------


def test_only_what_was_asked_trains(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module)
    if not host["m"].size:
        for train in ("m", ["host", "m"]):
            with pytest.raises(mg.ModgraftError, match="has no parameters"):
                host.fit([case.batch()], train=train, steps=1)
        assert not any(p.requires_grad for p in host.parameters())
        return
    host.implant("m2", module.make(), at=module.at(case))  # a name that begins with the other
    frozen = {k: v.clone() for k, v in host.state_dict().items()}
    with host.training_only("m"):
        learn = [p for p in host.parameters() if p.requires_grad]
        assert {id(p) for p in learn} == {id(p) for p in host["m"].parameters()}
        optimiser = torch.optim.SGD(host.parameters(), lr=0.5)
        tensor_of(host(**case.batch(), **extra(module))).square().mean().backward()
        optimiser.step()
    own = {id(p) for p in host["m"].parameters()}
    changed = [k for k, v in host.state_dict().items() if not torch.equal(v, frozen[k])]
    names = {k for k, p in host.named_parameters() if id(p) in own}
    assert changed
    assert set(changed) <= names
    assert len(changed) >= len(names) - 3  # a gradient may vanish (softmax ignores a key's bias)


# 4 -- the mathematics is the published one -----------------------------------------------------


def test_forward_and_gradient_equal_the_written_out_equation(
    case: HostCase, module: ModuleCase
) -> None:
    host = implanted(case, module).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}
    plain = copy.deepcopy(case.model()).double().requires_grad_(False)
    learn = {id(p) for p in host["m"].parameters()}
    tensors = {
        f"{path}:{name}": value.detach().clone().requires_grad_(id(value) in learn)
        for path, place in zip(host["m"].paths, host["m"].places, strict=True)
        for name, value in place.state_dict(keep_vars=True).items()
    }
    for sub in list(plain.modules()):  # so that a reference may put a computed weight in place
        for name in list(sub._parameters):
            value = sub._parameters.pop(name)
            setattr(sub, name, None if value is None else value.detach())
    module.reference(host, plain, tensors)
    expected = tensor_of(plain(**batch))
    out = tensor_of(host(**batch, **extra(module, dtype=torch.float64)))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)

    if not learn:
        return
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    for key, value in tensors.items():
        if not value.requires_grad:  # a mask
            continue
        path, _, name = key.rpartition(":")
        own = host["m"].places[host["m"].paths.index(path)].get_parameter(name).grad
        torch.testing.assert_close(own, value.grad, rtol=1e-7, atol=1e-10)


# 5 -- merged equals unmerged -------------------------------------------------------------------


def test_merged_equals_unmerged_or_is_refused(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module).double()
    if not module.merges:
        does = "puts vectors before" if module.chains_only else "computes on activations"
        with pytest.raises(mg.ModgraftError, match=f"cannot be merged: .* {does}"):
            host.merge("m")
        return
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}
    before = copy.deepcopy(host.model.state_dict())
    plain = host.merge("-0.5*m")
    assert type(plain) is type(case.model())
    assert not any("_modgraft_state" in sub.__dict__ for sub in plain.modules())
    assert all(torch.equal(v, before[k]) for k, v in host.model.state_dict().items())
    expected = tensor_of(host(**batch, modules="-0.5*m"))
    torch.testing.assert_close(tensor_of(plain(**batch)), expected, rtol=1e-9, atol=1e-11)
    twin = copy.deepcopy(
        host
    )  # each Δ is computed from the host's weight, not from the other's result
    twin.implant("n", module.make(), at=module.at(case))
    with torch.no_grad():
        for p in twin["n"].parameters():
            p.normal_(0.0, 0.3)
    expected = tensor_of(twin(**batch, modules="m + 2*n"))
    plain = twin.merge("m + 2*n")
    torch.testing.assert_close(tensor_of(plain(**batch)), expected, rtol=1e-9, atol=1e-11)


# 6 -- generation, checkpointing, autocast, compilation, copies and state dicts work --------------


def test_generate_greedy_sampled_and_beam(case: HostCase, module: ModuleCase) -> None:
    if not case.generates:
        pytest.skip(f"{case.name} does not generate")
    host = implanted(case, module)
    batch = case.batch()
    batch.pop("labels", None)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    if module.merges:
        plain = host.merge("m")
        for how in ({}, {"num_beams": 3}):
            assert torch.equal(
                host.generate(**batch, **how, **settings),
                plain.generate(**batch, **how, **settings),
            )
    ways = ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2})
    for how in ways:
        cached = host.generate(**batch, **extra(module), **how, **settings)
        again = host.generate(**batch, **extra(module), **how, use_cache=False, **settings)
        assert torch.equal(cached, again)
        returned = how.get("num_return_sequences", 1)
        for i in range(BATCH):  # each example alone: its side input followed its beams
            one = {k: v[i : i + 1] for k, v in batch.items()}
            kw = extra(module)
            if kw:
                full = kw["side"]["image"]
                kw = {"side": {"image": mg.Side(full.tensor[i : i + 1], full.mask[i : i + 1])}}
            alone = host.generate(**one, **kw, **how, **settings)
            assert torch.equal(alone, cached[i * returned : (i + 1) * returned])
    torch.manual_seed(7)
    first = host.generate(**batch, **extra(module), do_sample=True, **settings)
    torch.manual_seed(7)
    assert torch.equal(first, host.generate(**batch, **extra(module), do_sample=True, **settings))


def test_gradient_checkpointing_recomputes_under_the_same_call(
    case: HostCase, module: ModuleCase
) -> None:
    host = implanted(case, module)
    if not getattr(host.model, "supports_gradient_checkpointing", False):
        pytest.skip(f"{case.name} has no gradient checkpointing")

    if not host["m"].size:
        host.model.requires_grad_(True)
    learn = list(host["m"].parameters()) or list(host.model.parameters())
    under = "0.5*m"
    if module.chains_only:
        under = "m"
        host.use(None)

    def gradients() -> list[Tensor]:
        host.zero_grad()
        with host.using(under):
            loss = tensor_of(host(**case.batch(), **extra(module))).square().mean()
        loss.backward()  # the composition in force is another one by now
        return [p.grad.clone() for p in learn]

    host.train()
    expected = gradients()
    host.model.activation_checkpointing_enable()
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_bf16_autocast(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module)
    exact = run(host, case, **extra(module))
    if not host["m"].size:
        host.model.requires_grad_(True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        half = tensor_of(host(**case.batch(), **extra(module)))
        half.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in host["m"].parameters())
    assert (half.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_float32_modules_on_a_host_in_bfloat16(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module)
    exact = run(host, case, **extra(module))
    host.model.bfloat16()
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in case.batch().items()}
    if not host["m"].size:
        host.model.requires_grad_(True)
    half = tensor_of(host(**batch, **extra(module)))
    half.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in host["m"].parameters())
    with torch.no_grad():
        again = tensor_of(host(**batch, **extra(module)))
        bare = tensor_of(host(**batch, modules=None))
    assert half.dtype == again.dtype == bare.dtype == torch.bfloat16
    for out in (half, again):
        assert (out.float() - exact).abs().mean() < 0.1 * exact.abs().mean()

    host.remove("m")
    host.implant("m", module.make(), at=module.at(case))
    assert {p.dtype for p in host["m"].parameters()} <= {torch.float32}
    if module.make().identity:
        with torch.no_grad():
            born = tensor_of(host(**batch, **extra(module)))
        if case.name in ("cnn", "rnn"):  # a sum has another layout, in which torch rounds otherwise
            assert (born - bare).abs().mean() < 0.02 * bare.abs().mean()
        else:
            assert torch.equal(born, bare)


def test_deepcopy_is_another_host(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module)
    expected = run(host, case, **extra(module))
    twin = copy.deepcopy(host)
    assert torch.equal(run(twin, case, **extra(module)), expected)
    with torch.no_grad():
        for p in twin["m"].parameters():
            p.mul_(2)
    twin.use(None)
    assert torch.equal(run(host, case, **extra(module)), expected)
    twin.remove("m")
    assert torch.equal(run(host, case, **extra(module)), expected)


def test_save_pretrained_writes_the_bare_host(
    case: HostCase, module: ModuleCase, tmp_path: Any
) -> None:
    host = implanted(case, module)
    if not hasattr(host.model, "save_pretrained"):
        pytest.skip(f"{case.name} is no transformers model")
    host.model.save_pretrained(tmp_path)
    original = type(case.model())
    again = original.from_pretrained(tmp_path).eval().to(DEVICE)
    assert again.config.architectures == [original.__name__]
    host.use(None)
    assert torch.equal(run(again, case), run(host, case))


def test_state_dict_round_trip(case: HostCase, module: ModuleCase) -> None:
    host, other = implanted(case, module), implanted(case, module, stir=False)
    other.load_state_dict(host.state_dict())
    assert torch.equal(run(other, case, **extra(module)), run(host, case, **extra(module)))


# 7 -- loud, never silent -----------------------------------------------------------------------


def test_saved_and_loaded_strictly(case: HostCase, module: ModuleCase, tmp_path: Any) -> None:
    host = implanted(case, module)
    expected = run(host, case, **extra(module))
    host.save("m", tmp_path / "m")
    fresh = mg.Host(case.model()).eval()
    fresh.load(tmp_path / "m")
    assert torch.equal(run(fresh, case, **extra(module)), expected)
    fresh.load(tmp_path / "m", name="twice")
    assert list(fresh.implants) == ["m", "twice"]

    stranger = mg.Host(case.model(seed=5)).eval()
    with pytest.raises(mg.ModgraftError, match="another host"):
        stranger.load(tmp_path / "m")
    assert "m" not in stranger
    told = r"m is loaded into another host .*\(\d+ of its \d+ tensors: \S+ by [\d.]+ %"
    with pytest.warns(UserWarning, match=told):
        stranger.load(tmp_path / "m", strict=False)


def test_bad_calls_are_refused_and_leave_the_host(case: HostCase, module: ModuleCase) -> None:
    host = mg.Host(case.model()).eval()
    bare = run(host, case)
    nowhere = "acts at the host's input" if module.before_input else "matches no site"
    with pytest.raises(mg.ModgraftError, match=nowhere):
        host.implant("m", module.make(), at="encoder.blok.*.nothing")
    with pytest.raises(mg.ModgraftError, match="where 77 were expected"):
        host.implant("m", module.make(), at=module.at(case), expect=77)
    for name in ("a b", "host", "if", "1st"):
        with pytest.raises(mg.ModgraftError, match="cannot name a module"):
            host.implant(name, module.make(), at=module.at(case))
    assert torch.equal(run(host, case), bare)
    assert not any("_modgraft_state" in sub.__dict__ for sub in host.model.modules())

    host.implant("mod", module.make(), at=module.at(case))
    with pytest.raises(mg.ModgraftError, match="did you mean 'mod'"):
        host.use("mdo")
    with pytest.raises(mg.ModgraftError, match="means nothing"):
        host.use("mod @ mod")
    if module.needs_side:
        with pytest.raises(mg.ModgraftError, match="needs the side input 'image'"):
            run(host, case)
        wide = mg.Side(torch.randn(BATCH, 4, FEATURES + 1))
        with pytest.raises(mg.ModgraftError, match=f"{FEATURES + 1} wide"):
            run(host, case, side={"image": wide})
        with pytest.raises(mg.ModgraftError, match="examples where 'mod' meets a first axis"):
            run(host, case, side={"image": side(BATCH + 1)})
        with pytest.raises(mg.ModgraftError, match=r"mg\.Side"):
            run(host, case, side={"image": torch.randn(BATCH, 4, FEATURES)})
    host.use(None)
    assert torch.equal(run(host, case), bare)


def test_two_at_once_equal_the_sum_of_effects(case: HostCase, module: ModuleCase) -> None:
    """``m + n`` adds effects on one output; in ``m >> n``, n acts on the output of m."""
    host = implanted(case, module).double()
    host.implant("n", module.make(), at=module.at(case))
    with torch.no_grad():
        for p in host["n"].parameters():
            p.normal_(0.0, 0.3).to(torch.float64)
    assert str(host.composition) == f"m{module.task} >> n{module.task}"
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}
    kw = extra(module, dtype=torch.float64)

    def at(composition: Any) -> Tensor:
        with torch.no_grad():
            return tensor_of(host(**batch, **kw, modules=composition))

    if module.chains_only:
        for refused in ("m + n", "m - n", "2*m", "m >> 0.5*n"):
            with pytest.raises(mg.ModgraftError, match="cannot be added or scaled"):
                at(refused)
        plain = copy.deepcopy(case.model()).double()
        for name in ("m", "n"):
            one = {"m": host[name]}
            module.reference(one, plain, host[name].tensors())  # type: ignore[arg-type]
        with torch.no_grad():
            expected = tensor_of(plain(**batch))
        torch.testing.assert_close(at("m >> n"), expected, rtol=1e-9, atol=1e-11)
        return
    torch.testing.assert_close(at("m + n"), at("n + m"), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(at("2*(m + n) - m - n"), at("m + n"), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(at("m - m"), at(None), rtol=1e-9, atol=1e-11)
    if module.merges or module.adds:
        torch.testing.assert_close(at("m >> n"), at("m + n"), rtol=1e-9, atol=1e-11)
    else:
        assert not torch.allclose(at("m >> n"), at("m + n"))
