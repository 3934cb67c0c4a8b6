"""A mixture without a router acts in the residual that its modules act in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import modgraft as mg
from contract.hosts import HOSTS
from modgraft.core.tensors import tensor_of

AT = "feedforward[residual]"


def fused(**options: bool) -> mg.Host:
    """Make a BERT of one layer in float64, with a fusion of two adapters before its last norm."""
    torch.manual_seed(0)
    host = mg.Host(HOSTS["bert"].model(shallow=True)).eval().double()
    for name in "ab":
        host.implant(name, mg.Adapter(reduction=4), at=AT, active=False)
    host.implant("f", mg.Mixture(["a", "b"], aggregate=mg.Fuse(**options)))
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    host.use("f")
    return host


def logits(host: mg.Host, **given: object) -> Tensor:
    return tensor_of(host(**HOSTS["bert"].batch(), **given))


@pytest.mark.parametrize("effects", [True, False])
def test_the_equation_of_adapter_fusion_before_the_norm(effects: bool) -> None:
    """The sum s = W h + r is normed; a and b read the norm y, and what fuses them is added to s."""
    host = fused(effects=effects)
    layer = host.model.get_submodule("bert.encoder.layer.0.output")
    seen: dict[str, Any] = {}
    layer.register_forward_hook(lambda _, args, out: seen.update(args=args, out=out))
    with torch.no_grad():
        logits(host)
        h, r = seen["args"]
        s = layer.dense(h) + r
        y = layer.LayerNorm(s)
        read = []
        for name in "ab":
            t = dict(host[name].places[0].named_parameters())
            hidden = torch.relu(F.linear(y, t["down.weight"], t["down.bias"]))
            effect = F.linear(hidden, t["up.weight"], t["up.bias"])
            read.append(effect if effects else y + effect)
        t = dict(host["f"].places[0].named_parameters())
        q = F.linear(y, t["combine.Q.weight"], t["combine.Q.bias"])
        k = [F.linear(one, t["combine.K.weight"], t["combine.K.bias"]) for one in read]
        a = torch.stack([(q * one).sum(-1) for one in k], -1).softmax(-1)
        mixed = sum(a[..., j : j + 1] * F.linear(read[j], t["combine.V.weight"]) for j in range(2))
        expected = layer.LayerNorm(s + mixed - (0 if effects else y))
    torch.testing.assert_close(seen["out"], expected, rtol=0, atol=1e-12)


def test_each_example_has_its_own() -> None:
    host = fused()
    with torch.no_grad():
        rows = logits(host, modules=["f", None, "a"])
        for i, name in enumerate(["f", None, "a"]):
            torch.testing.assert_close(rows[i], logits(host, modules=name)[i], rtol=0, atol=1e-12)


def test_it_learns_is_compiled_and_is_probed() -> None:
    host = fused()
    logits(host).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in host["f"].parameters())
    assert not host.probe(HOSTS["bert"].batch()).faults
    with torch.no_grad():
        torch.testing.assert_close(logits(torch.compile(host, backend="eager")), logits(host))


def test_a_router_does_not_weigh_in_a_residual() -> None:
    host = fused()
    with pytest.raises(mg.ModgraftError, match="its residual, where it cannot be weighed"):
        host.implant("routed", mg.Mixture(["a", "b"], router=mg.Soft(level="token")))
