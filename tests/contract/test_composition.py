"""Every operator of compositions on every kind of module equals float64 arithmetic by hand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import modgraft as mg
from contract.compositions import (
    EFFECTS,
    MODULES,
    Tree,
    bare,
    composed,
    implanted,
    of_handles,
    text,
)
from contract.hosts import HOSTS, HostCase, tensor_of

A, B = "{}_0", "{}_1"
#: a and b of a kind each
SUMS: dict[str, Tree] = {
    "one": "a",
    "scaled": ("*", 2.5, "a"),
    "negated": ("neg", "a"),
    "none of it": ("*", 0.0, "a"),
    "sum": ("+", "a", "b"),
    "difference": ("-", "a", "b"),
    "stacked": (">>", "a", "b"),
    "stacked the other way": (">>", "b", "a"),
    "twice": (">>", "a", "a"),
    "mean": ("average", "a", "b"),
    "mean of three": ("average", "a", "b", "a"),
    "analogy": ("+", "a", ("*", 0.3, ("-", "b", "a"))),
    "a sum in a chain": (">>", ("+", "a", "b"), ("*", 0.5, "a")),
    "a chain in a sum": ("-", (">>", "a", "b"), ("*", 0.5, (">>", "b", "a"))),
    "a chain in a mean": ("average", (">>", "a", "b"), ("neg", "b")),
    "a mean in a chain": (">>", "b", ("average", "a", ("*", 2, "b"))),
    "a mean of means": ("average", ("average", "a", "b"), "b"),
    "a multiple of all": ("*", -0.5, ("+", (">>", "a", "b"), ("average", "a", "b"))),
}
INPUTS: dict[str, Tree] = {
    "one": "a",
    "stacked": (">>", "a", "b"),
    "stacked the other way": (">>", "b", "a"),
    "twice": (">>", "a", "a"),
    "together": ("concat", "a", "b"),
    "together the other way": ("concat", "b", "a"),
    "one alone": ("concat", "a"),
    "mean": ("average", "a", "b"),
    "mean of three": ("average", "a", "b", "b"),
    "mean of means": ("average", ("average", "a", "b"), "b"),
    "nested": (">>", ("concat", "a", ("average", "a", "b")), "b"),
}
MIXED: dict[str, Tree] = {
    "every kind": (
        ">>", (">>", ("concat", "prompt_0", "prompt_1"), ("average", "prefix_0", "prefix_1")),
        (">>", (">>", "lora_0", "adapter_0"), (">>", "scale_0", ("*", 0.5, "conv_0"))),
    ),
    "a weight behind a function": (
        ">>", (">>", "adapter_0", "lora_0"), (">>", ("+", "dora_0", "conv_0"), "scale_in_0")
    ),
    "a mean of a weight and a function": (
        "average", (">>", "lora_0", "adapter_0"), ("-", "compacter_0", "sparse_0"), "parallel_0"
    ),
    "a prompt first": (">>", "prompt_0", ("+", ("*", 0.5, "lora_0"), "adapter_0")),
    "a prefix last": (">>", ("-", "dora_0", "scale_0"), ("concat", "prefix_1", "prefix_0")),
}  # fmt: skip
NAMES = ("gpt2", "bert", "t5")
hosts = pytest.mark.parametrize("case", [HOSTS[n] for n in NAMES], ids=NAMES)


def named(tree: Tree, a: str, b: str) -> Tree:
    """Replace the names a and b in ``tree``."""
    if isinstance(tree, str):
        return {"a": a, "b": b}.get(tree, tree)
    return tuple(named(x, a, b) if isinstance(x, str | tuple) and i else x
                 for i, x in enumerate(tree))  # fmt: skip


def model_of(case: HostCase) -> nn.Module:
    """Make the model with weights so small that float32 is accurate to about 1e-7."""
    model = case.model()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(0.4)
    return model


def apart(out: Any, expected: Any, case: HostCase) -> float:
    """Return the distance of two outputs without padding, relative to the second's norm."""
    seen = case.seen()
    one, other = tensor_of(out).detach().double()[seen], tensor_of(expected)[seen]
    return float((one - other).norm() / other.norm())


def check(case: HostCase, host: mg.Host, trees: list[Tree]) -> None:
    """Compare the host, in float32 and float64 and in every way of running, with the reference."""
    model, batch = model_of(case), case.batch()
    with torch.no_grad():
        expected = [composed(bare(model), host, tree)(**batch) for tree in trees]
        for tree, wanted in zip(trees, expected, strict=True):
            found = apart(host(**batch, modules=text(tree)), wanted, case)
            assert found <= 1e-6, (text(tree), found)
        host.double()
    for tree, wanted in zip(trees, expected, strict=True):
        for found in every_way(host, batch, tree):
            assert apart(found, wanted, case) <= 1e-10, text(tree)


def every_way(host: mg.Host, batch: dict[str, Any], tree: Tree) -> Iterator[Any]:
    with torch.no_grad():
        yield host(**batch, modules=text(tree))
        host.use(of_handles(tree, host))
        yield host(**batch)
        yield host(**batch)  # with what the first has kept
        host.use(None)
    with host.using(text(tree)):
        yield host(**batch)  # with gradients


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(HOSTS[name], kind, id=f"{kind}-{name}")
        for name in NAMES
        for kind in (EFFECTS if name != "t5" else ("lora", "dora", "scale", "adapter", "parallel"))
    ],
)
def test_every_operator_on_two_of_a_kind(case: HostCase, kind: str) -> None:
    host = implanted(model_of(case), [kind])
    check(case, host, [named(tree, f"{kind}_0", f"{kind}_1") for tree in SUMS.values()])


@hosts
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_every_operator_on_two_input_modules(case: HostCase, kind: str) -> None:
    host = implanted(model_of(case), [kind])
    check(case, host, [named(tree, f"{kind}_0", f"{kind}_1") for tree in INPUTS.values()])


@pytest.mark.parametrize("case", [HOSTS["gpt2"]], ids=["gpt2"])
def test_every_operator_on_two_kinds(case: HostCase) -> None:
    host = implanted(model_of(case), EFFECTS, copies=1)
    trees = [tree for name, tree in SUMS.items() if name.startswith(("a ", "stacked", "diff"))]
    pairs = list(combinations(EFFECTS, 2))
    check(
        case, host,
        [
            named(trees[i % len(trees)], f"{a}_0", f"{b}_0")
            for i, (a, b) in enumerate(p for p in pairs for _ in range(2))
        ],
    )  # fmt: skip


@hosts
def test_every_kind_at_once(case: HostCase) -> None:
    check(case, implanted(model_of(case), list(MODULES)), list(MIXED.values()))


# -- generated -------------------------------------------------------------------------------------

KINDS = ["lora", "dora", "scale", "adapter", "parallel"]
leaves = st.sampled_from([f"{kind}_{i}" for kind in KINDS for i in range(2)])
numbers = st.sampled_from([0.0, 0.5, -1.0, 1.0, 2, 0.3, -0.25])


def grown(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.one_of(
        st.tuples(st.sampled_from(["+", "-", ">>"]), inner, inner),
        st.tuples(st.just("neg"), inner),
        st.tuples(st.just("*"), numbers, inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: ("average", *parts)),
    )


trees = st.recursive(leaves, grown, max_leaves=6)
AT = {"lora": ["0", "2"], "dora": "2", "scale": "2", "adapter": ["0", "2"], "parallel": "2"}


@pytest.fixture(scope="module")
def small() -> tuple[mg.Host, Any]:
    torch.manual_seed(0)
    case = HOSTS["plain"]
    before = {kind: MODULES[kind] for kind in KINDS}
    try:
        MODULES.update({kind: (before[kind][0], AT[kind]) for kind in KINDS})
        host = implanted(case.model(), KINDS)
    finally:
        MODULES.update(before)
    return host.double(), case.model()


@settings(max_examples=120)
@given(tree=trees)
def test_generated_expressions_run_as_written_out(small: tuple[mg.Host, Any], tree: Tree) -> None:
    host, model = small
    x, learn = HOSTS["plain"].batch()["input"].double(), list(host.implants.parameters())
    expected: Tensor = composed(bare(model), host, tree)(x)
    for out in every_way(host, {"input": x}, tree):
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    gradients = []
    for result in (out, expected):
        none = sum(0 * p.sum() for p in learn)  # 0*m has no gradient
        gradients.append(torch.autograd.grad(result.square().sum() + none, learn))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
    for out in every_way(host, {"input": x[:1, :1]}, tree):  # so few that Δ is never made
        torch.testing.assert_close(out, expected[:1, :1], rtol=1e-9, atol=1e-9)


@given(tree=trees)
def test_handles_write_the_expression_that_the_text_is_read_as(
    small: tuple[mg.Host, Any], tree: Tree
) -> None:
    host = small[0]
    host.use(text(tree))
    read = host.composition
    host.use(of_handles(tree, host))
    assert host.composition == read
    assert of_handles(tree, host).expression().mapped(str) == read  # 0*m is left out
    if read is not None:
        host.use(str(read))
        assert host.composition is read or host.composition == read
    host.use(None)
