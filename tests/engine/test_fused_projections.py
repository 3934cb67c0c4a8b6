"""Modules at query, key and value of projections that lay them out in several ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import modgraft as mg
from core.families import CASES, first_output

# host: which rows of the first layer's fused projection make queries, keys and values
HEAD = 4
ROWS = {
    "gpt2": [range(16), range(16, 32), range(32, 48)],
    "phi3": [range(16), range(16, 24), range(24, 32)],
    "gpt_bigcode": [range(16), range(16, 20), range(20, 24)],
    "gpt_neox": [[12 * h + HEAD * i + k for h in range(4) for k in range(4)] for i in range(3)],
    "falcon, grouped": [
        [16 * g + k for g in range(2) for k in range(8)],
        [16 * g + 8 + k for g in range(2) for k in range(4)],
        [16 * g + 12 + k for g in range(2) for k in range(4)],
    ],
}
ROLES = ("query", "key", "value")
METHODS = {
    "lora": lambda: mg.LoRA(rank=2, alpha=3.0),
    "dora": lambda: mg.LoRA(rank=2, dora=True),
    "rescale": mg.Rescale,
    "sparse": mg.SparseDelta,
}


def made(name: str) -> mg.Host:
    return mg.Host(CASES[name].model().double()).eval()


def rows_of(name: str, role: str) -> Tensor:
    return torch.tensor(list(ROWS[name][ROLES.index(role)]))


def implanted(host: mg.Host, name: str, method: mg.Computation, at: str, **own: Any) -> Any:
    site = host.sites(at)[0]
    host.implant(name, method, at=site.label, **own)
    with torch.no_grad():
        for parameter in host[name].parameters():
            parameter.normal_(0.5, 0.5)
    return host[name].places[0]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ROWS)
def test_weights_change_in_the_rows_of_the_role(name: str, role: str) -> None:
    host, batch, rows = made(name), CASES[name].batch(), rows_of(name, role)
    site = host.sites(role)[0]
    weight, bias = site.module.weight, site.module.bias
    as_matrix = weight.T if name == "gpt2" else weight
    for kind, method in METHODS.items():
        place = implanted(host, "m", method(), role)
        new = as_matrix.index_add(0, rows, place.delta(as_matrix[rows]))
        changed = {f"{site.path}.weight": new.T if name == "gpt2" else new}
        shift = None if bias is None else place.bias_delta(bias[rows])
        if shift is not None:
            changed[f"{site.path}.bias"] = bias.index_add(0, rows, shift)
        out = first_output(host(**batch))
        with torch.no_grad():
            few = first_output(host(**{k: v[:, :2] for k, v in batch.items()}))
            merged = first_output(host.merge("m")(**batch))
        host.use(None)
        expected = first_output(functional_call(host.model, changed, kwargs=batch))
        host.use("m")
        for one in (out, merged):
            torch.testing.assert_close(one, expected, rtol=1e-8, atol=1e-9, msg=f"{name} {kind}")
        torch.testing.assert_close(few, expected[:, :2], rtol=1e-8, atol=1e-9)
        probe, own = torch.randn_like(out), list(host["m"].parameters())
        gradient = torch.autograd.grad((out * probe).sum(), own)
        wanted = torch.autograd.grad((expected * probe).sum(), own)
        for one, other in zip(gradient, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=f"{name} {kind}")
        host.remove("m")


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_functions_act_on_the_features_of_the_role(name: str) -> None:
    for role in ROLES:
        host, batch, rows = made(name), CASES[name].batch(), rows_of(name, role)
        place = implanted(host, "m", mg.Adapter(width=3), role)

        def written(
            _: nn.Module, __: Any, y: Tensor, place: Any = place, rows: Any = rows
        ) -> Tensor:
            own = y[..., rows]
            return y.index_copy(-1, rows, place(own, None, None))

        out = first_output(host(**batch))
        host.use(None)
        hook = host.model.get_submodule(host.sites(role)[0].path).register_forward_hook(written)
        torch.testing.assert_close(out, first_output(host(**batch)), rtol=1e-9, atol=1e-10)
        hook.remove()


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_one_composition_an_example_and_routed_picks(name: str) -> None:
    host, batch = made(name), CASES[name].batch()
    for module in "ab":
        implanted(host, module, mg.LoRA(rank=2), "query", active=False)
        implanted(host, f"{module}2", mg.LoRA(rank=2), "value", active=False)
        implanted(host, f"{module}3", mg.Adapter(width=3), "key", active=False)
    one, other = "a + a2 >> a3", "b + b2 >> b3"
    both = first_output(host(**batch, modules=[one, other]))
    for row, modules in enumerate((one, other)):
        alone = first_output(host(**batch, modules=modules))
        torch.testing.assert_close(both[row], alone[row], rtol=1e-9, atol=1e-10)
    host.implant("x", mg.Mixture(["a", "b"], router=mg.TopK(2, level="token")), active=False)
    mixed = first_output(host(**batch, modules="x"))
    assert not torch.allclose(mixed, first_output(host(**batch, modules=None)))
    for parameter in host["x"].parameters():
        parameter.zero_()  # both alike
    half = first_output(host(**batch, modules="0.5*a + 0.5*b"))
    torch.testing.assert_close(
        first_output(host(**batch, modules="x")), half, rtol=1e-9, atol=1e-10
    )
