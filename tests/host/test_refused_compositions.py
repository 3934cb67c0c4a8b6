"""Invalid compositions are refused with a reason, and the host works as before."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor

import modgraft as mg
from contract.hosts import BATCH, HOSTS
from modgraft.core.errors import CompositionError

CASE = HOSTS["gpt2"]
MODULES: dict[str, tuple[Any, Any]] = {
    "lora": (mg.LoRA(rank=2), "query"),
    "wide": (mg.LoRA(rank=3), ["query", "down"]),
    "adapter": (mg.Adapter(width=4), "down"),
    "prompt": (mg.SoftPrompt(length=2), None),
    "longer": (mg.SoftPrompt(length=3), None),
    "prefix": (mg.Prefix(length=2), None),
    "deeper": (mg.Prefix(length=4), None),
    "hyper": (mg.HyperNetwork(mg.LoRA(rank=2), tasks=("fr", "de")), "value"),
}


def made() -> mg.Host:
    host = mg.Host(CASE.model()).eval()
    for name, (module, at) in MODULES.items():
        host.implant(name, module, at, active=False)
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0, 0.3)
    host.use("wide >> adapter")
    return host


@pytest.fixture(scope="module")
def host() -> mg.Host:
    return made()


@pytest.fixture(scope="module")
def other() -> mg.Host:
    return made()


@torch.no_grad()
def run(host: mg.Host, *modules: Any) -> Tensor:
    return host(**CASE.batch(), **({"modules": modules[0]} if modules else {})).logits


def works(host: mg.Host, before: Tensor) -> None:
    """Check that the host computes what it did before and accepts new compositions."""
    assert str(host.composition) == "wide >> adapter"
    assert torch.equal(run(host), before)
    assert torch.isfinite(run(host, ["lora", "prompt >> adapter", None])).all()


TEXTS = {
    "a number and a module": ("lora + 1", "means nothing"),
    "a number alone": ("2", "means nothing"),
    "a product of modules": ("lora * adapter", "means nothing"),
    "a quotient": ("lora / 2", "means nothing"),
    "a power": ("lora ** 2", "means nothing"),
    "a comparison": ("lora > adapter", "means nothing"),
    "a call": ("lora(adapter)", "means nothing"),
    "code": ("__import__('os').getcwd()", "means nothing"),
    "an unknown function": ("averag(lora, wide)", "means nothing"),
    "a mean of nothing": ("average()", "means nothing"),
    "a mean with an option": ("average(lora, wide, by=2)", "means nothing"),
    "half an expression": ("lora >>", "is not a composition"),
    "nothing": ("", "is not a composition"),
    "spaces": ("   ", "is not a composition"),
    "an infinite weight": ("1e999*lora", "a weight is a finite number"),
    "a weight that becomes infinite": ("1e300*(1e300*lora)", "a weight is a finite number"),
    "an integer beyond any float": ("9" * 400 + "*lora", "a weight is a finite number"),
    "an integer beyond reading": ("9" * 5000 + "*lora", "is not a composition"),
    "a word for no number": ("nan*lora", "means nothing"),
    "a truth value": ("True*lora", "means nothing"),
    "a complex weight": ("1j*lora", "means nothing"),
    "tokens of a change of weights": ("concat(lora, wide)", "'lora' has none; write lora >> wide"),
    "tokens of one change of weights": ("concat(lora)", "'lora' has none; write lora"),
    "tokens of a prompt and an adapter": ("concat(prompt, adapter)", "'adapter' has none"),
    "a scaled prompt": ("0.5*prompt", "cannot be added or scaled"),
    "a negated prefix": ("-prefix", "cannot be added or scaled"),
    "a sum of prompts": ("prompt + longer", "cannot be added or scaled"),
    "a prompt added to a weight": ("lora + prompt", "cannot be added or scaled"),
    "a prefix scaled in a chain": ("lora >> 0.5*(prefix >> wide)", "cannot be added or scaled"),
    "a mean of a prompt and a weight": ("average(prompt, lora)", "there is no mean of both"),
    "a mean of a prompt and a prefix": ("average(prompt, prefix)", "there is no mean of both"),
    "a mean of joined prompts": ("average(concat(prompt, prompt), longer)", "which 'concat"),
    "a task not said": ("hyper", "has 2 tasks"),
    "a task unknown": ("hyper['frr']", "did you mean hyper\\['fr'\\]"),
    "a task of a module without": ("lora['fr']", "has no tasks"),
    "a hundred thousand letters": ("a" * 100_000, "100,000 characters; at most 10,000"),
    "ten thousand brackets": ("(" * 10_000 + "lora" + ")" * 10_000, "20,004 characters"),
    "four thousand brackets": ("(" * 4000 + "lora" + ")" * 4000, "is not a composition"),
    "nine thousand signs": ("-" * 9000 + "lora", "nested too deep"),
    "sixty levels": ("(lora >> (" * 60 + "wide" + ") + lora)" * 60, "nested more than 50 deep"),
}


@pytest.mark.parametrize(("text", "says"), TEXTS.values(), ids=TEXTS)
def test_texts(host: mg.Host, text: str, says: str) -> None:
    before = run(host)
    with pytest.raises(CompositionError, match=says):
        run(host, text)
    with pytest.raises(CompositionError, match=says):
        host.use(text)
    with pytest.raises(CompositionError, match=says), host.using(text):
        pass
    with pytest.raises(CompositionError, match=says):
        run(host, ["lora", text, None])
    with pytest.raises(CompositionError, match=says):
        host.generate(**CASE.batch(), modules=text, max_new_tokens=2)
    with pytest.raises(CompositionError, match=says):
        host.merge(text)
    works(host, before)


def _deep(host: mg.Host) -> Any:
    return reduce(lambda e, _: (e + host["lora"]) >> host["adapter"], range(5000), host["wide"])


OBJECTS: dict[str, tuple[Callable[[mg.Host], Any], str]] = {
    "a number": (lambda h: 3, "a composition is a text or an expression of handles"),
    "a set": (lambda h: {"lora"}, "a composition is a text"),
    "a dictionary": (lambda h: {"lora": 1.0}, "a composition is a text"),
    "a tensor": (lambda h: torch.ones(3), "a composition is a text"),
    "a computation": (lambda h: mg.LoRA(rank=2), "a composition is a text"),
    "handle + number": (lambda h: h["lora"] + 1, r"lora \+ 1: modules and compositions"),
    "number + handle": (lambda h: 1 + h["lora"], "modules and compositions"),
    "number - handle": (lambda h: 1 - h["lora"], "modules and compositions"),
    "text >> handle": (lambda h: "wide" >> h["lora"], "a text is read by host.use"),
    "handle >> text": (lambda h: h["lora"] >> "wide", "a text is read by host.use"),
    "handle >> None": (lambda h: h["lora"] >> None, "modules and compositions"),
    "handle * handle": (lambda h: h["lora"] * h["wide"], r"lora \* wide: .* scaled by a number"),
    "handle * tensor": (lambda h: torch.ones(2) * h["lora"], "scaled by a number"),
    "handle * True": (lambda h: h["lora"] * True, "scaled by a number"),
    "handle / number": (lambda h: h["lora"] / 2, r"write number \* lora"),
    "infinity": (lambda h: math.inf * h["lora"], "a weight is a finite number"),
    "no number": (lambda h: math.nan * (h["lora"] + h["wide"]), "a weight is a finite number"),
    "too large": (lambda h: 10**400 * h["lora"], "a weight is a finite number"),
    "average of a text": (lambda h: mg.average(h["lora"], "wide"), "a text is read by host.use"),
    "average of nothing": (lambda h: mg.average(), "it is of modules or compositions"),
    "concat of a handle": (lambda h: mg.concat(h["lora"]), "concat puts tokens together"),
    "a task not said": (lambda h: h["hyper"] >> h["lora"], "has 2 tasks, and this does not say"),
    "a task unknown": (lambda h: h["hyper"]["frr"], "has no task 'frr'"),
    "deeply nested": (_deep, "nested more than 50 deep"),
    "an empty list": (lambda h: [], "one composition for each example"),
    "a list in a list": (lambda h: ["lora", ["wide"], None], "for a whole batch"),
    "a tuple in a list": (lambda h: ["lora", ("wide",), None], "for a whole batch"),
    "a number in a list": (lambda h: ["lora", 1, None], "not 1"),
    "a dictionary in a list": (lambda h: ["lora", {}, None], "a composition is a text"),
    "weights in a list": (lambda h: [_weighted(1, 1), "lora", None], "for a whole batch"),
    "a chain of weights in a list": (
        lambda h: [h["adapter"] >> _weighted(1, 1), "lora", None], "for a whole batch"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "says"), OBJECTS.values(), ids=OBJECTS)
def test_objects(host: mg.Host, make: Callable[[mg.Host], Any], says: str) -> None:
    before = run(host)
    for attempt in (
        lambda: run(host, make(host)),
        lambda: host.use(make(host)),
        lambda: host.using(make(host)).__enter__(),
        lambda: host.merge(make(host)),
    ):
        with pytest.raises(CompositionError, match=says):
            attempt()
    works(host, before)


# -- refused once there is a batch -----------------------------------------------------------------


def _weighted(rows: int, columns: int = 2, names: Any = None) -> Any:
    return mg.Weighted(names or ["lora", "wide"][:columns], torch.ones(rows, columns))


CALLS: dict[str, tuple[Callable[[mg.Host], Any], str]] = {
    "prompts of unequal length": (lambda h: "average(prompt, longer)", "as many each.* 2, 3"),
    "prefixes of unequal length": (lambda h: "average(prefix, deeper)", "as many keys each.* 2, 4"),
    "a list too short": (lambda h: ["lora"], "gives 1 compositions for a batch of 3"),
    "a list too long": (lambda h: [None] * 5, "gives 5 compositions for a batch of 3"),
    "weights for too few": (lambda h: _weighted(2), "2 rows of weights for a batch of 3"),
    "weights for too many, in a chain": (
        lambda h: h["adapter"] >> _weighted(4), "4 rows of weights for a batch of 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "says"), CALLS.values(), ids=CALLS)
def test_calls(host: mg.Host, make: Callable[[mg.Host], Any], says: str) -> None:
    before = run(host)
    with pytest.raises(CompositionError, match=says):
        run(host, make(host))
    with pytest.raises(CompositionError, match=says):
        host.generate(**CASE.batch(), modules=make(host), max_new_tokens=2)
    with pytest.raises(CompositionError, match=says), host.using(make(host)):
        run(host)
    works(host, before)


WEIGHTS: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN": (
        lambda: mg.Weighted(["lora", "wide"], torch.tensor([[1.0, 1.0], [1.0, math.nan]])),
        r"weights\[1, 1\] = nan, for 'wide'",
    ),
    "infinity": (
        lambda: mg.Weighted(["lora"], torch.tensor([[-math.inf]])), r"weights\[0, 0\] = -inf",
    ),
    "a vector": (
        lambda: mg.Weighted(["lora", "wide"], torch.ones(2)), r"\[batch, 2\], not \[2\]",
    ),
    "a column too many": (
        lambda: mg.Weighted(["lora"], torch.ones(3, 2)), r"\[batch, 1\], not \[3, 2\]",
    ),
    "whole numbers": (
        lambda: mg.Weighted(["lora"], torch.ones(3, 1, dtype=torch.long)), "floating point",
    ),
    "a list": (lambda: mg.Weighted(["lora"], [[1.0]]), "not list"),  # type: ignore[arg-type]
    "no names": (lambda: mg.Weighted([], torch.ones(3, 0)), "a list of names"),
    "one text": (lambda: mg.Weighted("ab", torch.ones(3, 2)), "a list of names"),
    "prompts": (lambda: _weighted(BATCH, 1, ["prompt"]), "cannot be added or scaled"),
    "a composition": (
        lambda: _weighted(BATCH, 1, ["lora >> wide"]), "'lora >> wide' is a composition",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "says"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights(host: mg.Host, make: Callable[[], Any], says: str) -> None:
    before = run(host)
    with pytest.raises(CompositionError, match=says):
        run(host, make())
    works(host, before)


def test_one_set_of_weights_is_merged(host: mg.Host) -> None:
    before = run(host)
    for several in (["lora", "wide", None], _weighted(BATCH), host["lora"] >> _weighted(BATCH)):
        with pytest.raises(CompositionError, match="a merged model has one set of weights"):
            host.merge(several)
    with host.using(["lora", "wide", None]):
        plain = host.merge("lora")(**CASE.batch()).logits
        torch.testing.assert_close(plain, run(host, "lora"), rtol=1e-4, atol=1e-5)
    works(host, before)


# -- names -----------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[mg.Host, mg.Host], Any]] = {
    "use": lambda h, o: h.use("loar"),
    "using": lambda h, o: h.using("wide >> loar").__enter__(),
    "modules=": lambda h, o: run(h, "0.5*(wide - loar)"),
    "generate": lambda h, o: h.generate(**CASE.batch(), modules="loar", max_new_tokens=1),
    "a list": lambda h, o: run(h, ["wide", None, "average(loar, wide)"]),
    "use of a list": lambda h, o: h.use(["wide", None, "loar"]),
    "Weighted": lambda h, o: run(h, _weighted(BATCH, 2, ["wide", "loar"])),
    "a handle": lambda h, o: h["loar"] >> h["wide"],
    "another host's handle": lambda h, o: run(h, h["wide"] >> o["loar"]),
    "another's handle in a list": lambda h, o: run(h, [o["loar"], None, None]),
    "merge": lambda h, o: h.merge("loar"),
    "remove": lambda h, o: h.remove("loar"),
    "save": lambda h, o: h.save("loar", "nowhere"),
    "fit": lambda h, o: h.fit([CASE.batch()], train=["wide", "loar"], steps=1),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_name_suggests_the_nearest(host: mg.Host, other: mg.Host, way: str) -> None:
    before = run(host)
    if "loar" not in other:
        other.implant("loar", mg.LoRA(rank=2), "query", active=False)
    with pytest.raises(mg.ModgraftError, match=r"no module 'loar'.* did you mean 'lora'"):
        WAYS[way](host, other)
    works(host, before)


def test_another_hosts_handle(host: mg.Host, other: mg.Host) -> None:
    before, says = run(host), "is the handle of another host's module"
    for text in ("lora", "0.5*lora", "wide >> lora", "hyper['fr']"):
        run(host, text)  # cached expressions of this host hide no error
    for theirs in (
        other["lora"],
        0.5 * other["lora"],
        host["wide"] >> other["lora"],
        host["lora"] - other["lora"],
        mg.average(other["lora"], host["lora"]),
        other["hyper"]["fr"],
        [host["lora"], other["lora"], None],
    ):
        with pytest.raises(CompositionError, match=says):
            run(host, theirs)
        with pytest.raises(CompositionError, match=says):
            host.use(theirs)
    assert other["lora"].expression() == host["lora"].expression()  # they are written alike
    works(host, before)


def test_a_removed_modules_handle() -> None:
    host = made()
    before, old = run(host), host["lora"]
    run(host, old)
    host.remove("lora")
    for composition in (old, host["wide"] >> old, [old, None, "wide"]):
        with pytest.raises(CompositionError, match="no module 'lora'"):
            run(host, composition)
    host.implant("lora", mg.LoRA(rank=2), "value", active=False)
    for composition in (old, host["wide"] >> old, [old, None, "wide"]):
        with pytest.raises(CompositionError, match="or of one that was removed"):
            run(host, composition)
    assert torch.equal(run(host, host["lora"]), run(host, "lora"))
    works(host, before)


def test_removing_what_compositions_speak_of() -> None:
    host = made()
    host.use(["lora >> adapter", "average(lora, wide)", "lora"])
    host.remove("lora")
    assert str(host.composition) == "['adapter', '0.5*wide', None]"
    with torch.no_grad():
        assert torch.equal(run(host), run(host, ["adapter", "0.5*wide", None]))
    host.implant("more", mg.LoRA(rank=2), "key")
    assert str(host.composition) == "['adapter >> more', '(0.5*wide) >> more', 'more']"
    with pytest.raises(CompositionError, match="no part of another"):
        host.use(host.composition >> host["wide"])  # type: ignore[operator]
