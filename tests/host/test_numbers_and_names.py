"""Numbers and names that cannot mean what they say: refused, with the host as it was."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import modgraft as mg

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def made() -> mg.Host:
    torch.manual_seed(0)
    host = mg.Host(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))).eval()
    for name in "abx":
        host.implant(name, mg.LoRA(rank=2), at=["0", "2"], active=False)
    host.implant("f", mg.Adapter(width=2), at="0", active=False)
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.normal_()
    host.use("b")
    return host


@torch.no_grad()
def run(host: Any, **kw: Any) -> Tensor:
    return host(X, **kw)


REFUSED: dict[str, Any] = {
    "beyond float32": "1e39*a",
    "beyond it together": "3e38*a + 3e38*a",
    "beyond it in a chain": "2e38*a >> f >> 2e38*a",
    "of a handle": lambda host: 1e39 * host["a"],
    "unknown": "a + c",
    "in a list": ["a", "1e39*b", None],
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_use_that_fails_leaves_what_was_in_force(how: str) -> None:
    host = made()
    torch._dynamo.reset()
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    wanted = run(host)
    torch.testing.assert_close(run(compiled), wanted)
    given = REFUSED[how]
    with pytest.raises(mg.ModgraftError, match=r"float32|no module 'c'"):
        host.use(given(host) if callable(given) else given)
    assert str(host.composition) == "b"
    assert torch.equal(run(host), wanted)
    torch.testing.assert_close(run(compiled), wanted)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e39])
def test_no_hyper_parameter_is_infinite(value: float) -> None:
    makes = [
        lambda: mg.LoRA(alpha=value),
        lambda: mg.LoRA(dropout=value),
        lambda: mg.Shared(mg.LoRA(alpha=value)),
        lambda: mg.Mixture(["a", "b"], router=mg.Threshold(value)),
    ]
    for make in makes:
        with pytest.raises(mg.ModgraftError):
            make()
    with pytest.raises(mg.ModgraftError, match=r"infinite as a float32|NaN"):
        mg.LoRA(alpha=value)
    assert mg.LoRA(alpha=1e30).scale == 1e30 / 8


@pytest.mark.parametrize("zero", ["0*x", "0*f", "b + 0*x", "b >> 0*(x + f)", "b >> (0*x >> 0*f)"])
def test_zero_times_a_module_leaves_it_out(zero: str) -> None:
    """Also where the module is not finite, or could not be merged."""
    host = made()
    wanted = run(host, modules="b" if "b" in zero else None)
    with torch.no_grad():
        for name in "xf":
            for parameter in host[name].parameters():
                parameter.fill_(math.nan)
    assert torch.equal(run(host, modules=zero), wanted)
    host.use(zero)
    assert torch.equal(run(host), wanted)
    torch.testing.assert_close(run(host.merge(zero)), wanted)
    each = run(host, modules=[zero, zero, "b"])
    torch.testing.assert_close(each[:2], wanted[:2])
    assert run(host, modules="x").isnan().any()


def test_weights_of_zero_at_weights_inside_a_layer() -> None:
    host = mg.Host(nn.MultiheadAttention(8, 2, batch_first=True)).eval()
    host.implant("x", mg.LoRA(rank=2), at="in_proj_weight", active=False)
    x = torch.randn(2, 3, 8)
    bare = host(x, x, x)[0]
    with torch.no_grad():
        for parameter in host["x"].parameters():
            parameter.fill_(math.nan)
    assert torch.equal(host(x, x, x, modules="0*x")[0], bare)
    assert torch.equal(host.merge("0*x")(x, x, x)[0], bare)


@pytest.mark.parametrize("composition", [["a", "b", None], "weighted"])
def test_compiled_with_a_composition_for_each_example_in_force(composition: Any) -> None:
    host = made()
    if composition == "weighted":
        composition = mg.Weighted(["a", "b"], torch.tensor([[1.0, 0], [0.5, 2.0], [0, 0]]))
    wanted = run(host, modules=composition)
    torch._dynamo.reset()
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    run(compiled)  # "b"
    with host.using(composition):
        torch.testing.assert_close(run(compiled), wanted)
    torch.testing.assert_close(run(compiled), run(host))


@given(st.text(min_size=1, max_size=3))
@settings(max_examples=200)
def test_what_can_be_implanted_can_be_named(name: str) -> None:
    host = mg.Host(nn.Linear(2, 2))
    try:
        host.implant(name, mg.LoRA(rank=1), at="", active=False)
    except mg.ModgraftError:
        return
    host.use(f"0.5*{name}")
    assert host.composition is not None
    assert host.composition.names() == (name,)


@pytest.mark.parametrize("name", ["ﬁne", "µ", "ｑａ", "xª", "e\u0301"])
def test_a_name_that_python_reads_otherwise_is_refused_with_the_one_it_reads(name: str) -> None:
    host, read = mg.Host(nn.Linear(2, 2)), unicodedata.normalize("NFKC", name)
    with pytest.raises(mg.ModgraftError, match=f"Python reads '{read}' for it; take '{read}'"):
        host.implant(name, mg.LoRA(rank=1), at="")
    host.implant(read, mg.LoRA(rank=1), at="")
    host.use(f"2*{name}")  # the text is read as Python reads it
    assert host.composition.names() == (read,)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [None, 3, ["a"]])
def test_what_is_no_name(name: Any) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(4, 4)))
    host.implant("a", mg.LoRA(rank=2), at="0")
    for ask in (host.remove, host.__getitem__):
        with pytest.raises(mg.ModgraftError, match="named by a string"):
            ask(name)
