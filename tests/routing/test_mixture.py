"""Mixture: a router and an aggregation over modules, inside a host."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modgraft as mg
from contract.hosts import HOSTS

QV = ["query", "value"]


def router_of(handle: mg.Implant) -> Any:
    place: Any = handle.places[0]
    return place.route


def made(kind: str = "gpt2", dtype: torch.dtype = torch.float64) -> mg.Host:
    torch.manual_seed(0)
    host = mg.Host(HOSTS[kind].model().to(dtype)).eval()
    for name, module, at in (
        ("a", mg.LoRA(rank=3), QV),
        ("b", mg.LoRA(rank=5), "value"),
        ("c", mg.Adapter(width=4), "feedforward"),
        ("d", mg.Rescale(), "value"),
        ("p", mg.Prefix(length=3), None),
        ("q", mg.Prefix(length=3), None),
    ):
        host.implant(name, module, at, active=False)
        shake(host, name)
    return host


@torch.no_grad()
def shake(host: mg.Host, name: str) -> None:
    for p in host[name].parameters():
        p.normal_(0, 0.3)


def batch(kind: str = "gpt2") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {"input_ids": torch.randint(3, 40, (3, 6), generator=generator)}
    if kind == "t5":
        made["decoder_input_ids"] = torch.randint(3, 40, (3, 4), generator=generator)
    return made


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert", "llama"])
@torch.no_grad()
def test_a_task_routed_evenly_is_the_average(kind: str) -> None:
    host = made(kind)
    names = ["a", "b", "c", "d"]
    host.implant("m", mg.Mixture(names, router=mg.Fixed()), active=False)
    got = host(**batch(kind), modules="m").logits
    want = host(**batch(kind), modules=f"average({', '.join(names)})").logits
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    host.implant("k", mg.Mixture(["p", "q"], router=mg.Fixed()), active=False)
    got = host(**batch(kind), modules="k").logits
    torch.testing.assert_close(got, host(**batch(kind), modules="average(p, q)").logits)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "bert"])
@pytest.mark.parametrize(
    "router",
    [mg.Soft(), mg.Top1(), mg.TopK(2), mg.Threshold(0.5), mg.NoisyTopK(2), mg.Soft(temperature=3)],
    ids=str,
)
def test_examples_routed_are_examples_weighted(kind: str, router: mg.Router) -> None:
    """A mixture computes what mg.Weighted does with the weights that its router chose."""
    host = made(kind)
    names = ("a", "b", "c", "p")
    handle = host.implant("m", mg.Mixture(names[:3], router=router), active=False)
    shake(host, "m")
    given = batch(kind)
    got = host(**given, modules="m").logits
    table: Any = host.model.get_input_embeddings()  # type: ignore[operator]
    chosen = router_of(handle)(table(given["input_ids"]).mean(1)).weights
    assert chosen.shape == (3, 3)
    want = host(**given, modules=mg.Weighted(names[:3], chosen)).logits
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    each = []
    for i in range(3):
        text = " + ".join(f"{w}*{n}" for w, n in zip(chosen[i].tolist(), names, strict=False) if w)
        one = {k: v[i : i + 1] for k, v in given.items()}
        each.append(host(**one, modules=text or None).logits)
    torch.testing.assert_close(got, torch.cat(each), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("router", [mg.Soft(level="token"), mg.TopK(2, level="token")], ids=str)
def test_tokens_routed(router: mg.Router) -> None:
    """Each token has its own weights; the reference is written out at one site."""
    torch.manual_seed(0)
    layer: Any = torch.nn.Linear(5, 4).double()
    host = mg.Host(torch.nn.Sequential(layer))
    for name in ("a", "b", "c"):
        host.implant(name, mg.LoRA(rank=2), "0", active=False)
        shake(host, name)
    handle = host.implant("m", mg.Mixture(["a", "b", "c"], router=router))
    shake(host, "m")
    x = torch.randn(2, 3, 5).double()
    with torch.no_grad():
        alpha = router_of(handle)(x).weights  # [2, 3, 3]
        places: list[Any] = [host[n].places[0] for n in ("a", "b", "c")]
        deltas = [place.delta(layer.weight) for place in places]
        want = torch.nn.functional.linear(x, layer.weight, layer.bias) + sum(
            alpha[..., j, None] * (x @ delta.T) for j, delta in enumerate(deltas)
        )
        torch.testing.assert_close(host(x), want, rtol=1e-10, atol=1e-10)
        if isinstance(router, mg.TopK):
            assert (alpha != 0).sum(-1).eq(2).all()


def test_gradients_reach_router_and_modules() -> None:
    host = made("gpt2")
    host.implant("m", mg.Mixture(["a", "c"], router=mg.Soft()), active=False)
    given = batch()
    with host.training_only(["m", "a", "c"]):
        host(**given, modules="m").logits.square().sum().backward()
    for name in ("m", "a", "c"):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in host[name].parameters())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@torch.no_grad()
def test_generate_follows_the_choice_of_the_prompt(kind: str, beams: int) -> None:
    host = made(kind)
    host.implant("m", mg.Mixture(["a", "b", "c"], router=mg.Top1()), active=False)
    host.implant("t", mg.Mixture(["a", "c"], router=mg.TopK(1, level="token")), active=False)
    shake(host, "m")
    shake(host, "t")
    with torch.no_grad():
        router_of(host["m"]).map.weight.mul_(20)
    settings: dict[str, Any] = {
        "max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip
    given = {"input_ids": batch(kind)["input_ids"]}
    for name in ("m", "t"):
        together = host.generate(**given, modules=name, **settings)
        for i in range(3):
            one = {k: v[i : i + 1] for k, v in given.items()}
            alone = host.generate(**one, modules=name, **settings)
            assert torch.equal(together[i], alone[0])


@torch.no_grad()
def test_the_answer_does_not_choose() -> None:
    host = made("gpt2")
    host.implant("m", mg.Mixture(["a", "b"]), active=False)
    ids = batch()["input_ids"]
    labels = ids.clone()
    with pytest.raises(mg.ModgraftError, match="every token of example 0 has a label"):
        host(input_ids=ids, labels=labels, modules="m")
    labels[:, :3] = -100
    one = host(input_ids=ids, labels=labels, modules="m").logits[:, :3]
    other = ids.clone()
    other[:, 3:] = 5
    two = host(input_ids=other, labels=labels, modules="m").logits[:, :3]
    torch.testing.assert_close(one, two)


@torch.no_grad()
def test_nested_in_expressions_and_lists() -> None:
    host = made("gpt2")
    host.implant("m", mg.Mixture(["a", "b"], router=mg.Fixed()), active=False)
    host.implant("n", mg.Mixture(["m", "c"], router=mg.Fixed()), active=False)
    given = batch()

    def out(modules: Any) -> Tensor:
        return host(**given, modules=modules).logits

    torch.testing.assert_close(out("m >> c"), out("0.5*a + 0.5*b >> c"))
    torch.testing.assert_close(out("n"), out("0.25*a + 0.25*b + 0.5*c"))
    mixed = out(["m", "0.5*m + d", None])
    each = [out("m")[0], out("0.25*a + 0.25*b + d")[1], out(None)[2]]
    torch.testing.assert_close(mixed, torch.stack(each))


@torch.no_grad()
def test_tasks_have_rows() -> None:
    host = made("gpt2")
    sets = {"x": ("a",), "y": ("b", "c")}
    host.implant("m", mg.Mixture(["a", "b", "c"], router=mg.Fixed(among=sets)), active=False)
    given = batch()
    for composition, same in (("m['x']", "a"), ("m['y']", "0.5*b + 0.5*c")):
        got = host(**given, modules=composition).logits
        torch.testing.assert_close(got, host(**given, modules=same).logits)
    mixed = host(**given, modules=["m['x']", "m['y']", "m['x']"]).logits
    torch.testing.assert_close(mixed[1], host(**given, modules="m['y']").logits[1])


def test_fuse_attends_to_results() -> None:
    host = made("bert")
    handle = host.implant("f", mg.Mixture(["a", "c"], aggregate=mg.Fuse()), active=False)
    with torch.no_grad():  # one V, the identity: a convex combination of what the modules make
        given = batch("bert")
        assert host(**given, modules="f").logits.shape[0] == 3
    with host.training_only("f"):
        host(**given, modules="f").logits.square().sum().backward()
    assert all(p.grad is not None for p in handle.parameters())


@pytest.mark.parametrize("value", [True, False])
@torch.no_grad()
def test_fuse_may_read_effects_alone(value: bool) -> None:
    torch.manual_seed(0)
    fuse = mg.Fuse(value=value, effects=True)
    fuse.build(2, 4)
    fuse.double()
    y, effects = torch.randn(3, 5, 4).double(), torch.randn(2, 3, 5, 4).double()
    output = fuse(lambda j, of, at, weight: of + effects[j], [], y)
    scores = torch.stack([(fuse.Q(y) * fuse.K(e)).sum(-1) for e in effects])
    values = [fuse.V(e) if value else e for e in effects]
    a = scores.softmax(0).unsqueeze(-1)
    torch.testing.assert_close(output, y + a[0] * values[0] + a[1] * values[1])


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    host = made("gpt2")
    host.implant("m", mg.Mixture(["a", "c"], router=mg.NoisyTopK(1)), active=False)
    shake(host, "m")
    want = host(**batch(), modules="m").logits
    host.save("m", tmp_path / "m")
    with pytest.raises(mg.ModgraftError, match="would choose among modules that are not there"):
        host.remove("a")
    host.remove("m")
    host.load(tmp_path / "m", name="again")
    assert torch.equal(host(**batch(), modules="again").logits, want)


@torch.no_grad()
def test_a_mixture_of_tasks_over_several_sites_is_saved_and_loaded(tmp_path: Path) -> None:
    host = made("gpt2")
    router = mg.SkillMatrix(tasks=("x", "y"))
    host.implant("m", mg.Mixture(["a", "c"], router=router), active=False)
    shake(host, "m")
    want = host(**batch(), modules="m['y']").logits
    host.save("m", tmp_path / "m")
    again = host.load(tmp_path / "m", name="again")
    assert type(again.method.router) is mg.SkillMatrix  # type: ignore[union-attr]
    assert torch.equal(host(**batch(), modules="again['y']").logits, want)


@torch.no_grad()
def test_stats() -> None:
    host = made("gpt2")
    handle = host.implant("m", mg.Mixture(["a", "b", "c"], router=mg.Top1()), active=False)
    route = router_of(handle)
    route.map.weight.zero_()
    route.map.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    host(**batch(), modules="m")
    (use,) = handle.stats()
    assert use.choices == 3
    assert use.picked == (0.0, 1.0, 0.0)
    assert use.dead == ("a", "c")
    assert use.collapsed
    assert use.entropy < 0.01
    assert use.spread == 0
    token = host.implant("t", mg.Mixture(["a", "b"], router=mg.Soft(level="token")), active=False)
    host(**batch(), modules="t")
    assert len(token.stats()) == len(token.paths)
    assert token.stats()[0].choices == 18


@torch.no_grad()
@pytest.mark.parametrize("router", [mg.NoisyTopK(k=1), mg.TopK(k=1), mg.Top1()])
def test_what_no_choice_picks_has_no_part_in_the_spread(router: Any) -> None:
    """Probabilities that are nearly equal pick one module all the same, and no even use."""
    host = made("gpt2")
    handle = host.implant("m", mg.Mixture(["a", "b", "c"], router=router), active=False)
    route = router_of(handle)
    route.map.weight.zero_()
    route.map.bias.copy_(torch.tensor([0.0, 1e-3, 0.0]))
    host.eval()
    host(**batch(), modules="m")
    (use,) = handle.stats()
    assert use.dead == ("a", "c")
    assert use.collapsed
    assert use.spread == 0
    assert use.entropy == pytest.approx(math.log2(3), abs=1e-3)  # of one choice


@pytest.mark.parametrize(
    ("mixture", "says"),
    [
        (lambda: mg.Mixture([]), "one or more different names"),
        (lambda: mg.Mixture(["a", "a"]), "one or more different names"),
        (lambda: mg.Mixture("a"), "one or more different names"),
        (lambda: mg.Mixture(["a", "zz"]), "no module 'zz'"),
        (lambda: mg.Mixture(["a >> b"]), "is a composition"),
        (lambda: mg.Mixture(["a", "p"], router=mg.Soft(level="token")), "looks at other tokens"),
        (lambda: mg.Mixture(["a", "p"], aggregate=mg.Fuse()), "keys and values"),
        (lambda: mg.Mixture(["a"], router=mg.Soft(), aggregate=mg.Fuse()), "leave the router out"),
        (lambda: mg.Mixture(["a"], router=mg.TopK(2)), "k is at most 1"),
    ],
)
def test_mixtures_that_mean_nothing(mixture: Any, says: str) -> None:
    host = made("gpt2")
    before = host(**batch(), modules="a").logits
    with pytest.raises(mg.ModgraftError, match=says):
        host.implant("m", mixture(), active=False)
    assert torch.equal(host(**batch(), modules="a").logits, before)


def test_pooled_output_has_no_tokens() -> None:
    host = mg.Host(torch.nn.Sequential(torch.nn.Linear(5, 4)))
    host.implant("a", mg.LoRA(rank=2), "0", active=False)
    host.implant("m", mg.Mixture(["a"], router=mg.Soft(level="token")))
    with pytest.raises(mg.ModgraftError, match="tokens are routed, and this site puts out"):
        host(torch.randn(3, 5))


def test_a_host_that_reads_no_text_is_told_what_routes_examples() -> None:
    host = mg.Host(torch.nn.Sequential(torch.nn.Linear(5, 4)))
    host.implant("a", mg.LoRA(rank=2), "0", active=False)
    with pytest.raises(mg.ModgraftError, match=r"Sequential reads none; say Mixture\(…, width=d\)"):
        host.implant("m", mg.Mixture(["a"]))
    host.implant("m", mg.Mixture(["a"], width=3))
    host(torch.randn(2, 5), side={"example": mg.Side(torch.randn(2, 1, 3))})


def test_a_text_that_is_all_padding_is_not_called_labelled() -> None:
    host = made("gpt2", torch.float32)
    host.implant("m", mg.Mixture(["a", "b"]), active=False)
    host.implant("s", mg.SoftPrompt(length=2), active=False)
    host.implant("t", mg.Attempt(over=["s"], length=2, rank=2), active=False)
    given = batch() | {"labels": batch()["input_ids"].clone()}
    given["labels"][:, :3] = -100
    given["attention_mask"] = torch.ones(3, 6, dtype=torch.long)
    given["attention_mask"][2] = 0
    for name in "mt":
        with pytest.raises(mg.ModgraftError, match="every token of example 2 has a label or is ma"):
            host(**given, modules=name)


def test_a_mixture_cannot_be_merged() -> None:
    host = made("gpt2")
    host.implant("m", mg.Mixture(["a", "b"], router=mg.Fixed()), active=False)
    with pytest.raises(mg.ModgraftError, match="weighs modules at each call; merge a sum"):
        host.merge("m")
