"""The contract: what must always hold, for every module on every host.

A new module is one row of ``MODULES`` in ``modules.py``; a new host one row of ``hosts.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from common import counted
from contract.hosts import BATCH, FEATURES, HOSTS, HostCase, side, tensor_of
from contract.modules import MODULES, ModuleCase, implanted
from modgraft.testing.rules import RULES
from modgraft.testing.trial import NotAsked, Trial

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


def trial_of(case: HostCase, module: ModuleCase) -> Trial:
    return Trial(
        case.model, case.batch(), module.make, module.at(case),
        sides={"image": side()} if module.needs_side else {}, prepare=module.prepare,
        adds=module.merges or module.adds, generates=case.generates,
        exact_in_half=case.name not in ("cnn", "rnn"),
    )  # fmt: skip


# 1 -- the rules that modgraft.testing asks of a stranger's method as well ----------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(case: HostCase, module: ModuleCase, rule: Callable[[Trial], None]) -> None:
    trial = trial_of(case, module)
    assert trial.chains_only == module.chains_only
    assert isinstance(module.make().unwrapped, mg.ParameterComposition) == module.merges
    try:
        rule(trial)
    except NotAsked as reason:
        pytest.skip(str(reason))


# 2 -- what has no parameters does not train ----------------------------------------------------


def test_what_has_no_parameters_does_not_train(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module)
    if host["m"].size:
        pytest.skip(f"{module.name} has parameters")
    for train in ("m", ["host", "m"]):
        with pytest.raises(mg.ModgraftError, match="has no parameters"):
            host.fit([case.batch()], train=train, steps=1)
    assert not any(p.requires_grad for p in host.parameters())


# 3 -- the mathematics is the published one -----------------------------------------------------


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


# 4 -- compiled ---------------------------------------------------------------------------------


@torch._dynamo.config.patch(allow_rnn=True)  # it would break the graph there
def test_compiled_once_for_every_composition(case: HostCase, module: ModuleCase) -> None:
    host = implanted(case, module, shallow=True)  # a layer more is traced in the same way
    host.implant("n", module.make(), at=module.at(case))
    compiled, graphs = counted(host)
    scaled = () if module.chains_only else ("0.3*n", "m >> 2*n")
    shapes = [None, "m", "n", "m >> n", "n >> m"]  # tokens before the input: a graph for each
    kinds = [*shapes, *shapes[::-1]] if module.before_input else ["m", None, "n", "m >> n"]
    for composition in (*kinds, *scaled):
        host.use(composition)
        torch.testing.assert_close(
            run(compiled, case, **extra(module)), run(host, case, **extra(module)),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    assert len(graphs) == (len(shapes) if module.before_input else 1)


# 5 -- loud, never silent -----------------------------------------------------------------------


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
    with pytest.raises(mg.ModgraftError, match="implanted already"):
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


def test_a_chain_of_prompts_is_the_written_out_one(case: HostCase, module: ModuleCase) -> None:
    if not module.chains_only:
        pytest.skip(f"{module.name} adds")
    host = implanted(case, module).double()
    host.implant("n", module.make(), at=module.at(case))
    with torch.no_grad():
        for p in host["n"].parameters():
            p.normal_(0.0, 0.3).to(torch.float64)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in case.batch().items()}
    plain = copy.deepcopy(case.model()).double()
    for name in ("m", "n"):
        module.reference({"m": host[name]}, plain, host[name].tensors())  # type: ignore[arg-type]
    with torch.no_grad():
        expected = tensor_of(plain(**batch))
        out = tensor_of(host(**batch, **extra(module, dtype=torch.float64), modules="m >> n"))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
