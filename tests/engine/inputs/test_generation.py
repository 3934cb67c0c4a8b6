"""What is generated behind a prompt, and what sees the ids meanwhile: the text without tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from engine.inputs.text_hosts import DECODERS, PAD, ids, outside, prompted, writer

NEW = 4
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
# XLNet leaves the mask out when it generates, so that padding changes what it writes
NAMES = [name for name in DECODERS if name != "XLNet"]


def padded() -> dict[str, Tensor]:
    text = ids()
    text[0, :2] = PAD
    return {"input_ids": text, "attention_mask": (text != PAD).long()}


@torch.no_grad()
def by_hand(model: nn.Module, phi: Tensor, text: Tensor) -> Tensor:
    """Return what the bare model writes greedily behind [φ, text], without a cache."""
    for _ in range(NEW):
        logits = model(**outside(model, phi, text, 0)).logits[:, -1]
        logits[:, 1] = -torch.inf  # no end before as many tokens
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    return text[:, -NEW:]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_writes_what_the_bare_host_writes(name: str) -> None:
    host, phi = prompted(writer(name))
    batch, found = padded(), {}
    static = {"cache_implementation": "static"}
    ways = {"cache": {}, "no cache": {"use_cache": False}, "static": static}
    if name == "Falcon":  # takes no static cache with ALiBi
        del ways["static"]
    for way, own in ways.items():
        out = host.generate(**batch, **SETTINGS, **own)
        assert torch.equal(out[:, :7], batch["input_ids"])
        found[way] = out[:, 7:]
    beams = host.generate(**batch, **SETTINGS, num_beams=2, num_return_sequences=2)
    for row, mask in enumerate(batch["attention_mask"]):
        text = batch["input_ids"][row : row + 1, mask == 1]
        alone = host.generate(text, **SETTINGS, num_beams=2, num_return_sequences=2)
        assert torch.equal(beams[2 * row : 2 * row + 2, 7:], alone[:, -NEW:])
        with host.using(None):
            expected = by_hand(host.model, phi, text)
        for way, own in found.items():
            assert torch.equal(own[row : row + 1], expected), way


class Seen:
    """Notes the ids that it is called with, as a processor, a criterion or a streamer."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.ids = answer, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        self.ids.append(input_ids)
        return self.answer(input_ids, scores)

    def put(self, value: Tensor) -> None:
        self.ids.append(value)

    def end(self) -> None:
        self.ids.append(torch.empty(0))


@torch.no_grad()
def test_what_sees_the_ids_sees_the_text() -> None:
    host, _ = prompted(writer("GPT2"))
    processor = Seen(lambda own, scores: scores)
    criterion = Seen(lambda own, scores: torch.zeros(len(own), dtype=torch.bool))
    streamer, words = Seen(None), []
    out = host.generate(
        **padded(), **SETTINGS, return_dict_in_generate=True, logits_processor=[processor],
        stopping_criteria=[criterion], streamer=streamer,
        prefix_allowed_tokens_fn=lambda row, own: words.append(own) or list(range(41)),
    )  # fmt: skip
    whole = out.sequences
    assert torch.equal(whole[:, :7], padded()["input_ids"])
    for step in range(NEW):
        assert torch.equal(processor.ids[step], whole[:, : 7 + step])
        assert torch.equal(criterion.ids[step], whole[:, : 8 + step])
        assert torch.equal(streamer.ids[1 + step], whole[:, 7 + step])
        assert torch.equal(words[3 * step], whole[0, : 7 + step])
    assert torch.equal(streamer.ids[0], whole[:, :7])
    assert not len(streamer.ids[-1])


@torch.no_grad()
def test_lengths_and_repetitions_are_those_of_the_text() -> None:
    host = mg.Host(writer("Phi3")).eval()
    host.implant("p", mg.Prompt(ids=(7, 30)))
    text = ids()
    assert host.generate(text, max_length=10, min_length=10).shape == (3, 10)
    table = host.model.get_input_embeddings()
    joined = {
        "inputs_embeds": torch.cat([table(torch.tensor([[7, 30]] * 3)), table(text)], 1),
        "attention_mask": torch.ones(3, 9, dtype=torch.long),
    }
    for own in ({"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}):
        ours = host.generate(text, **SETTINGS, **own)
        # transformers' processors see these ids alone, and the host the embeddings
        expected = host.generate(text, **joined, modules=None, **SETTINGS, **own)
        assert torch.equal(ours, expected)
    embedded = host.generate(inputs_embeds=table(text), **SETTINGS)
    assert torch.equal(embedded, host.generate(text, **SETTINGS)[:, 7:])
    looked = host.generate(text[:1], **SETTINGS, prompt_lookup_num_tokens=2)
    assert torch.equal(looked, host.generate(text[:1], **SETTINGS))
    with pytest.raises(mg.ModgraftError, match=r"assistant_model=.*leave it out"):
        host.generate(text[:1], assistant_model=writer("Phi3"))
