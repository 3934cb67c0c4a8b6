"""The contract, compiled: one graph for every composition, which computes what eager calls do.

A case takes up to a minute to compile. Here each module is compiled on one host and each host with
several modules; ``make compiled`` (``COMPILED=all``) tries every module on every host.
"""

from __future__ import annotations

import os

import pytest
import torch

from common import counted
from contract.hosts import HOSTS, HostCase
from contract.modules import MODULES, ModuleCase, implanted
from contract.test_contract import DEFINED, extra, run

EVERY = os.environ.get("COMPILED") == "all"


def one_host_each() -> list[object]:
    """Return a case for each module: the hosts take turns."""
    found = []
    for i, module in enumerate(MODULES.values()):
        hosts = [case for case in HOSTS.values() if case.name not in module.refused]
        case = hosts[i % len(hosts)]
        found.append(pytest.param(case, module, id=f"{module.name}-{case.name}"))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize(("case", "module"), DEFINED if EVERY else one_host_each())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
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


def test_every_host_has_its_turn() -> None:
    cases = [param.values[0] for param in one_host_each()]  # type: ignore[attr-defined]
    assert {case.name for case in cases} == set(HOSTS)
    assert len(cases) == len(MODULES)
