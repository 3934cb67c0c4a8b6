"""A soft prompt beside examples in the text (instruction prompt tuning), against either alone.

A language model may learn a task from examples in its text, or from a soft prompt that is trained
on them; or from both (Singhal et al. 2022, arXiv:2212.13138; Sun et al. 2023, arXiv:2302.11521).
Which examples are shown matters: some that are like what is asked, or some that are not.

The host is a GPT that learned to read examples: it was trained on texts of many tasks, each with
labels of its own, in which the examples before say what the next label is. The task of a trial is
one that it has not seen, with some things to train on and all others to test on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import modgraft as mg
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.recipes.instruction_prompt_tuning.tasks import (
    THINGS,
    VALUES,
    VOCABULARY,
    WIDTH,
    Task,
    Thing,
    row,
    similar,
    unlike,
)
from modgraft.recipes.trials import Recipe
from modgraft.report.figures import Scheme
from modgraft.training.fit import fit
from modgraft.training.randomness import own_randomness


@dataclass(frozen=True)
class Settings:
    """The settings of a trial.

    Attributes:
        width, heads, layers: The GPT's shape.
        shown: How many things a text of its training has.
        host_steps, host_batch, host_lr: Its training.
        things: How many things of the task are trained on; the rest is tested on.
        examples: How many examples are shown before what is asked.
        prompt: The length of the soft prompt.
        steps, batch, lr: Of the soft prompts' training.
    """

    width: int = 96
    heads: int = 4
    layers: int = 3
    shown: int = 16
    host_steps: int = 4000
    host_batch: int = 32
    host_lr: float = 3e-3
    things: int = 24
    examples: int = 4
    prompt: int = 8
    steps: int = 300
    batch: int = 24
    lr: float = 3e-2


class Texts(Dataset[dict[str, Tensor]]):
    """Texts of random tasks: text i is that of the i-th task, whose labels are all asked for.

    Args:
        count: how many there are.
        shown: the things in each.
        seed: of the tasks.
    """

    def __init__(self, count: int, shown: int, seed: int) -> None:
        self.count, self.shown, self.seed = count, shown, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = random.Random(f"{self.seed} {index}")
        return row(Task.draw(rng), [], [rng.choice(THINGS) for _ in range(self.shown)])


Chooser = Callable[[Thing, Sequence[Thing], int, random.Random], list[Thing]]
CHOOSERS: dict[str, Chooser | None] = {"none": None, "similar": similar, "unlike": unlike}
"""Which examples are shown → what chooses them."""


def rows_of(
    task: Task, asked: Sequence[Thing], known: Sequence[Thing], count: int,
    choose: Chooser | None, rng: random.Random,
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """Yield a text for each thing that is asked for, with examples among those known."""
    for thing in asked:
        examples = choose(thing, known, count, rng) if choose else []
        yield row(task, examples, [thing])


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Make a batch of texts of several lengths, padded on the right."""
    longest = max(len(r["input_ids"]) for r in rows)

    def padded(name: str, value: int) -> Tensor:
        return torch.stack(
            [torch.nn.functional.pad(r[name], (0, longest - len(r[name])), value=value)
             for r in rows]
        )  # fmt: skip

    return {"input_ids": padded("input_ids", 0), "targets": padded("targets", -100)}


def reader(folder: Path, s: Settings, seed: int) -> GPT:
    """Train the GPT that reads examples."""
    config = GPTConfig(
        vocab_size=VOCABULARY, max_position_embeddings=s.shown * WIDTH + s.prompt,
        hidden_size=s.width, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        positions="rotary", norm="rms", activation="relu2", bias=False, use_cache=False,
    )  # fmt: skip
    with own_randomness():
        torch.manual_seed(seed)
        model = GPT(config)
    texts = Texts(s.host_steps * s.host_batch, s.shown, seed)
    fit(
        model, DataLoader(texts, s.host_batch), steps=s.host_steps, lr=s.host_lr, seed=seed,
        optimizer="muon", betas=(0.9, 0.99), warmup=0.05, folder=folder,
        save_every=max(1, s.host_steps // 4), progress=False, note=False,
    )  # fmt: skip
    return model.eval()


@torch.no_grad()
def accuracy(host: mg.Host, rows: Sequence[dict[str, Tensor]]) -> float:
    """Return the percentage of right labels, among all tokens that could come."""
    batch = collate(rows)
    asked = batch["targets"] != -100
    found = host.eval()(**batch).logits.argmax(-1)
    return 100 * float((found[asked] == batch["targets"][asked]).float().mean())


def trial(folder: Path, settings: Settings, seed: int) -> dict[str, Any]:
    """Train a host, and on it a soft prompt without examples, with like ones and with unlike."""
    s, rng = settings, random.Random(f"task {seed}")
    host = mg.Host(reader(folder / "host", s, seed))
    task, things = Task.draw(rng), rng.sample(THINGS, len(THINGS))
    known, unseen = things[: s.things], things[s.things :]
    rows = {}
    for key, choose in CHOOSERS.items():

        def texts(
            asked: Sequence[Thing], part: str, choose: Any = choose
        ) -> list[dict[str, Tensor]]:
            own = random.Random(f"{part} {seed}")
            return list(rows_of(task, asked, known, s.examples, choose, own))

        test = texts(unseen, "test")
        rows[f"context_{key}"] = {"accuracy": accuracy(host, test)}
        name = f"prompt_{key}"
        with own_randomness():
            torch.manual_seed(seed)
            host.implant(name, mg.SoftPrompt(s.prompt), active=False)
        train = [one for i in range(8) for one in texts(known, f"train {i}")]  # other examples
        loader = DataLoader(train, s.batch, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
        with host.using(name):
            history = host.fit(
                loader, train=name, steps=s.steps, lr=s.lr, weight_decay=0.0, seed=seed,
                folder=folder / name, progress=False, note=False,
            )  # fmt: skip
            rows[name] = {"accuracy": accuracy(host, test), "loss": history.losses[-1]}
    return {"rows": rows, "series": {}}


def paint(canvas: Figure, scheme: Scheme, results: Mapping[str, Any]) -> None:
    """Draw each seed's accuracy, by what the host was given."""
    axes = canvas.subplots()
    for i, key in enumerate(RECIPE.rows):
        several = [found["accuracy"] for found in results["rows"][key].values()]
        colour = scheme.series[key.startswith("prompt")]
        axes.plot([i] * len(several), several, "o", alpha=0.6, color=colour)
        axes.plot([i - 0.25, i + 0.25], [sum(several) / len(several)] * 2, color=colour)
    titles = [title.replace(", ", ",\n") for title in RECIPE.rows.values()]
    axes.set_xticks(range(len(titles)), titles, fontsize="small")
    axes.axhline(100 / VALUES, color=scheme.faint, lw=1, ls="--")
    axes.set(ylabel="accuracy, %", ylim=(0, 103))


RECIPE = Recipe(
    name="instruction_prompt_tuning",
    title="A soft prompt beside examples, and either alone",
    rows={
        "context_none": "Neither",
        "context_similar": "Examples, similar",
        "context_unlike": "Examples, unlike",
        "prompt_none": "Prompt",
        "prompt_similar": "Prompt, and similar",
        "prompt_unlike": "Prompt, and unlike",
    },
    columns={"accuracy": "Accuracy, %", "loss": "Last training loss"},
    settings=Settings(),
    scaled={"host_steps": 20, "steps": 5},
    trial=trial,
    paint=paint,
    formats={"loss": ".3f"},
    notes=(
        "A seed is of the host, its task, what is trained on, and the prompts.",
        "An eighth is chance.",
    ),
)
