"""Lion and Muon against AdamW at equal compute, each at its best learning rate.

A comparison of optimisers is one of learning rates, unless each has its own. So each one's rate is
searched for first, on a grid of powers of two about what is usual for it, by the loss on a part of
the training text that is not learned; a best rate at the end of the grid moves the grid on. Then
each trains on the whole training text twice: with the same steps, and with the same seconds, which
are fewer steps where a step takes longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from modgraft.core.errors import ModgraftError
from modgraft.data.corpus import split
from modgraft.data.shards import Windows
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.recipes.language import Text, curve, mean_loss
from modgraft.recipes.trials import Recipe
from modgraft.report.figures import Scheme
from modgraft.training.fit import fit
from modgraft.training.history import History
from modgraft.training.randomness import own_randomness


@dataclass(frozen=True)
class Settings:
    """The settings of a trial.

    Attributes:
        corpus: The path of a text; "": the source of Python's standard library.
        length, batch: The tokens of a window, and the windows of a step.
        width, heads, layers: The GPT's shape.
        search_steps: Steps of each training of the search.
        steps: Steps of AdamW's last training; the others have as many, and as many seconds.
    """

    corpus: str = ""
    length: int = 64
    batch: int = 12
    width: int = 128
    heads: int = 4
    layers: int = 2
    search_steps: int = 300
    steps: int = 1200


@dataclass(frozen=True)
class Kind:
    """An optimiser of the comparison.

    Attributes:
        title: of its row.
        rate: where its grid begins.
        weight_decay: λ; Lion's is larger as its rate is smaller (Chen et al. 2023).
        betas: of its moments.
    """

    title: str
    rate: float
    weight_decay: float
    betas: tuple[float, float]


KINDS = {
    "adamw": Kind("AdamW", 2**-8, 0.1, (0.9, 0.99)),
    "lion": Kind("Lion", 2**-11, 1.0, (0.9, 0.99)),
    "muon": Kind("Muon, AdamW for the rest", 2**-7, 0.1, (0.9, 0.99)),
}


def gpt(text: Text, settings: Settings) -> GPT:
    """Make the GPT that all train."""
    config = GPTConfig(
        vocab_size=text.vocabulary, max_position_embeddings=settings.length,
        hidden_size=settings.width, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, positions="rotary", norm="rms", activation="relu2",
        bias=False, use_cache=False,
    )  # fmt: skip
    return GPT(config)


def search(losses: Any, rate: float) -> dict[float, float]:
    """Find the best learning rate among powers of two: three about ``rate``, and on from there.

    Args:
        losses: learning rate → loss.
        rate: where to begin.

    Returns:
        Each rate that was tried → its loss; the best has a worse one on each side.

    Raises:
        ModgraftError: where ten of them have no such best.
    """
    tried = {by: losses(by) for by in (rate / 2, rate, 2 * rate)}
    while (best := min(tried, key=tried.__getitem__)) in (min(tried), max(tried)):
        if len(tried) == 10:
            raise ModgraftError(f"no learning rate from {min(tried):g} to {max(tried):g} is best")
        on = best / 2 if best == min(tried) else 2 * best
        tried[on] = losses(on)
    return tried


def trial(folder: Path, settings: Settings, seed: int) -> dict[str, Any]:
    """Search each one's learning rate, and train with it."""
    s, text = settings, Text.read(settings.corpus, 0)
    learned, held = split(text.training)

    def train(
        kind: str, name: str, tokens: np.ndarray, lr: float, steps: int
    ) -> tuple[GPT, History]:
        with own_randomness():
            torch.manual_seed(seed)
            model = gpt(text, s)
        history = fit(
            model, Windows(tokens, s.length, seed).loader(s.batch), steps=steps, lr=lr,
            optimizer=kind, betas=KINDS[kind].betas, weight_decay=KINDS[kind].weight_decay,
            warmup=0.05, seed=seed, folder=folder / name, save_every=max(1, steps // 2),
            progress=False, note=False,
        )  # fmt: skip
        return model, history

    rows: dict[str, dict[str, float]] = {}
    series: dict[str, Any] = {"search": {}}
    seconds = 0.0  # of AdamW's last training
    for kind, given in KINDS.items():

        def held_loss(rate: float, kind: str = kind) -> float:
            model, _ = train(kind, f"{kind}_{rate:g}", learned, rate, s.search_steps)
            return mean_loss(model, held, s.length)

        tried = search(held_loss, given.rate)
        series["search"][kind] = sorted(tried.items())
        rate = min(tried, key=tried.__getitem__)
        model, history = train(kind, kind, text.training, rate, s.steps)
        rows[kind] = {
            "rate": 1e3 * rate, "milliseconds": 1e3 * history.seconds / s.steps,
            "loss": mean_loss(model, text.test, s.length),
        }  # fmt: skip
        steps = s.steps
        if seconds:
            steps = max(1, round(steps * seconds / history.seconds))
            model, history = train(kind, f"{kind}_timed", text.training, rate, steps)
        seconds = seconds or history.seconds
        rows[kind] |= {"timed_steps": steps, "timed_loss": mean_loss(model, text.test, s.length)}
        series[kind] = curve(history)
    return {"rows": rows, "series": series}


def paint(canvas: Figure, scheme: Scheme, results: Mapping[str, Any]) -> None:
    """Plot the search, and the loss against seconds."""
    left, right = canvas.subplots(1, 2)
    for (kind, given), colour in zip(KINDS.items(), scheme.series, strict=False):
        for i, series in enumerate(results["series"].values()):
            style = {"lw": 1.4, "color": colour, "alpha": 1 if i == 0 else 0.4}
            left.plot(*zip(*series["search"][kind], strict=True), "o-", ms=3, **style)
            label = given.title if i == 0 else None
            right.plot(*zip(*series[kind], strict=True), label=label, **style)
    left.set(xscale="log", xlabel="learning rate", ylabel="loss on held-out training text")
    right.set(xlabel="seconds", ylabel="training loss", xscale="log")
    right.legend()


RECIPE = Recipe(
    name="optimizers",
    title="AdamW, Lion and Muon at equal compute",
    rows={key: kind.title for key, kind in KINDS.items()},
    columns={
        "rate": "Learning rate, 10⁻³",
        "milliseconds": "Milliseconds a step",
        "loss": "Loss, equal steps",
        "timed_steps": "Steps, equal time",
        "timed_loss": "Loss, equal time",
    },
    settings=Settings(),
    scaled={"search_steps": 10, "steps": 20},
    trial=trial,
    paint=paint,
    size=(9.0, 3.6),
    formats={"rate": ".3f", "loss": ".3f", "timed_steps": ".0f", "timed_loss": ".3f"},
    notes=(
        "The loss is over all of the last 10 % of the text, in nats a character.",
        "The rate is chosen on a tenth of the training text that is left out.",
    ),
)
