"""Modules of every kind merged on real hosts: what the new module computes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from contract.hosts import HOSTS, QV
from modgraft.core.errors import ModgraftError
from modgraft.store.merging.low_rank import dense
from modgraft.store.merging.modules import changes_of
from modgraft.store.merging.table import METHODS

KINDS: dict[str, Callable[[], mg.Computation]] = {
    "lora": lambda: mg.LoRA(rank=2, alpha=3.0),
    "rslora": lambda: mg.LoRA(rank=3, rslora=True),
    "dora": lambda: mg.LoRA(rank=2, dora=True),
    "rescale": mg.Rescale,
    "sparse": lambda: mg.SparseDelta(density=0.1),
    "dense": mg.DenseDelta,
    "subnetwork": mg.SparseSubnetwork,
    "vera": lambda: mg.VeRA(rank=4),
    "oft": lambda: mg.OFT(blocks=1),
}
TAKEN = ("bert", "gpt2", "t5", "llama", "cnn", "mha")


def implanted(host: mg.Host, kind: str, at: Any, name: str = "", seed: int = 0) -> str:
    """Implant a module that does something; return its name."""
    torch.manual_seed(seed)
    name = name or kind
    handle = host.implant(name, KINDS[kind](), at, active=False)
    with torch.no_grad():
        for place in handle.places:
            if kind == "sparse":
                place.keep(torch.randperm(place.values.numel())[:7])  # type: ignore[operator]
        for parameter in handle.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return name


def filled(name: str, kinds: Any = tuple(KINDS)) -> mg.Host:
    host = mg.Host(HOSTS[name].model())
    for kind in kinds:
        implanted(host, kind, HOSTS[name].lora_at)
    return host


def batch_for(model: torch.nn.Module, name: str) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    batch = HOSTS[name].batch()
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def output(host: mg.Host, composition: str | None, name: str) -> Tensor:
    with host.using(composition), torch.no_grad():
        found = host(**batch_for(host, name))
        return (found if isinstance(found, Tensor) else found.logits).double()


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def total(host: mg.Host, name: str) -> dict[str, Tensor]:
    """Return Δ of a module at each of its sites, in float64."""
    with torch.no_grad():
        changes = changes_of(host, [name])
        return {at: dense(each).double() for at, (each,) in changes.items() if each is not None}


@pytest.mark.parametrize("name", TAKEN)
def test_a_sum_is_exact_whatever_is_in_it(name: str) -> None:
    """Also together; the outputs are those of the composition."""
    host = filled(name).double()  # in float32 the order of a sum is more, on some processors
    weights = [0.5, -1.0, 0.25, 1.0, 2.0, 0.5, 0.1, 1.0, 0.5]
    for kind, weight in zip(KINDS, weights, strict=True):
        new = mg.merge(host, [kind], f"one_{kind}", "arithmetic", weights=[weight])
        assert new.provenance["relative_error"] == 0
        got, expected = (output(host, c, name) for c in (new.name, f"{weight}*{kind}"))
        assert error(got, expected) < 1e-9
    written = " + ".join(f"{w}*{k}" for w, k in zip(weights, KINDS, strict=True))
    new = mg.merge(host, list(KINDS), "all", "arithmetic", weights=weights)
    assert error(output(host, "all", name), output(host, written, name)) < 1e-9
    plain = host.merge("all")
    with torch.no_grad():
        found = plain(**batch_for(plain, name))
    found = found if isinstance(found, Tensor) else found.logits
    assert error(found.double(), output(host, "all", name)) < 1e-9


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_every_kind(method: str, name: str) -> None:
    """Two modules of any kinds; what comes out has been saved and loaded again."""
    host = filled(name)
    pairs = [
        ("lora", "rslora"),
        ("dora", "lora"),
        ("rescale", "sparse"),
        ("dense", "subnetwork"),
        ("vera", "oft"),
    ]
    for number, pair in enumerate(pairs):
        new = mg.merge(host, pair, f"m{number}", method)
        assert torch.isfinite(output(host, new.name, name)).all()
        assert not torch.equal(output(host, new.name, name), output(host, None, name))
        assert new.name not in str(host.composition)


@pytest.mark.parametrize("name", ["bert", "gpt2", "cnn"])
def test_a_merged_module_is_saved_with_its_parents(name: str, tmp_path: Path) -> None:
    host = filled(name, ["lora", "dora", "sparse"])
    cases: Any = (
        ("arithmetic", ["lora", "lora2"], {}),
        ("ties", ["lora", "dora"], {"density": 0.5}),
        ("ties", ["sparse", "sparse2"], {"density": 1.0}),
    )
    for method, pair, options in cases:
        second = pair[1]
        if second not in host:
            implanted(host, pair[0], HOSTS[name].lora_at, second, seed=1)
        new = mg.merge(host, pair, "new", method, **options)
        folder = host.save("new", tmp_path / f"{method}_{second}")
        expected = output(host, "new", name)
        host.remove("new")
        again = host.load(folder, "again", active=False)
        assert torch.equal(output(host, "again", name), expected)
        assert again.provenance == new.provenance
        host.save("again", tmp_path / f"again_{second}")
        host.remove("again")
        said = json.loads((folder / "module.json").read_text())["provenance"]["new"]
        assert said["method"] == method
        assert [each["name"] for each in said["parents"]] == pair
        alone = host.save(pair[0], tmp_path / f"{method}_{pair[0]}")
        card = json.loads((alone / "module.json").read_text())
        assert said["parents"][0]["tensors"] == card["tensors"]


def test_the_form_is_the_smallest_that_holds_the_result() -> None:
    host = filled("bert", ["lora", "rslora", "sparse", "rescale"])
    implanted(host, "sparse", HOSTS["bert"].lora_at, "sparse2", seed=1)
    low = mg.merge(host, ["lora", "rslora"], "low")
    assert low.method.brief() == "LoRA(rank=5)"
    assert mg.merge(host, ["lora", "rslora"], "three", rank=3).method.brief() == "LoRA(rank=3)"
    assert isinstance(mg.merge(host, ["sparse", "sparse2"], "few").method, mg.SparseDelta)
    assert mg.merge(host, ["lora", "rescale"], "whole").method.brief() == "DenseDelta(bias=True)"
    ties = mg.merge(host, ["lora", "rslora"], "ties", "ties")
    assert isinstance(ties.method, mg.SparseDelta | mg.DenseDelta)
    trained = [p for p in low.parameters() if p.requires_grad]
    assert trained
    implanted(host, "lora", HOSTS["bert"].lora_at, "sixteen")
    many = [implanted(host, "lora", QV, f"lora{i}", seed=i) for i in range(9)]
    wide = mg.merge(host, many, "wide", "arithmetic")  # 9 · 2 > 16, the width
    assert wide.method.brief() == "LoRA(rank=16)"
    assert error(output(host, "wide", "bert"), output(host, " + ".join(many), "bert")) < 1e-6


def test_a_rank_gives_the_nearest_and_says_how_near() -> None:
    host = filled("bert", ["lora", "rslora", "dora"])
    exact = mg.merge(host, ["lora", "rslora", "dora"], "exact", "arithmetic")
    whole = total(host, exact.name)
    for rank in (1, 4, 16):
        near = mg.merge(host, ["lora", "rslora", "dora"], f"near{rank}", "arithmetic", rank=rank)
        assert near.method.brief() == f"LoRA(rank={rank})"
        left, size = torch.zeros(()), torch.zeros(())
        for at, delta in total(host, near.name).items():
            sigma = torch.linalg.svdvals(whole[at])
            torch.testing.assert_close(
                (delta - whole[at]).norm(), sigma[rank:].norm(), rtol=1e-4, atol=1e-5
            )
            left, size = left + (sigma[rank:] ** 2).sum(), size + (sigma**2).sum()
        assert near.provenance["relative_error"] == pytest.approx(
            float((left / size).sqrt()), abs=1e-6
        )
    for rank in (0, 17, 2.0, True):
        with pytest.raises(ModgraftError, match=r"the weight is 16 × 16, so the rank is 1 to 16"):
            mg.merge(host, ["lora"], "no", rank=rank)  # type: ignore[arg-type]
    assert "no" not in host


def test_modules_at_different_places_of_one_weight() -> None:
    """Queries of a fused layer beside all of it, two parts of it, and other layers."""
    host = mg.Host(HOSTS["gpt2"].model())
    a = implanted(host, "lora", "query", "a")
    b = implanted(host, "lora", "*.attn.c_attn", "b", seed=1)
    c = implanted(host, "rescale", ["query", "value"], "c", seed=2)
    d = implanted(host, "dora", "*.mlp.c_fc", "d", seed=3)
    e = implanted(host, "rslora", "*.mlp.c_fc", "e", seed=4)
    for number, some in enumerate(([a, b], [a, c], [c, b], [a, d], [a, b, c, d])):
        new = mg.merge(host, some, f"m{number}", "arithmetic")
        expected = output(host, " + ".join(some), "gpt2")
        assert error(output(host, new.name, "gpt2"), expected) < 1e-6
        near = mg.merge(host, some, f"n{number}", "arithmetic", rank=5)
        assert isinstance(near.method, mg.LoRA)
    assert len(mg.merge(host, [a, "c"], "parts").paths) == 4  # queries and values of two layers
    assert mg.merge(host, [a, e], "apart", "average").method.brief() == "LoRA(rank=3)"


def test_a_rank_where_biases_change() -> None:
    """At some of the layers, of which all have a bias: 0 at the others; or not all: refused."""
    host = mg.Host(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)))
    host.implant("biased", mg.LoRA(rank=2, bias=True), "0", active=False)
    host.implant("plain", mg.LoRA(rank=2), ["0", "1"], active=False)
    host.implant("bare", mg.LoRA(rank=2), "2", active=False)
    with torch.no_grad():
        for name in ("biased", "plain", "bare"):
            for parameter in host[name].parameters():
                parameter.normal_()
    x = torch.randn(5, 8)
    for rank in (None, 4):
        new = mg.merge(host, ["biased", "plain"], f"m{rank}", "arithmetic", rank=rank)
        assert new.method.brief() == "LoRA(rank=4, bias=True)"
        with torch.no_grad():
            expected = host(x, modules="biased + plain")
            torch.testing.assert_close(host(x, modules=new.name), expected)
    with pytest.raises(ModgraftError, match="rank=4: biases change too, and 2 has none"):
        mg.merge(host, ["biased", "bare"], "no", rank=4)
    assert "no" not in host
    whole = mg.merge(host, ["biased", "bare"], "whole", "arithmetic")
    assert whole.method.brief() == "DenseDelta(bias=True)"
    with torch.no_grad():
        torch.testing.assert_close(host(x, modules="whole"), host(x, modules="biased + bare"))


def test_experts_are_merged_one_by_one() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    )).eval()  # fmt: skip
    host = mg.Host(model)
    at = "*.experts.down_proj"
    for seed, name in enumerate("ab"):
        implanted(host, "lora", at, name, seed)
    ids = {"input_ids": torch.arange(8)[None]}
    for method in METHODS:
        new = mg.merge(host, ["a", "b"], f"m_{method}", method)
        (delta,) = total(host, new.name).values()
        if method == "isotropic":
            pair = zip(*(total(host, n)[new.paths[0]] for n in "ab"), strict=True)
            for one, (x, y) in zip(delta, pair, strict=True):
                u, sigma, vh = torch.linalg.svd(x + y)
                expected = sigma[:4].mean() * u[:, :4] @ vh[:4]
                torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), host.using("m_arithmetic"):
        got = host(**ids).logits
    with torch.no_grad(), host.using("a + b"):
        torch.testing.assert_close(got, host(**ids).logits, rtol=1e-5, atol=1e-5)
    mg.merge(host, ["a", "b"], "ranked", "ties", rank=2)


def test_tasks_and_shared_modules_merge_as_what_they_compute() -> None:
    host = filled("bert", ["lora"])
    at = HOSTS["bert"].lora_at
    tasks = host.implant(
        "h", mg.HyperNetwork(mg.LoRA(rank=2), tasks=("fr", "de")), at, active=False
    )
    shared = host.implant("s", mg.Shared(mg.LoRA(rank=2)), at, active=False)
    with torch.no_grad():
        for parameter in (*tasks.parameters(), *shared.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    mg.merge(host, ["lora", "h['fr']", shared], "m", "arithmetic", weights=[1, 0.5, 1])
    expected = output(host, "lora + 0.5*h['fr'] + s", "bert")
    assert error(output(host, "m", "bert"), expected) < 1e-6
    with pytest.raises(ModgraftError, match="'h' has 2 tasks"):
        mg.merge(host, ["lora", "h"], "n")


def test_modules_that_wait_in_their_files_are_read(tmp_path: Path) -> None:
    kinds = ["lora", "rslora", "sparse"]
    host = filled("bert", kinds)
    expected = output(host, " + ".join(kinds), "bert")
    for kind in kinds:
        folder = host.save(kind, tmp_path / kind)
        host.remove(kind)
        host.load(folder, kind, lazy=True)
    mg.merge(host, kinds, "new", "arithmetic")
    assert error(output(host, "new", "bert"), expected) < 1e-6


def test_half_precision_is_summed_in_float32() -> None:
    host = mg.Host(HOSTS["llama"].model().to(torch.bfloat16))
    names = [implanted(host, "lora", HOSTS["llama"].lora_at, f"m{i}", i) for i in range(3)]
    new = mg.merge(host, names, "new", "arithmetic")
    assert {p.dtype for p in new.parameters()} == {torch.float32}
    parts = [total(host, name) for name in names]
    for at, delta in total(host, "new").items():
        assert error(delta, torch.stack([part[at] for part in parts]).sum(0)) < 1e-6


def test_eight_modules_sum_to_a_millionth() -> None:
    host = mg.Host(HOSTS["bert"].model())
    names = [implanted(host, "lora", HOSTS["bert"].lora_at, f"m{i}", i) for i in range(8)]
    for rank in (None, 16):
        new = mg.merge(host, names, f"sum{rank}", "arithmetic", rank=rank)
        parts = [total(host, name) for name in names]
        for at, delta in total(host, new.name).items():
            assert error(delta, torch.stack([part[at] for part in parts]).sum(0)) < 1e-6


def test_a_greedy_soup_of_modules() -> None:
    """The score is the closeness to a goal that two of the three modules lead to."""
    host = mg.Host(HOSTS["bert"].model())
    at = HOSTS["bert"].lora_at
    for seed, name in enumerate("abc"):
        implanted(host, "lora", at, name, seed)
    with torch.no_grad():
        for parameter in host["b"].parameters():
            parameter.mul_(5)
    goal = output(host, "0.5*a + 0.5*c", "bert")

    def score(under: Any) -> float:
        with torch.no_grad():
            return -float((under(**HOSTS["bert"].batch()).logits - goal).norm())

    new = mg.merge(host, list("abc"), "soup", "greedy_soup", validate=score)
    assert sorted(each["name"] for each in new.provenance["parents"]) == ["a", "c"]
    assert error(output(host, "soup", "bert"), goal) < 1e-6
    assert new.provenance["score"] > max(new.provenance["alone"].values())
    assert host.composition is None


@pytest.mark.parametrize(
    ("modules", "method", "options", "said"),
    [
        (["lora", "adapter"], "average", {}, "'adapter' cannot be merged: Adapter is no change of"),
        (["prompt"], "average", {}, "SoftPrompt is no change of weights; leave it out"),
        (["lora", "lora"], "average", {}, "'lora' is to be merged twice"),
        (["lora", "nobody"], "average", {}, "nobody"),
        (["lora", "../x"], "average", {}, "../x"),
        (["lora + rescale"], "average", {}, "one module or one task of it"),
        (["0.5*lora"], "average", {}, "weights= are given apart"),
        ([], "average", {}, "one thing at least"),
        (["lora"], "greedy", {}, "there are average"),
        (["lora"], "greedy_soup", {}, "takes validate=, a function of the host"),
        (["lora"], "ties", {"validate": len}, "validate= belongs to method='greedy_soup'"),
        (["lora", "nan"], "arithmetic", {}, "holds NaN or infinity; a module among those"),
        (["lora", "nan"], "ties", {}, "holds NaN or infinity"),
        (["lora", "nan"], "isotropic", {}, "holds NaN or infinity"),
        (["lora", "nan"], "tsv", {}, "holds NaN or infinity"),
        (["lora", "nan"], "knots", {}, "holds NaN or infinity"),
        (["lora"], "arithmetic", {"weights": [1e39]}, "or a weight is too large"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    modules: Any, method: str, options: dict[str, Any], said: str
) -> None:
    host = filled("bert", ["lora", "rescale"])
    host.implant("adapter", mg.Adapter(width=2), "block", active=False)
    host.implant("prompt", mg.SoftPrompt(length=2), active=False)
    implanted(host, "lora", QV, "nan")
    with torch.no_grad():
        next(host["nan"].parameters()).fill_(torch.nan)
    before = list(host.implants)
    with pytest.raises(ModgraftError, match=said):
        mg.merge(host, modules, "new", method, **options)
    for name in ("lora", "a/b", "../x", "", "keys"):
        with pytest.raises(ModgraftError):
            mg.merge(host, ["lora"], name)
    assert list(host.implants) == before
    assert host.composition is None
