"""A GPT of characters: counted, naive and fast, on one text.

How much of what a language model learns could be counted, and how fast can the rest be learned? On
one text and one split there are: tables of counts (:mod:`.counting`); the naive GPT
(:mod:`.naive`, in nanoGPT's published setting for a CPU); and a fast one, which is
:class:`modgraft.models.gpt.GPT` with what speeds it up, trained by Muon:

- **tables of pairs, triples and quadruples** beside the token's own vector. What follows a short
  context is most of what there is to learn at first; a table learns it as fast as it is seen, and a
  row costs nothing until its n-gram comes. They are learned by gradients as all else is.
- **rotary positions, RMS norms, squared ReLU**: each a little better or cheaper than what it
  replaces.
- **projections that start at zero**, so that each block is the identity at first and the tables
  learn undisturbed.
- **Muon** for the matrices of the blocks, where they are many and the budget is long.

A fast model is trained twice: until it is as good as the naive one, and about as long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from modgraft.data.corpus import split
from modgraft.data.shards import Windows
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.recipes.chargpt.counting import Counts
from modgraft.recipes.chargpt.naive import NaiveGPT
from modgraft.recipes.chargpt.sampling import writer, written
from modgraft.recipes.language import Text, curve, mean_loss, parameters, row
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
        width, heads, layers: The naive GPT's shape.
        steps, lr: Its steps and learning rate.
        orders: The n of the n-grams that are counted, at most.
        short_steps, long_steps: Steps of the fast GPT until it is as good as the naive one, and
            about as long; their shapes are :data:`SHAPES`.
        small_short_steps, small_long_steps: The same for the small one.
    """

    corpus: str = ""
    bpe: int = 0
    length: int = 64
    batch: int = 12
    width: int = 128
    heads: int = 4
    layers: int = 4
    steps: int = 2000
    lr: float = 1e-3
    orders: int = 5
    short_steps: int = 120
    long_steps: int = 3000
    small_short_steps: int = 400
    small_long_steps: int = 4000


@dataclass(frozen=True)
class Shape:
    """The shape of a fast GPT.

    Attributes:
        width, layers, heads: of the blocks.
        rows: of the tables of pairs, of triples, …
        lr: the peak learning rate.
    """

    width: int
    layers: int
    rows: tuple[int, ...]
    lr: float
    heads: int = 4


SHAPES = {
    "fast_short": Shape(64, 1, (4356, 65536, 131072), 0.02),
    "fast_long": Shape(128, 2, (4356, 16384, 32768), 0.01),
    "small_short": Shape(64, 2, (4356, 4096), 0.01),
    "small_long": Shape(64, 2, (4356, 4096), 0.01),
}
"""Row → the shape of its model. Few layers where the budget is short; "small" has no more
parameters than the naive GPT."""

ROWS = {
    "uniform": "Every token alike",
    "bigram": "Pairs, counted",
    "ngram": "Up to {n} tokens, counted",
    "naive": "Naive GPT",
    "fast_short": "Fast GPT, until as good",
    "fast_long": "Fast GPT, about as long",
    "small_short": "Small fast GPT, until as good",
    "small_long": "Small fast GPT, about as long",
}

COLUMNS = {
    "loss": "Loss, nats a token",
    "bits": "Bits a byte",
    "seconds": "Seconds",
    "share": "% of the naive's",
    "parameters": "Parameters, M",
}


# -- models ----------------------------------------------------------------------------------------


def naive_gpt(text: Text, settings: Settings) -> NaiveGPT:
    """Make the naive GPT."""
    s = settings
    return NaiveGPT(text.vocabulary, s.length, s.width, s.heads, s.layers)


def fast_gpt(text: Text, settings: Settings, shape: Shape) -> GPT:
    """Make a fast GPT."""
    config = GPTConfig(
        vocab_size=text.vocabulary,
        max_position_embeddings=settings.length,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        positions="rotary",
        norm="rms",
        activation="relu2",
        bias=False,
        tie_word_embeddings=False,
        zero_start=True,
        ngram_rows=shape.rows,
        use_cache=False,
    )
    return GPT(config)


def trainings(text: Text, s: Settings) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Yield each row that is trained: its key, its model, and the settings of `fit`."""
    adamw = {"betas": (0.9, 0.99), "weight_decay": 0.1, "schedule": "cosine", "warmup": 0.05}
    yield "naive", naive_gpt(text, s), adamw | {"steps": s.steps, "lr": s.lr}
    muon = {"optimizer": "muon", "betas": (0.9, 0.99), "weight_decay": 0.1, "warmup": 0.05}
    for key, shape in SHAPES.items():
        steps = getattr(s, f"{key.removeprefix('fast_')}_steps")
        yield key, fast_gpt(text, s, shape), muon | {"steps": steps, "lr": shape.lr}


# -- a trial -----------------------------------------------------------------------------------


def trial(folder: Path, settings: Settings, seed: int) -> dict[str, Any]:
    """Count, train and test everything on one text; the seed is of weights and windows."""
    text = Text.read(settings.corpus, settings.bpe)
    folder.mkdir(parents=True, exist_ok=True)
    text.tokenizer.save(str(folder / "tokenizer.json"))
    rows = dict(counted(text, settings))
    series: dict[str, Any] = {}
    windows = Windows(text.training, settings.length, seed)
    with own_randomness():
        torch.manual_seed(seed)
        models = list(trainings(text, settings))
    for key, model, given in models:
        history = fit(
            model, windows.loader(settings.batch), seed=seed, folder=folder / key,
            save_every=max(1, given["steps"] // 2), progress=False, note=False, **given,
        )  # fmt: skip
        found = mean_loss(model, text.test, settings.length)
        rows[key] = row(text, found, history.seconds, parameters(model))
        series[key] = curve(history)
        if isinstance(model, GPT):
            model.save_pretrained(folder / key / "model")
    for key in series:
        rows[key]["share"] = 100 * rows[key]["seconds"] / rows["naive"]["seconds"]
    return {"rows": rows, "series": series}


def counted(text: Text, settings: Settings) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield what counting gives; how much a shorter context is worth is chosen on training text."""
    yield "uniform", row(text, math.log(text.vocabulary))
    for key, order in (("bigram", 2), ("ngram", settings.orders)):
        learned, held = split(text.training)
        tried = {w: Counts(learned, text.vocabulary, order, w).loss(held) for w in (1, 4, 16, 64)}
        began = time.perf_counter()
        counts = Counts(text.training, text.vocabulary, order, min(tried, key=tried.__getitem__))
        took = time.perf_counter() - began
        yield key, row(text, counts.loss(text.test), took)


# -- picture ---------------------------------------------------------------------------------------

SHOWN = {"naive": "naive", "fast_long": "fast", "small_long": "small fast"}


def paint(canvas: Figure, scheme: Scheme, results: Mapping[str, Any]) -> None:
    """Plot the training loss against seconds, and what counting gives on the test part."""
    axes = canvas.subplots()
    for (key, label), colour in zip(SHOWN.items(), scheme.series, strict=False):
        for i, series in enumerate(results["series"].values()):
            x, y = zip(*series[key], strict=True)
            axes.plot(x, y, lw=1.4, color=colour, alpha=1 if i == 0 else 0.4,
                      label=label if i == 0 else None)  # fmt: skip
    for key in ("bigram", "ngram"):
        level = float(np.mean([found["loss"] for found in results["rows"][key].values()]))
        axes.axhline(level, color=scheme.faint, lw=1, ls="--")
        axes.annotate(RECIPE.rows[key], (1, level), (-4, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", color=scheme.faint)  # fmt: skip
    axes.set(xscale="log", xlabel="seconds", ylabel="loss, nats a token")
    axes.legend()


def sample(folder: Path, text: str, **how: Any) -> Iterator[str]:
    """Yield what the fast GPT of a run's first seed writes after a text; see `written`."""
    return written(*writer(folder), text, **how)


RECIPE = Recipe(
    name="chargpt",
    title="A GPT of characters: counted, naive, fast",
    rows={key: title.format(n=Settings.orders) for key, title in ROWS.items()},
    columns=COLUMNS,
    settings=Settings(),
    scaled={
        "steps": 20, "short_steps": 10, "long_steps": 20, "small_short_steps": 10,
        "small_long_steps": 20,
    },
    trial=trial,
    paint=paint,
    sample=sample,
    size=(7.2, 4.0),
    formats={"loss": ".3f", "bits": ".3f", "share": ".2f", "parameters": ".2f"},
    notes=(
        "The loss is over all of the last 10 % of the text.",
        "Seconds are of training alone, on one thread.",
    ),
)  # fmt: skip
