"""Where the examples lie is found for each tensor by itself, or a call is refused."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import modgraft as mg
from modgraft.core.errors import CompositionError

EACH = ["a", None, "b"]
Run = Callable[..., Any]


class Net(nn.Module):
    """Two layers, run as a function tells."""

    def __init__(self, go: Run | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l1, self.l2 = nn.Linear(4, 5), nn.Linear(5, 2)
        self.go = go or Net.plain

    def plain(self, x: Tensor) -> Tensor:
        return self.l2(torch.tanh(self.l1(x)))

    def time_first(self, x: Tensor) -> Tensor:
        return self.l2(torch.tanh(self.l1(x)).cumsum(0))

    def forward(self, x: Any, *more: Any, **named: Any) -> Any:
        return self.go(self, x, *more, *named.values())


def stirred(net: nn.Module) -> mg.Host:
    host = mg.Host(net.double()).eval()
    for name in "ab":
        host.implant(name, mg.LoRA(rank=2), at=["l1", "l2"], active=False)
    generator = torch.Generator().manual_seed(1)
    for parameter in host.implants.parameters():
        nn.init.normal_(parameter, 0, 0.3, generator=generator)
    return host


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def check(host: mg.Host, *args: Any, dim: int = 0) -> None:
    """Each example comes out as it does where all of them have its composition."""
    own = [host(*args, modules=m).select(dim, i) for i, m in enumerate(EACH)]
    torch.testing.assert_close(host(*args, modules=EACH), torch.stack(own, dim))


SQUARE = randn(3, 3, 4)


@pytest.mark.parametrize("length", [3, 5])
def test_each_tensor_has_an_axis_of_its_own(length: int) -> None:
    net = Net(lambda s, x, p: s.plain(s.e(x, src_key_padding_mask=p)))
    net.e = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
    check(stirred(net), randn(length, 3, 4), torch.zeros(3, length, dtype=torch.bool), dim=1)

    net = Net(lambda s, x, c: s.l2(s.r(s.l1(x), c)[0].transpose(0, 1).cumsum(0)).transpose(0, 1))
    net.r = nn.GRU(5, 5, batch_first=True)
    check(stirred(net), randn(3, length, 4), randn(1, 3, 5))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("length", [3, 5])
def test_a_tensor_may_belong_to_all_examples(length: int, first: bool) -> None:
    """A causal mask [n, n], and positions [n, d], with as many steps as examples."""
    net = Net(lambda s, x, m: s.plain(s.e(x, src_mask=m, is_causal=True)))
    net.e = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=first)
    mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    x = randn(3, length, 4) if first else randn(length, 3, 4)
    check(stirred(net), x, mask, dim=0 if first else 1)
    if first:
        check(stirred(Net(lambda s, x, p: s.plain(x + p))), x, randn(length, 4))
        check(stirred(Net(lambda s, x, p: s.plain(x * p[:, None]))), x, randn(length))


@torch.no_grad()
def test_an_eye_that_sees_more_pictures_than_texts_has_no_examples_first() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    text = {
        "model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    eye = {
        "model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=eye, image_token_index=98)
    host = mg.Host(LlavaForConditionalGeneration(config)).eval()
    host.implant("a", mg.LoRA(rank=2), at="vision.query", active=False)
    host.implant("b", mg.LoRA(rank=2), at="query", active=False)
    for parameter in host.implants.parameters():
        parameter.normal_(0, 0.3)
    ids = torch.randint(3, 90, (3, 12))
    for row, pictures in enumerate((2, 1, 0)):  # three in all
        ids[row, : 4 * pictures] = 98
    batch = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 16, 16)}
    with pytest.raises(mg.ModgraftError, match=r"vision_tower.*has no axis of the examples"):
        host(**batch, modules=["a", None, None])
    each = host(**batch, modules=["b", None, "b"]).logits
    for i, module in enumerate(("b", None, "b")):
        torch.testing.assert_close(each[i], host(**batch, modules=module).logits[i])


@torch.no_grad()
def test_two_encoders_that_are_compared_have_their_examples_first() -> None:
    def run(net: Net, x: Tensor, z: Tensor) -> Tensor:
        return net.plain(x).mean(1) @ net.l2(net.l1(z)).mean(1).T  # [B, B]

    host = stirred(Net(run))
    x, z = randn(3, 5, 4), randn(3, 6, 4)
    each = host(x, z, modules=EACH)
    for i, one in enumerate(EACH):
        for j, other in enumerate(EACH):
            f, g = (host.merge(m) if m else host.merge(None) for m in (one, other))
            wanted = f.plain(x[i : i + 1]).mean(1) @ g.l2(g.l1(z[j : j + 1])).mean(1).T
            torch.testing.assert_close(each[i, j], wanted[0, 0])


class Uncopied:
    def __init__(self, x: Tensor) -> None:
        object.__setattr__(self, "x", x)

    def __setattr__(self, *_: Any) -> None:
        raise AttributeError("frozen")

    def __copy__(self) -> Any:
        raise TypeError("never")


class Itself(Uncopied):
    def __copy__(self) -> Any:
        return self


class Weak:
    __slots__ = ("__weakref__", "x")

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Circle:
    def __init__(self, x: Tensor) -> None:
        self.x, self.me = x, [self]


@pytest.mark.parametrize("way", [Uncopied, Itself, Weak, Circle, lambda x: deque([x])])
def test_whatever_holds_the_batch(way: Callable[[Tensor], Any]) -> None:
    given = way(SQUARE.clone())

    def run(net: Net, batch: Any) -> Tensor:
        return net.time_first(batch[0] if isinstance(batch, deque) else batch.x)

    check(stirred(Net(run)), given, dim=1)
    if not isinstance(given, deque):
        assert torch.equal(given.x, SQUARE)
        assert not stirred(Net(lambda s, x: s.plain(x.x))).probe({"x": given}).faults


def test_what_a_host_writes_to_is_written_to_by_the_call_alone() -> None:
    class Cache:
        k: Tensor | None = None

    def run(net: Net, x: Tensor, cache: Any) -> Tensor:
        y = net.l1(x)
        cache.k = y if cache.k is None else torch.cat([cache.k, y], 1)
        return net.l2(cache.k.sum(1))

    cache = Cache()
    with torch.no_grad():
        stirred(Net(run))(SQUARE, cache, modules=EACH)
    assert cache.k is not None
    assert cache.k.shape == (3, 3, 5)

    cache = Cache()
    stirred(Net(run)).probe({"x": SQUARE, "cache": cache})
    assert cache.k is None


def test_what_is_not_told_by_a_host_of_ones_own_is_refused() -> None:
    net = Net(lambda s, x, g: s.time_first(x))
    net.b = BertModel(
        BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8,
        )
    )  # fmt: skip
    with pytest.raises(CompositionError, match="called with a Generator, which can be read once"):
        stirred(net)(SQUARE, torch.Generator(), modules=EACH)
    counts = stirred(Net(lambda s, x, n: s.plain(x) * torch.ones(n, 1)))
    with pytest.raises(CompositionError, match=r"some of these: Runt.*\(it is called with int"):
        counts(randn(3, 4), 3, modules=EACH)


def test_numbers_of_numpy_are_told_apart() -> None:
    host = stirred(Net(lambda s, x, c: s.time_first(x) if c else s.plain(x).cumsum(1)))
    check(host, SQUARE, np.bool_(True), dim=1)
    check(host, SQUARE, np.bool_(False))


def test_other_functions_are_asked_anew() -> None:
    host = stirred(Net(lambda s, x, pre: pre(s.plain(pre(x)).cumsum(1))))
    check(host, SQUARE, lambda t: t)
    check(host, SQUARE, lambda t: t.transpose(0, 1), dim=1)


@pytest.mark.parametrize("warm", [torch.zeros_like(SQUARE), SQUARE[:, :1].expand(3, 3, 4) * 0 + 1])
def test_a_batch_of_equal_examples_shows_nothing_for_others(warm: Tensor) -> None:
    host = stirred(Net(Net.time_first))
    with torch.no_grad():
        host(warm, modules=EACH)
    check(host, SQUARE, dim=1)


@torch.no_grad()
def test_a_list_of_outputs_is_of_examples_or_refused() -> None:
    host = stirred(Net(lambda s, xs: [s.plain(x) for x in xs]))
    xs = [randn(3, 4) for _ in EACH]
    for given in (xs, deque(xs)):
        with pytest.raises(CompositionError, match="either may be the examples"):
            host(given, modules=EACH)


@torch.no_grad()
def test_a_host_with_what_cannot_be_copied() -> None:
    import threading

    net = Net()
    net.lock = threading.Lock()
    host, x = stirred(net), randn(3, 4)
    check(host, x)
    merged = host.merge("a")
    torch.testing.assert_close(merged(x), host(x, modules="a"))
    assert merged.lock is net.lock


@torch.no_grad()
def test_a_model_whose_forward_holds_on_to_it_is_not_copied() -> None:
    net = Net()
    old = net.forward
    net.forward = lambda x: 2 * old(x)
    host = stirred(net)
    for copied in (lambda: host.merge("a"), lambda: copy.deepcopy(host)):
        with pytest.raises(mg.ModgraftError, match="the model cannot be copied, as a merge does"):
            copied()


@torch.no_grad()
def test_a_compiled_part_is_copied() -> None:
    net = Net()
    net.before = torch.compile(nn.Linear(4, 4), backend="eager")
    net.go = lambda s, x: s.plain(s.before(x))
    host, x = stirred(net), randn(3, 4)
    wanted = host(x, modules="a")
    torch.testing.assert_close(host.merge("a")(x), wanted)
    torch.testing.assert_close(copy.deepcopy(host)(x, modules="a"), wanted)
