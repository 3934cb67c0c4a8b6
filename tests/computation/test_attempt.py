"""ATTEMPT mixes prompts for each input: compared with the paper's equations, written by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import modgraft as mg
from common import counted
from contract.hosts import HOSTS, WIDTH

LENGTH, RANK, TAU = 3, 5, 0.7


def made(kind: str, dtype: torch.dtype = torch.float64, **more: Any) -> mg.Host:
    """A host with three prompts, one of them a text, and the mixture ``att`` over them."""
    host = mg.Host(HOSTS[kind].model().to(dtype)).eval()
    torch.manual_seed(2)
    for name in ("mnli", "squad"):
        host.implant(name, mg.SoftPrompt(length=LENGTH), active=False)
    host.implant("words", mg.Prompt("three words here", ids=(7, 30, 9)), active=False)
    given = {"length": LENGTH, "rank": RANK, "temperature": TAU, **more}
    host.implant("att", mg.Attempt(over=["mnli", "squad", "words"], **given), active=False)
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.normal_(0, 0.6)
    return host


def batch(kind: str) -> dict[str, Tensor]:
    """Make three texts; the second has two tokens of padding, on the side where the host pads."""
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :2] = 0
    made = {"input_ids": torch.randint(3, 40, (3, 7), generator=g)}
    made["attention_mask"] = mask if kind in ("gpt2", "llama") else mask.flip(1)
    if kind == "t5":
        made["decoder_input_ids"] = torch.randint(3, 40, (3, 5), generator=g)
    return made


def by_hand(host: mg.Host, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Compute P(x) [B, m, d] and a [B, N + 1] in a loop over inputs and prompts."""
    place: Any = host["att"].places[0]
    table = host.model.get_input_embeddings().weight  # type: ignore[operator]
    sources = [host[name].places[0].phi for name in ("mnli", "squad")]
    prompts = [place.phi, *sources, table[torch.tensor([7, 30, 9])]]
    mixed, weights = [], []
    for row, seen in zip(ids, mask, strict=True):
        x = torch.stack([table[i] for i, s in zip(row, seen, strict=True) if s])
        x = torch.stack([x[:, k].max() for k in range(WIDTH)])
        hidden = place.down.weight @ x
        hidden = place.up.weight @ (hidden / (1 + torch.exp(-hidden)))
        mean, var = hidden.mean(), ((hidden - hidden.mean()) ** 2).mean()
        hidden = (hidden - mean) / torch.sqrt(var + 1e-5) * place.norm.weight + place.norm.bias
        scores = [(p.max(0).values * hidden).sum() / TAU for p in prompts]
        powers = [torch.exp(s) for s in scores]
        a = [p / sum(powers) for p in powers]
        weights.append(torch.stack(a))
        mixed.append(place.phi + sum(w * p for w, p in zip(a, prompts, strict=True)))
    return torch.stack(mixed), torch.stack(weights)


def out(host: mg.Host, given: dict[str, Tensor], modules: Any) -> Tensor:
    return host(**given, modules=modules).logits


@pytest.mark.parametrize("kind", ["t5", "bert", "gpt2", "llama"])
def test_it_is_the_papers_equation(kind: str) -> None:
    """Each input's output is the same under a soft prompt that holds its mixture."""
    host, given = made(kind), batch(kind)
    mixed, weights = by_hand(host, given["input_ids"], given["attention_mask"])
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    assert weights.std(0).max() > 0.05  # each input has other weights
    with torch.no_grad():
        together = out(host, given, "att")
        host.implant("own", mg.SoftPrompt(length=LENGTH), active=False)
        for i in range(3):
            host["own"].places[0].phi.copy_(mixed[i])  # type: ignore[operator]
            alone = {k: v[i : i + 1] for k, v in given.items()}
            wanted = out(host, alone, "own")[0]
            seen = given["attention_mask"][i].bool() if kind != "t5" else slice(None)
            torch.testing.assert_close(together[i][seen], wanted[seen], rtol=1e-9, atol=1e-10)
            found = out(host, alone, "att")[0]
            torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-9, atol=1e-10)


def test_the_papers_temperature() -> None:
    host = made("bert", temperature=None)
    place: Any = host["att"].places[0]
    side = mg.Side(torch.randn(2, 4, WIDTH, dtype=torch.float64))
    a = place.attention(side)
    place.temperature = math.e * WIDTH
    assert torch.equal(place.attention(side), a)


def test_gradients() -> None:
    """P₀ and G get gradients, and so do the mixed prompts where they are to learn."""
    host = made("bert")
    place: Any = host["att"].places[0]
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    tensors = [place.phi, place.down.weight, place.up.weight, place.norm.bias]
    tensors += [host["mnli"].places[0].phi]

    def mixed(*_: Tensor) -> Tensor:
        return place.tokens(2, mg.Side(x))[0]

    assert torch.autograd.gradcheck(mixed, tensors)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_one_for_each_example_and_beams(kind: str) -> None:
    host, given = made(kind), batch(kind)
    given.pop("decoder_input_ids", None)
    modules = ["att", "mnli", None]
    settings: dict[str, Any] = {
        "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip
    for composition in (modules, ["att", "att", "att"], "att"):
        together = host.generate(**given, modules=composition, **settings)
        for i in range(3):
            own = composition[i] if isinstance(composition, list) else composition
            alone = {k: v[i : i + 1] for k, v in given.items()}
            assert torch.equal(together[i], host.generate(**alone, modules=own, **settings)[0])
    cached = host.generate(**given, modules="att", **settings)
    plain = host.generate(**given, modules="att", use_cache=False, **settings)
    assert torch.equal(cached, plain)


def test_it_stacks_with_other_modules() -> None:
    host, given = made("gpt2"), batch("gpt2")
    host.implant("qa", mg.LoRA(rank=2), "query", active=False)
    with torch.no_grad():
        host["qa"].places[0].B.normal_(0, 0.5)  # type: ignore[operator]
        both = out(host, given, "squad >> att >> qa")
        assert both.shape == out(host, given, None).shape
        assert not torch.allclose(both, out(host, given, "att >> qa"))


def test_only_it_learns_and_it_is_saved(tmp_path: Any) -> None:
    """Training leaves the mixed prompts; a host that has them gives the same when it is loaded."""
    host = made("t5", torch.float32)
    ids = torch.randint(3, 40, (8, 6))
    before = {k: v.clone() for k, v in host.implants.state_dict().items()}
    data = [{"input_ids": ids, "labels": ids[:, :3].contiguous(), "modules": "att"}]
    history = host.fit(data, train="att", steps=25, lr=3e-2, progress=False)
    assert history.last < history.losses[0]
    assert history.untouched == []
    for key, value in host.implants.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith("att.")
    host.save("att", tmp_path / "att")
    other = made("t5", torch.float32)
    other.remove("att")
    other.remove("mnli")
    other.load(tmp_path / "att")  # with mnli; squad and words are there, as they were saved
    assert set(other.implants) == {"mnli", "squad", "words", "att"}
    given = batch("t5")
    with torch.no_grad():
        assert torch.equal(out(other, given, "att"), out(host, given, "att"))


def test_it_goes_by_what_comes_before_the_answer() -> None:
    host, given = made("gpt2"), batch("gpt2")
    ids = given["input_ids"]
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        one = host(input_ids=ids, labels=labels, modules="att").logits[:, :4]
        other = host(
            input_ids=torch.cat([ids[:, :4], ids[:, 4:].flip(1)], 1), labels=labels, modules="att"
        ).logits[:, :4]
    torch.testing.assert_close(one, other)
    with pytest.raises(mg.ModgraftError, match="every token of example 0 has a label"):
        host(input_ids=ids, labels=ids, modules="att")


def test_a_copy_attends_to_its_own_prompts() -> None:
    host, given = made("bert"), batch("bert")
    twin = copy.deepcopy(host)
    with torch.no_grad():
        assert torch.equal(out(twin, given, "att"), out(host, given, "att"))
        twin["mnli"].places[0].phi.zero_()  # type: ignore[operator]
        assert not torch.allclose(out(twin, given, "att"), out(host, given, "att"))


def test_what_it_is_over_stays() -> None:
    host = made("bert")
    with pytest.raises(mg.ModgraftError, match=r"'mnli' is in the Attempt 'att'"):
        host.remove("mnli")
    host.remove("att")
    host.remove("mnli")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mg.Attempt(), "one or more different names"),
        (lambda: mg.Attempt(over=["mnli", "mnli"]), "one or more different names"),
        (lambda: mg.Attempt(over=["mnli"], rank=0), "rank=0"),
        (lambda: mg.Attempt(over=["mnli"], temperature=0.0), r"temperature=0\.0"),
        (lambda: mg.Attempt(over=["mnli"], init="words"), "init='words'"),
        (lambda: mg.Attempt(over=["mnli"], length=4), "'mnli' has 3 tokens.*length=3"),
        (lambda: mg.Attempt(over=["mlni"], length=3), "did you mean 'mnli'"),
        (lambda: mg.Attempt(over=["lora"], length=3), "'lora' is a LoRA, which puts no tokens"),
        (lambda: mg.Attempt(over=["eye"], length=3), "'eye' is a LinearMap.*depends on the input"),
        (lambda: mg.Attempt(over=["att"], length=3), "'att' is an Attempt.*depends on the input"),
        (lambda: mg.Mixture(["mnli", "squad"]), r"mg\.Attempt\(over="),
    ],
)
def test_what_means_nothing_is_refused(make: Any, message: str) -> None:
    host = made("bert")
    host.implant("lora", mg.LoRA(rank=1), "query", active=False)
    host.implant("eye", mg.LinearMap(dim=2), active=False)
    names = list(host.implants)
    with pytest.raises(mg.ModgraftError, match=message):
        host.implant("new", make())
    assert list(host.implants) == names
    assert out(host, batch("bert"), "att").isfinite().all()


def test_a_query_of_another_width() -> None:
    host, given = made("bert"), batch("bert")
    side = {"example": mg.Side(torch.randn(3, 1, WIDTH + 1, dtype=torch.float64))}
    with pytest.raises(mg.ModgraftError, match=f"{WIDTH} wide"):
        host(**given, side=side, modules="att")


def test_compiled() -> None:
    """It compiles as one graph; other compositions work where it is implanted but inactive."""
    host, given = made("gpt2", torch.float32), batch("gpt2")
    host.implant("qa", mg.LoRA(rank=2), "query", active=False)
    compiled, graphs = counted(host)
    with torch.no_grad():
        for composition, count in (("att", 1), ("att >> qa", 1), ("qa", 2)):
            host.use(composition)
            torch.testing.assert_close(
                compiled(**given).logits, host(**given).logits, rtol=1e-4, atol=1e-5
            )
            assert len(graphs) == count
