"""Hosts in which the numbers of a batch decide whose rows are which, and those where they do not.

What was found for one batch says nothing of the next there: a composition for each example is right
for every batch, or refused. The reference is an ordinary model with the weights of each composition
(`host.merge`), called with each example alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    T5Config,
)

import modgraft as mg
from modgraft.engine.placing import placed_by_values
from modgraft.engine.twin import SITE, twin_of

NAMES = ("l", "m")


def hosted(model: nn.Module, at: str) -> mg.Host:
    host = mg.Host(model).eval()
    for name in NAMES:
        host.implant(name, mg.LoRA(rank=2), at=at, active=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0, 0.3)
    return host


class Base(nn.Module):
    """A host with one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)


class Unpadded(Base):
    """Computes only where its mask says."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[mask] = self.a(x[mask])
        return out


class Cut(Base):
    """Reads the lengths as numbers, and computes on what is not padding in one row."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1).tolist()
        y = self.a(torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]))
        out = torch.zeros_like(x)
        for i, part in enumerate(y.split(lengths)):
            out[i, : len(part)] = part
        return out


class Sorted(Base):
    """Computes on its examples in another order, the longest first."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=True, stable=True)
        y = self.a(x[order])
        return y[order.argsort()] * mask[..., None]


def lengths(*counts: int) -> Tensor:
    return torch.arange(4)[None] < torch.tensor(counts)[:, None]


BATCHES = [(2, 2, 2, 2, 2), (3, 1, 2, 2, 2), (1, 3, 2, 1, 3), (2, 3, 1, 2, 2), (1, 1, 4, 3, 1)]


@pytest.mark.parametrize("kind", [Unpadded, Cut, Sorted])
@pytest.mark.parametrize("first", range(len(BATCHES)))
@pytest.mark.parametrize("weighted", [False, True])
def test_each_batch_is_right_whichever_came_before(kind, first, weighted):
    host, given = hosted(kind(), "a"), ["l", "m", "m", "l", "m"]
    composition: Any = given
    if weighted:
        composition = mg.Weighted(
            NAMES, torch.tensor([[float(n == x) for n in NAMES] for x in given])
        )
    plain = {name: host.merge(name) for name in NAMES}
    x = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(2))
    for counts in (BATCHES[first], *BATCHES):
        mask = lengths(*counts)
        with torch.no_grad():
            got = host(x, mask, modules=composition)
            for i, name in enumerate(given):
                want = plain[name](x[i : i + 1], mask[i : i + 1])
                torch.testing.assert_close(got[i : i + 1], want, rtol=1e-5, atol=1e-5)


def test_so_are_the_gradients():
    host, x = hosted(Unpadded(), "a"), torch.randn(2, 4, 8)
    weight = torch.randn(2, 4, 8)
    host(x, lengths(2, 2), modules=["l", "m"])  # is to tell nothing of the next
    (host(x, lengths(3, 1), modules=["l", "m"]) * weight).sum().backward()
    got = [p.grad.clone() for p in host.implants.parameters()]
    host.zero_grad()
    for i, name in enumerate(NAMES):
        some = slice(i, i + 1)
        (host(x[some], lengths(3, 1)[some], modules=name) * weight[some]).sum().backward()
    for mine, p in zip(got, host.implants.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-5, atol=1e-5)


def test_of_an_order_that_is_given_each_row_has_its_own():
    class Permuted(Base):
        def forward(self, x: Tensor, order: Tensor) -> Tensor:
            return self.a(x[order])  # an example is what an entry of the order names

    host, x, given = hosted(Permuted(), "a"), torch.randn(5, 8), ["l", "m", "m", "l", "m"]
    plain = {name: host.merge(name) for name in NAMES}
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [1, 0, 2, 4, 3]):
        with torch.no_grad():
            got = host(x, torch.tensor(order), modules=given)
            for row, name, place in zip(got, given, order, strict=True):
                torch.testing.assert_close(row[None], plain[name](x, torch.tensor([place])))


# -- pictures, of which a text may have several or none ------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 24}  # fmt: skip


def idefics() -> nn.Module:
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            text_config={"model_type": "llama", "vocab_size": 50, "pad_token_id": 0, **SMALL},
            vision_config={"image_size": 8, "patch_size": 4, **SMALL},
            scale_factor=2, image_token_id=44,
        )
    )  # fmt: skip


def idefics_batch(counts: tuple[int, int]) -> dict[str, Tensor]:
    pixels = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    for row, count in zip(pixels, counts, strict=True):
        row[count:] = 0  # a picture of zeros is none
    ids = torch.tensor([[5] + [44] * k + [7] * (5 - k) for k in counts])
    return {"input_ids": ids, "pixel_values": pixels}


def llava() -> nn.Module:
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **SMALL}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision | {"projection_dim": 16},
            text_config={"model_type": "llama", "vocab_size": 50, **SMALL}, image_token_index=44,
            vision_feature_layer=-1,
        )
    )  # fmt: skip


def llava_batch(counts: tuple[int, int]) -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[5] + [44] * 4 * k + [7] * (10 - 4 * k) for k in counts])
    return {"input_ids": ids, "pixel_values": pixels}


PICTURES = {
    "idefics3": (idefics, idefics_batch, "*vision_model*.{q_proj,v_proj,fc1}"),
    "llava": (llava, llava_batch, "*vision_tower*.{q_proj,v_proj,fc1}"),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("first", [(1, 1), (2, 0), (0, 2)])
def test_pictures_of_several_texts_are_right_or_refused(name, first):
    make, batch, at = PICTURES[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    host = hosted(model, at)
    plain = {n: host.merge(n) for n in NAMES}
    right = 0
    for counts in (first, (1, 1), (2, 0), (0, 2)):
        given = batch(counts)
        try:
            with torch.no_grad():
                got = host(**given, modules=list(NAMES)).logits
        except mg.ModgraftError as error:
            assert "call the host once for each composition" in str(error)  # noqa: PT017
            continue
        right += 1
        with torch.no_grad():
            every = {n: plain[n](**given).logits for n in NAMES}  # both texts by one composition
        for i, n in enumerate(NAMES):
            torch.testing.assert_close(got[i], every[n][i], rtol=1e-4, atol=1e-4)
    assert right or name == "idefics3" or first != (1, 1)


@pytest.mark.parametrize("first", [(1, 1), (2, 0), (0, 2)])
@pytest.mark.parametrize("named", [True, False])
def test_a_prompt_of_pictures_is_continued_right_or_refused(first, named):
    torch.manual_seed(0)
    model = llava().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    host = hosted(model, PICTURES["llava"][2])
    plain = {n: host.merge(n) for n in NAMES}
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
           "output_logits": True, "return_dict_in_generate": True}  # fmt: skip

    def continued(host, counts, **more):
        batch = llava_batch(counts)
        ids = (batch["input_ids"],) if not named else ()
        given = batch if named else {"pixel_values": batch["pixel_values"]}
        return torch.stack(host.generate(*ids, **given, **how, **more).logits)  # [steps, B, V]

    for counts in (first, (1, 1), (2, 0), (0, 2)):
        if counts != (1, 1):
            with pytest.raises(mg.ModgraftError, match="once for each composition"):
                continued(host, counts, modules=list(NAMES))
            continue
        got = continued(host, counts, modules=list(NAMES))
        for i, n in enumerate(NAMES):
            torch.testing.assert_close(
                got[:, i], continued(plain[n], counts)[:, i], rtol=1e-4, atol=1e-4
            )


# -- what is no such host is asked once ------------------------------------------------------------

TEXT = {"vocab_size": 60, "pad_token_id": 0}
HOSTS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: AutoModelForSequenceClassification.from_config(
        BertConfig(**SMALL, **TEXT, num_labels=3)
    ),
    "gpt2": lambda: AutoModelForSequenceClassification.from_config(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, **TEXT, num_labels=3)
    ),
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, **TEXT)),
    "t5": lambda: AutoModelForSeq2SeqLM.from_config(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=60)
    ),
    "mixtral": lambda: AutoModelForCausalLM.from_config(
        MixtralConfig(**SMALL, **TEXT, num_local_experts=4, num_key_value_heads=2)
    ),
}


@pytest.mark.filterwarnings("ignore:linear layers are selected")  # the experts are no layers
@pytest.mark.parametrize("name", HOSTS)
def test_text_lies_where_it_says(name):
    torch.manual_seed(0)
    model = HOSTS[name]().eval()
    host = mg.Host(model)
    host.implant("l", mg.LoRA(rank=2), at=nn.Linear)
    ids = torch.randint(1, 60, (3, 7))
    mask = torch.arange(7)[None] >= torch.tensor([[0], [2], [3]])
    batch = {"input_ids": ids * mask, "attention_mask": mask.long()}
    if name == "t5":
        batch["labels"] = ids[:, :4].contiguous()
    twin = twin_of(model)
    sites = [path for path, layer in twin.named_modules() if SITE in layer.__dict__]
    found = placed_by_values(twin, (), batch, sites)
    assert not found
