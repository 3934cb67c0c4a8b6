"""A larger code book and fewer tokens, or a smaller one and more tokens?

A text is the same text in characters and in byte pairs (Sennrich et al. 2016): a larger code book
has fewer tokens to say it, each of which says more. What that is worth is asked twice, of a GPT for
each code book:

- **at equal parameters**: all models have as many numbers. What a code book takes for its vectors,
  which are the head too, the blocks do not have, so that they are narrower. All read the text as
  often.
- **at equal time**: each goes on until it has taken the seconds that the first one took.

Losses of unlike tokens cannot be compared; bits a byte can: the loss of a token, divided by the
bytes it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from modgraft.data.shards import Windows
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.recipes.language import Text, mean_loss, parameters, row
from modgraft.recipes.trials import Recipe
from modgraft.report.figures import Scheme
from modgraft.training.fit import fit
from modgraft.training.randomness import own_randomness


@dataclass(frozen=True)
class Settings:
    """The settings of a trial.

    Attributes:
        corpus: The path of a text; "": the source of Python's standard library.
        length, batch: The tokens of a window, and the windows of a step.
        size: About how many parameters each model has.
        heads, layers: Their shape; the width follows from the size.
        passes: How often each reads the text, at equal parameters.
        lr: The learning rate.
    """

    corpus: str = ""
    length: int = 64
    batch: int = 12
    size: int = 800_000
    heads: int = 4
    layers: int = 2
    passes: float = 1.5
    lr: float = 2e-3


BOOKS = {"characters": 0, "bpe256": 256, "bpe512": 512, "bpe1024": 1024, "bpe2048": 2048,
         "bpe4096": 4096}  # fmt: skip
"""Row → the number of byte pairs; 0 are characters."""


def width_of(vocabulary: int, settings: Settings) -> int:
    """Return the width d at which V d + 12 L d² is nearest to the size: a multiple of 2 a head."""
    each, v = 12 * settings.layers, vocabulary
    exact = (math.sqrt(v * v + 4 * each * settings.size) - v) / (2 * each)
    step = 2 * settings.heads  # rotary positions turn pairs
    return max(step, round(exact / step) * step)


def entropy(tokens: np.ndarray) -> float:
    """−Σ p log₂ p over the code book, in bits a token: what the next one says by itself."""
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(p * np.log2(p)).sum())


def gpt(text: Text, settings: Settings) -> GPT:
    """Make the GPT of a code book."""
    config = GPTConfig(
        vocab_size=text.vocabulary, max_position_embeddings=settings.length,
        hidden_size=width_of(text.vocabulary, settings), num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, positions="rotary", norm="rms", activation="relu2",
        bias=False, use_cache=False,
    )  # fmt: skip
    return GPT(config)


def trained(
    text: Text, settings: Settings, seed: int, folder: Path, steps: int
) -> tuple[GPT, float]:
    """Train a code book's GPT, and return it with the seconds that it took."""
    with own_randomness():
        torch.manual_seed(seed)
        model = gpt(text, settings)
    history = fit(
        model, Windows(text.training, settings.length, seed).loader(settings.batch), steps=steps,
        lr=settings.lr, optimizer="muon", betas=(0.9, 0.99), weight_decay=0.1, warmup=0.05,
        seed=seed, folder=folder, save_every=max(1, steps // 2), progress=False, note=False,
    )  # fmt: skip
    return model, history.seconds


def trial(folder: Path, settings: Settings, seed: int) -> dict[str, Any]:
    """Train a GPT for each code book twice, and measure it on the same last tenth of the text."""
    rows: dict[str, dict[str, float]] = {}
    seconds = 0.0  # of the first row, which all have at equal time
    for key, pairs in BOOKS.items():
        text = Text.read(settings.corpus, pairs)
        count = len(text.training)

        def bits(model: GPT, text: Text = text) -> float:
            return row(text, mean_loss(model, text.test, settings.length))["bits"]

        steps = max(1, round(settings.passes * count / settings.length / settings.batch))
        model, took = trained(text, settings, seed, folder / key, steps)
        found = {
            "tokens": text.vocabulary,
            "characters": len(text.tokenizer.decode(text.training.tolist())) / count,
            "entropy": entropy(text.training),
            "width": model.config.hidden_size,
            "parameters": parameters(model) / 1e6,
            "steps": steps, "seconds": took, "bits": bits(model),
        }  # fmt: skip
        if seconds:
            steps = max(1, round(steps * seconds / took))
            model, took = trained(text, settings, seed, folder / f"{key}_timed", steps)
        seconds = seconds or took
        rows[key] = found | {"timed_steps": steps, "timed_seconds": took, "timed_bits": bits(model)}
    series = {name: [rows[key][name] for key in BOOKS] for name in SHOWN}
    return {"rows": rows, "series": series}


SHOWN = {"bits": "equal parameters", "timed_bits": "equal time"}
"""Column of the picture → its name there."""


def paint(canvas: Figure, scheme: Scheme, results: Mapping[str, Any]) -> None:
    """Plot bits a byte against the size of the code book."""
    axes = canvas.subplots()
    for (key, label), colour in zip(SHOWN.items(), scheme.series, strict=False):
        for i, series in enumerate(results["series"].values()):
            axes.plot(range(len(BOOKS)), series[key], "o-", lw=1.4, ms=4, color=colour,
                      alpha=1 if i == 0 else 0.4, label=label if i == 0 else None)  # fmt: skip
    axes.set_xticks(range(len(BOOKS)), [title.split(",")[0] for title in RECIPE.rows.values()])
    axes.set(ylabel="bits a byte")
    axes.legend()


RECIPE = Recipe(
    name="code_book",
    title="Characters or byte pairs: few kinds of tokens, or few tokens",
    rows={key: f"{pairs} byte pairs" if pairs else "characters" for key, pairs in BOOKS.items()},
    columns={
        "tokens": "Tokens there are",
        "characters": "Characters a token",
        "entropy": "Entropy, bits a token",
        "width": "Width",
        "parameters": "Parameters, M",
        "steps": "Steps",
        "seconds": "Seconds",
        "bits": "Bits a byte",
        "timed_steps": "Steps, equal time",
        "timed_seconds": "Seconds, equal time",
        "timed_bits": "Bits a byte, equal time",
    },
    settings=Settings(),
    scaled={"size": 20_000},
    trial=trial,
    paint=paint,
    formats={
        "tokens": ".0f", "characters": ".2f", "entropy": ".2f", "width": ".0f", "bits": ".3f",
        "parameters": ".2f", "steps": ".0f", "timed_steps": ".0f", "timed_bits": ".3f",
    },
    notes=(
        "Bits a byte are over the same last 10 % of the text for all.",
        "A window has as many tokens for all, so that a larger code book also sees more text.",
    ),
)  # fmt: skip
