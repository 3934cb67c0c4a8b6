"""A BERT whose words belong to three topics, and modules each trained on one topic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

import modgraft as mg

TOPICS, WORDS, WIDTH = 3, 12, 32


def bert() -> mg.Host:
    """Make the host; the embeddings of a topic's words share one direction."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=TOPICS * WORDS, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.2)
        table: Any = model.get_input_embeddings()
        common = torch.nn.functional.normalize(torch.randn(TOPICS, WIDTH), dim=-1)
        table.weight.normal_(0, 0.3).add_(3 * common.repeat_interleave(WORDS, 0))
    return mg.Host(model).eval()


def texts(topic: int, count: int, seed: int, rows: int = 16) -> list[dict[str, Tensor]]:
    """Make batches of one topic; the label of a word is the word topic + 1 places after it."""
    generator = torch.Generator().manual_seed(1000 * topic + seed)
    made = []
    for _ in range(count):
        word = torch.randint(0, WORDS, (rows, 6), generator=generator)
        answer = topic * WORDS + (word + topic + 1) % WORDS
        made.append({"input_ids": topic * WORDS + word, "labels": answer})
    return made


def trained(host: mg.Host, modules: dict[str, tuple[mg.Computation, Any]], steps: int) -> None:
    """Implant the modules and train the i-th alone on topic i."""
    for topic, (name, (module, at)) in enumerate(modules.items()):
        torch.manual_seed(topic)
        host.implant(name, module, at, active=False)
        with host.using(name):
            host.fit(texts(topic, 20, seed=1), train=name, steps=steps, lr=1e-2, progress=False)
