"""Several texts packed into a row: each has its tokens before it, as in a row of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import modgraft as mg
from engine.inputs.text_hosts import LENGTH, drawn, ids, prompted, writer

CLOSE: dict[str, Any] = {"atol": 3e-5, "rtol": 1e-4}
ROWS = ((3, 4), (1, 2, 4))  # the lengths of the texts in each row


def positions() -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ROWS])


def pieces(rows: Tensor) -> list[Tensor]:
    """Return the texts ``[1, n, …]`` of packed rows ``[B, T, …]``."""
    split = [row[None].split(lengths, dim=1) for row, lengths in zip(rows, ROWS, strict=True)]
    return [text for row in split for text in row]


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "Phi3", "Qwen3Moe", "Gemma3", "GPTJ"])
def test_each_text_is_what_it_is_in_a_row_of_its_own(name: str) -> None:
    host, _ = prompted(writer(name))
    host.implant("q", mg.SoftPrompt(length=2, bound=1.0))
    text, own = ids(2), positions()
    by_embeddings = {"inputs_embeds": host.model.get_input_embeddings()(text)}  # type: ignore[operator]
    for call in ({"input_ids": text}, by_embeddings):
        for modules in ("m", "q >> m", None):
            packed = host(**call, position_ids=own, use_cache=False, modules=modules).logits
            assert packed.shape[:2] == text.shape
            for got, one in zip(pieces(packed), pieces(text), strict=True):
                torch.testing.assert_close(got, host(one, modules=modules).logits, **CLOSE)


@torch.no_grad()
def test_each_row_has_its_own_prompt() -> None:
    host, _ = prompted(writer("Phi3"))
    host.implant("q", mg.SoftPrompt(length=LENGTH, bound=1.0))
    text = ids(2)
    packed = host(text, position_ids=positions(), use_cache=False, modules=["q", "m"]).logits
    for i, (got, one) in enumerate(zip(pieces(packed), pieces(text), strict=True)):
        want = host(one, modules="q" if i < len(ROWS[0]) else "m").logits
        torch.testing.assert_close(got, want, **CLOSE)
    with pytest.raises(mg.ModgraftError, match="a row of its own"):
        host(text, position_ids=positions(), use_cache=False, modules=["q >> m", "m"])


def test_the_loss_and_its_gradient_are_those_of_the_texts() -> None:
    host, phi = prompted(writer("Phi3"))
    text, own = ids(2), positions()
    labels = text.masked_fill(own == 0, -100)  # as DataCollatorWithFlattening has them
    packed = host(text, labels=labels, position_ids=own, use_cache=False).loss
    (got,) = torch.autograd.grad(packed, phi)
    alone = [
        host(one, labels=label).loss * (label != -100).sum()
        for one, label in zip(pieces(text), pieces(labels), strict=True)
        if (label != -100).any()
    ]
    (want,) = torch.autograd.grad(sum(alone, torch.zeros(())) / (labels != -100).sum(), phi)
    torch.testing.assert_close(got, want)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    for kwargs in ({"position_ids": own, "use_cache": False}, {}):
        one = host(text, labels=labels, shift_labels=shifted, **kwargs).loss
        torch.testing.assert_close(one, host(text, labels=labels, **kwargs).loss)


@torch.no_grad()
def test_the_logits_that_are_asked_for() -> None:
    host, _ = prompted(writer("Phi3"))
    call: dict[str, Any] = {"input_ids": ids(2), "position_ids": positions(), "use_cache": False}
    whole = host(**call).logits
    torch.testing.assert_close(host(**call, logits_to_keep=2).logits, whole[:, -2:])
    some = host(**call, logits_to_keep=torch.tensor([0, 3])).logits
    torch.testing.assert_close(some, whole[:, [0, 3]])


@torch.no_grad()
def test_positions_in_four_dimensions() -> None:
    rope: Any = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = tf.Qwen2VLTextConfig(
        vocab_size=41, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope,
    )  # fmt: skip
    host, _ = prompted(drawn(tf.Qwen2VLTextModel(config)))
    text, own = ids(2), torch.stack([positions() * step for step in (1, 1, 2, 3)])

    def run(text: Tensor, own: Tensor) -> Tensor:
        return host(input_ids=text, position_ids=own, use_cache=False).last_hidden_state

    packed = run(text, own)
    places = pieces(own.permute(1, 2, 0))  # [1, n, 4] each
    for got, one, at in zip(pieces(packed), pieces(text), places, strict=True):
        torch.testing.assert_close(got, run(one, at.permute(2, 0, 1)), **CLOSE)


@torch.no_grad()
def test_a_mask_keeps_a_row_together() -> None:
    """Such a host lets the texts of a row see each other, and the row has one prompt."""
    host, phi = prompted(writer("Phi3"))
    text, own = ids(2), positions()
    mask = torch.ones_like(text)
    got = host(text, position_ids=own, attention_mask=mask, use_cache=False).logits
    embeddings = host.model.get_input_embeddings()(text)  # type: ignore[operator]
    whole: dict[str, Any] = {
        "inputs_embeds": torch.cat([phi.expand(2, -1, -1), embeddings], 1),
        "position_ids": torch.cat([torch.arange(LENGTH).expand(2, -1), own + LENGTH], 1),
        "attention_mask": torch.ones(2, 10),
    }
    want = host(**whole, use_cache=False, modules=None).logits[:, LENGTH:]
    torch.testing.assert_close(got, want, **CLOSE)


@torch.no_grad()
def test_what_cannot_be_told_is_refused() -> None:
    host, _ = prompted(writer("GPT2"))  # of 24 positions
    call: dict[str, Any] = {"position_ids": positions(), "use_cache": False}
    with pytest.raises(mg.ModgraftError, match="leave them out: position_ids"):
        host(ids(2), **call, cu_seq_lens_q=torch.tensor([0, 3, 7]))
    long = torch.cat([torch.arange(22), torch.arange(3)])[None]
    with pytest.raises(mg.ModgraftError, match="24 positions"):
        host(ids(1, 25), position_ids=long, use_cache=False)
    fits = torch.cat([torch.arange(20), torch.arange(20)])[None]  # 40 in all, 23 with tokens each
    assert host(ids(1, 40), position_ids=fits, use_cache=False).logits.shape[1] == 40


def test_compiled_code_stops_at_packed_texts() -> None:
    host, _ = prompted(writer("GPT2"))
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    one = torch.arange(7).expand(2, -1)
    want = host(ids(2), position_ids=one, use_cache=False).logits
    got = compiled(ids(2), position_ids=one, use_cache=False).logits
    torch.testing.assert_close(got, want, **CLOSE)
    with pytest.raises(RuntimeError, match="packed texts"):
        compiled(ids(2), position_ids=positions(), use_cache=False)
