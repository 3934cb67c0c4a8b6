"""What a side input's mask hides reaches no value and no gradient, whatever is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import modgraft as mg
from contract.hosts import BATCH, FEATURES, HOSTS, QV, side

ODD = (math.nan, math.inf, -math.inf)
HIDDEN = ~torch.tensor([[True, True, False, True], [False] * 4, [True, False, False, False]])


@dataclass(frozen=True)
class Reader:
    """A module that reads a side input: ``implant(host)`` makes it, under the name ``m``."""

    implant: Callable[[mg.Host], object]
    source: str = "image"
    width: int = FEATURES


def _fusion(form: Any) -> Reader:
    made = mg.GatedFusion(dim=FEATURES, form=form)
    return Reader(lambda host: host.implant("m", made, "block"))


def _map(tokens_each: int) -> Reader:
    return Reader(lambda h: h.implant("m", mg.LinearMap(dim=FEATURES, tokens_each=tokens_each)))


def _mixture(router: Callable[[], mg.Router], aggregate: type[mg.Aggregation]) -> Reader:
    def implant(host: mg.Host) -> None:
        for name in ("a", "b", "c"):
            host.implant(name, mg.LoRA(rank=2), QV, active=False)
        host.implant("d", mg.Adapter(width=3), "block", active=False)
        over = ["a", "b", "c", "d"]
        host.implant("m", mg.Mixture(over, router(), aggregate(), width=FEATURES))

    return Reader(implant, "example")


def _attempt(host: mg.Host) -> None:
    for name in ("a", "b"):
        host.implant(name, mg.SoftPrompt(length=2), active=False)
    host.implant("m", mg.Attempt(over=["a", "b"], length=2, rank=3))


ROUTERS: dict[str, Callable[[], mg.Router]] = {
    "soft": mg.Soft,
    "gumbel": mg.Top1,
    "reinforce": lambda: mg.Top1(estimator="reinforce"),
    "epsilon": lambda: mg.Top1(estimator="epsilon", epsilon=0.5),
    "top2": lambda: mg.TopK(2),
    "threshold": lambda: mg.Threshold(0.5),
    "noisy": lambda: mg.NoisyTopK(2),
    "similarity": lambda: mg.Similarity(k=2),
}
READERS = {
    "fusion-paper": _fusion("paper"),
    "fusion-released": _fusion("released"),
    "map-1": _map(1),
    "map-3": _map(3),
    "attempt": Reader(_attempt, "example", 16),
    **{
        f"mixture-{name}-{aggregate.__name__}": _mixture(router, aggregate)
        for name, router in ROUTERS.items()
        for aggregate in (mg.Average, mg.Sequential)
    },
}


def made(reader: Reader, kind: str) -> mg.Host:
    """Make a host with the module, in which what comes before it has a gradient too."""
    host = mg.Host(HOSTS[kind].model())
    reader.implant(host)
    with torch.no_grad():
        for tensor in (*host.implants.parameters(), *host.implants.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.3)
    host.model.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
    return host


def features(reader: Reader, odd: float) -> Tensor:
    drawn = torch.randn(BATCH, 4, reader.width, generator=torch.Generator().manual_seed(4))
    return drawn.masked_fill(HIDDEN[..., None], odd).requires_grad_()


def outcome(host: mg.Host, reader: Reader, kind: str, odd: float) -> list[Tensor]:
    """Return the output and every gradient of a step."""
    torch.manual_seed(5)  # of routers that draw
    for place in host["m"].places:
        place.baseline = None  # of their losses
    given = features(reader, odd)
    batch = HOSTS[kind].batch()
    batch.setdefault("labels", batch["input_ids"])
    out = host(**batch, side={reader.source: mg.Side(given, ~HIDDEN)})
    host.zero_grad()
    out.loss.backward()
    own = torch.zeros_like(given) if given.grad is None else given.grad
    grads = [p.grad.clone() for p in host.parameters() if p.grad is not None]
    return [out.logits.detach(), own, *grads]


def forward(host: mg.Host, reader: Reader, kind: str, odd: float) -> Tensor:
    given = mg.Side(features(reader, odd), ~HIDDEN)
    return host(**HOSTS[kind].batch(), side={reader.source: given}).logits


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_what_is_hidden_is_as_if_it_were_0(reader: Reader, kind: str) -> None:
    host = made(reader, kind)
    for training in (True, False):
        host.train(training)
        zero = outcome(host, reader, kind, 0.0)
        assert all(tensor.isfinite().all() for tensor in zero)
        assert not zero[1][HIDDEN].any()  # the gradient of the features
        for odd in ODD:
            got = outcome(host, reader, kind, odd)
            assert len(got) == len(zero)
            assert all(torch.equal(a, b) for a, b in zip(got, zero, strict=True))
    with torch.no_grad():  # other kernels run
        bare, *others = [forward(host, reader, kind, odd) for odd in (0.0, *ODD)]
        assert all(torch.equal(other, bare) for other in others)


EXACT = {k: v for k, v in READERS.items() if not k.startswith(("map", "attempt"))}


@pytest.mark.filterwarnings("ignore:a router of this host learns")
@pytest.mark.parametrize("reader", EXACT.values(), ids=EXACT)
def test_an_example_without_any_is_left_as_it_was(reader: Reader) -> None:
    """Tokens before a text change how its sums are rounded, and are not among these."""
    host = made(reader, "bert")
    words = host.model.get_input_embeddings().weight  # type: ignore[operator]
    for training in (True, False):
        host.train(training)
        for odd in (0.0, *ODD):
            results = []
            for modules in ("m", None):
                host.zero_grad()
                torch.manual_seed(5)
                given = {"side": {reader.source: mg.Side(features(reader, odd), ~HIDDEN)}}
                out = host(**HOSTS["bert"].batch(), **given, modules=modules).logits[1]
                out.square().sum().backward()
                results.append((out.detach(), words.grad.clone()))
                grads = [p.grad for p in host.implants.parameters() if p.grad is not None]
                assert not any(grad.any() for grad in grads)
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("form", ["paper", "released"])
def test_activations_of_an_example_without_any_reach_no_gradient(form: str) -> None:
    host = mg.Host(torch.nn.Sequential(torch.nn.Linear(5, 16)))
    host.implant("m", mg.GatedFusion(dim=FEATURES, form=form), "0")  # type: ignore[arg-type]
    found = []
    for odd in (0.0, *ODD):
        x = torch.randn(BATCH, 4, 5, generator=torch.Generator().manual_seed(6))
        x[1] = odd
        x.requires_grad_()
        host.zero_grad()
        out = host(x, side={"image": side()})
        out[[0, 2]].square().sum().backward()
        found.append([out[[0, 2]].detach(), x.grad, *(p.grad for p in host["m"].parameters())])
    for other in found[1:]:
        for got, zero in zip(other, found[0], strict=True):
            assert got is not None
            assert torch.equal(got, zero)


def test_a_side_input_is_tensors() -> None:
    for wrong in ([[1.0]], None, torch.ones(2, 3), torch.ones(2, 3, 4, dtype=torch.long)):
        with pytest.raises(mg.ModgraftError, match=r"floating-point tensor \[batch, m, d\], got"):
            mg.Side(wrong)  # type: ignore[arg-type]
    assert mg.Side(
        torch.ones(2, 3, 4, device="meta"), torch.ones(2, 3, dtype=torch.bool)
    ).mask.is_meta  # type: ignore[union-attr]
    for mask in ([[True]], torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(mg.ModgraftError, match=r"bool \[2, 3\] .*, got"):
            mg.Side(torch.ones(2, 3, 4), mask)  # type: ignore[arg-type]
