"""A text as tokens, and what a language model is worth on it: for the recipes about language."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from modgraft.core.errors import ModgraftError
from modgraft.data.corpus import read_corpus
from modgraft.data.shards import bpe_tokenizer, character_tokenizer, tokens_of


@dataclass(frozen=True)
class Text:
    """A corpus as tokens, and in which bytes they are.

    Attributes:
        tokenizer: what made them.
        training, test: int64 ``[N]``, the first 90 % and the rest.
        bytes_a_token: of the test part.
    """

    tokenizer: Tokenizer
    training: np.ndarray
    test: np.ndarray
    bytes_a_token: float

    @classmethod
    def read(cls, corpus: str, bpe: int) -> Text:
        """Read a corpus; a byte-pair encoding is trained on the first 90 % alone.

        The parts are cut by characters, so that they are the same for every tokenizer.
        """
        text = read_corpus(corpus or None)
        first, rest = text[: (cut := int(0.9 * len(text)))], text[cut:]
        made = bpe_tokenizer(first, bpe) if bpe else character_tokenizer(text)
        training, test = tokens_of(made, first), tokens_of(made, rest)
        return cls(made, training, test, len(rest.encode()) / max(1, len(test)))

    @property
    def vocabulary(self) -> int:
        """The number of tokens."""
        return self.tokenizer.get_vocab_size()


@torch.no_grad()
def mean_loss(model: nn.Module, tokens: np.ndarray, length: int) -> float:
    """Return a model's mean loss over all of ``tokens``, in windows side by side.

    Raises:
        ModgraftError: for fewer tokens than a window and one more.
    """
    count = (len(tokens) - 1) // length
    if count < 1:
        raise ModgraftError(
            f"{len(tokens)} tokens to test on are no window of {length}; give more text, or a "
            f"shorter length"
        )
    read = torch.from_numpy(tokens[: count * length]).view(count, length)
    follows = torch.from_numpy(tokens[1 : count * length + 1]).view(count, length)
    total = 0.0
    for at in range(0, count, 64):
        some = slice(at, at + 64)
        loss = model.eval()(input_ids=read[some], targets=follows[some]).loss
        total += float(loss) * len(read[some])
    return total / count


def row(
    text: Text, loss: float, seconds: float | None = None, count: int | None = None
) -> dict[str, float]:
    """Return the numbers of a row."""
    found = {"loss": loss, "bits": loss / math.log(2) / text.bytes_a_token}
    if seconds is not None:
        found["seconds"] = seconds
    if count is not None:
        found["parameters"] = count / 1e6
    return found


def parameters(model: nn.Module) -> int:
    """Return the number of parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())


def curve(history: Any) -> list[tuple[float, float]]:
    """Return up to 60 pairs of seconds and the mean loss around them."""
    losses = np.array(history.losses)
    cuts = np.array_split(np.arange(len(losses)), min(60, len(losses)))
    each = history.seconds / len(losses)
    return [(round(float((c[-1] + 1) * each), 2), round(float(losses[c].mean()), 4)) for c in cuts]
