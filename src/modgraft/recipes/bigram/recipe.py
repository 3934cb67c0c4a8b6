"""A bigram: the simplest language model, learned by gradients and counted.

It looks at one token and has one row of logits for it. Whatever is learned by gradients there can
be said beforehand: the loss is least where softmax(row) is the share of each next token, and it is
then the conditional entropy of the text, H(x_t | x_{t−1}). A training loop that does not get there
is broken; a larger model is worth what it gets below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from modgraft.data.shards import Windows
from modgraft.recipes.language import Text, curve, mean_loss
from modgraft.recipes.trials import Recipe
from modgraft.report.figures import Scheme
from modgraft.training.fit import fit
from modgraft.training.randomness import own_randomness


@dataclass(frozen=True)
class Settings:
    """The settings of a trial.

    Attributes:
        corpus: The path of a text; "": the source of Python's standard library.
        bpe: The number of byte pairs to make tokens of; 0: characters.
        length, batch: The tokens of a window, and the windows of a step.
        steps, lr: Steps and learning rate.
    """

    corpus: str = ""
    bpe: int = 0
    length: int = 64
    batch: int = 128
    steps: int = 1500
    lr: float = 0.3


class Bigram(nn.Module):
    """P(x_t | x_{t−1}) = softmax(T[x_{t−1}]).

    Args:
        vocabulary: The number of tokens.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        nn.init.zeros_(self.table.weight)  # every token alike

    def forward(self, input_ids: Tensor, targets: Tensor) -> CausalLMOutput:
        """Predict ``targets`` ``[B, n]``, each from its ``input_ids`` ``[B, n]`` alone."""
        logits = self.table(input_ids)  # [B, n, V]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def optimum(tokens: np.ndarray, vocabulary: int) -> float:
    """H(x_t | x_{t−1}) = −Σ p(a b) log p(b | a), in nats: no bigram has a smaller loss."""
    pairs = np.bincount(tokens[:-1] * vocabulary + tokens[1:], minlength=vocabulary**2)
    counts = pairs.reshape(vocabulary, vocabulary).astype(float)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    return float(-(counts * np.log(shares, where=counts > 0, out=shares)).sum() / counts.sum())


def trial(folder: Path, settings: Settings, seed: int) -> dict[str, Any]:
    """Learn the table, and measure it on the text that it learned from and on the rest."""
    text = Text.read(settings.corpus, settings.bpe)
    model, windows = Bigram(text.vocabulary), Windows(text.training, settings.length, seed)
    with own_randomness():
        history = fit(
            model, windows.loader(settings.batch), steps=settings.steps, lr=settings.lr, seed=seed,
            weight_decay=0.0, folder=folder / "bigram", progress=False, note=False,
        )  # fmt: skip
    learned = {
        "training": mean_loss(model, text.training, settings.length),
        "test": mean_loss(model, text.test, settings.length),
        "seconds": history.seconds,
    }
    best = optimum(text.training, text.vocabulary)
    rows = {"uniform": dict.fromkeys(("training", "test"), float(np.log(text.vocabulary)))}
    rows |= {"bigram": learned, "optimum": {"training": best}}
    return {"rows": rows, "series": {"bigram": curve(history), "optimum": best}}


def paint(canvas: Figure, scheme: Scheme, results: Mapping[str, Any]) -> None:
    """Plot the training loss against seconds, and the least that a bigram can have."""
    axes = canvas.subplots()
    several = list(results["series"].values())
    for series in several:
        x, y = zip(*series["bigram"], strict=True)
        axes.plot(x, y, lw=1.4, color=scheme.series[0])
    least = several[0]["optimum"]  # of the text, whatever the seed
    axes.axhline(least, color=scheme.faint, lw=1, ls="--")
    axes.annotate("H(x_t | x_{t−1})", (1, least), (-4, 3), ha="right",
                  xycoords=("axes fraction", "data"), textcoords="offset points",
                  color=scheme.faint)  # fmt: skip
    axes.set(xlabel="seconds", ylabel="loss, nats a token")


RECIPE = Recipe(
    name="bigram",
    title="A bigram, learned and counted",
    rows={"uniform": "Every token alike", "bigram": "Learned", "optimum": "Least possible"},
    columns={"training": "Loss, training", "test": "Loss, the rest", "seconds": "Seconds"},
    settings=Settings(),
    scaled={"steps": 20},
    trial=trial,
    paint=paint,
    formats={"training": ".3f", "test": ".3f"},
    notes=("Losses are in nats a token, over all of the first 90 % of the text and of the rest.",),
)
