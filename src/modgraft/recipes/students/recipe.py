"""Train large, then compress? Small models that all took the same time to make.

A small model can be trained from the start; or a larger one, which learns more in the same steps,
is trained for a part of the time and then made small (Li et al. 2020, arXiv:2002.11794): its
knowledge is taught to a small one (Hinton et al. 2015), or its least important heads and neurons go
and the rest learns on. A third way keeps the small model and gives it experts beside its
feed-forward layers, of which each token has one.

Every row takes as many seconds as the first. How long a step of each takes is measured before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

import modgraft as mg
from modgraft.core.files import read_json, write_json
from modgraft.data.shards import Windows
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.recipes.language import Text, curve, mean_loss, parameters
from modgraft.recipes.students.pruning import narrowed
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
        width, layers: Of the small model.
        large_width, large_layers: Of the large one.
        heads: Of both.
        kept_heads, kept_neurons: What pruning leaves in a block of the large one.
        steps: Steps of the small model from the start, whose seconds all others have too.
        share: The part of the time that the large model is trained before it is made small.
        temperature: τ of distillation.
        experts: The number of experts, and their width.
        expert_width: The width of each.
        lr, large_lr: The learning rates of the small and the large model.
    """

    corpus: str = ""
    length: int = 64
    batch: int = 12
    width: int = 96
    layers: int = 3
    large_width: int = 192
    large_layers: int = 4
    heads: int = 4
    kept_heads: int = 1
    kept_neurons: int = 120
    steps: int = 3000
    share: float = 0.6
    temperature: float = 2.0
    experts: int = 4
    expert_width: int = 48
    lr: float = 4e-3
    large_lr: float = 2e-3


class Distilled(nn.Module):
    """L = ½ CE(x) + ½ τ² KL(p_teacher(τ) ‖ p_student(τ)), a student beside its frozen teacher.

    Hinton, Vinyals & Dean 2015 (arXiv:1503.02531).

    Args:
        student: what learns.
        teacher: what it learns from; it is frozen.
        temperature: τ.
    """

    def __init__(self, student: GPT, teacher: GPT, temperature: float) -> None:
        super().__init__()
        self.student, self.temperature = student, temperature
        self.teacher = teacher.requires_grad_(False)

    def forward(self, input_ids: Tensor, targets: Tensor) -> CausalLMOutput:
        """Predict ``targets`` ``[B, n]``, what comes after each of ``input_ids``."""
        found = self.student(input_ids=input_ids, targets=targets)
        with torch.no_grad():
            taught = self.teacher.eval()(input_ids=input_ids).logits / self.temperature
        said = (found.logits / self.temperature).log_softmax(-1)
        apart = F.kl_div(
            said.flatten(0, 1), taught.log_softmax(-1).flatten(0, 1), reduction="batchmean",
            log_target=True,
        )  # fmt: skip
        loss = 0.5 * found.loss + 0.5 * self.temperature**2 * apart
        return CausalLMOutput(loss=loss, logits=found.logits)


def gpt(text: Text, s: Settings, *, large: bool = False) -> GPT:
    """Make the small model, or the large one."""
    config = GPTConfig(
        vocab_size=text.vocabulary, max_position_embeddings=s.length,
        hidden_size=s.large_width if large else s.width,
        num_hidden_layers=s.large_layers if large else s.layers,
        num_attention_heads=s.heads, positions="rotary", norm="rms", activation="relu2",
        bias=False,
    )  # fmt: skip
    return GPT(config)


def with_experts(model: GPT, s: Settings) -> mg.Host:
    """Implant experts beside the feed-forward layers, of which a router chooses one a token."""
    host = mg.Host(model, freeze=False)
    names = [f"expert{i}" for i in range(s.experts)]
    for name in names:
        host.implant(name, mg.ParallelAdapter(width=s.expert_width), at="feedforward", active=False)
    router = mg.NoisyTopK(1, level="token")
    host.implant("experts", mg.Mixture(names, router=router))
    for name in names:
        host[name].requires_grad_(True)
    return host


@dataclass
class Bench:
    """A text, a seed and a folder in which everything of a trial is trained."""

    text: Text
    settings: Settings
    seed: int
    folder: Path

    def model(self, *, large: bool = False) -> GPT:
        """Make a model, from the trial's seed."""
        with own_randomness():
            torch.manual_seed(self.seed)
            return gpt(self.text, self.settings, large=large)

    def train(self, model: nn.Module, name: str, steps: int, *, large: bool = False) -> History:
        """Train a model; what was trained before under that name is read again."""
        s = self.settings
        return fit(
            model, Windows(self.text.training, s.length, self.seed).loader(s.batch),
            steps=steps, lr=s.large_lr if large else s.lr, optimizer="muon", betas=(0.9, 0.99),
            weight_decay=0.1, warmup=0.05, seed=self.seed, folder=self.folder / name,
            save_every=max(1, steps // 2), progress=False, note=False,
        )  # fmt: skip

    def steps_in(self, model: nn.Module, name: str, seconds: float) -> int:
        """Return how many steps of a model's training take so many seconds.

        That is measured once, on a copy's twenty steps, and kept for a run that is resumed.
        """
        home = self.folder / f"{name}.json"
        if not home.is_file():
            state = {key: value.clone() for key, value in model.state_dict().items()}
            batches = Windows(self.text.training, self.settings.length).loader(self.settings.batch)
            history = fit(model, batches, steps=23, lr=1e-4, optimizer="muon", note=False,
                          progress=False)  # fmt: skip
            model.load_state_dict(state)
            write_json(home, {"step": history.seconds / 23})
        step = read_json(home, what="the seconds of a step", remedy="delete it")["step"]
        return max(1, round(seconds / step))


def trial(folder: Path, settings: Settings, seed: int) -> dict[str, Any]:
    """Make every small model in the same time, and measure it."""
    s, text = settings, Text.read(settings.corpus, 0)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(text, s, seed, folder)
    rows: dict[str, dict[str, float]] = {}
    series: dict[str, Any] = {}

    def add(key: str, model: nn.Module, *histories: History) -> None:
        rows[key] = {
            "loss": mean_loss(model, text.test, s.length),
            "parameters": parameters(model) / 1e6,
            "seconds": sum(history.seconds for history in histories),
            "speed": tokens_a_second(model, s.length),
        }
        series[key] = curve(histories[-1])

    small = bench.model()
    history = bench.train(small, "small", s.steps)
    add("small", small, history)
    seconds = history.seconds

    large = bench.model(large=True)
    steps = bench.steps_in(large, "large_step", seconds)
    add("large", large, bench.train(large, "large", steps, large=True))

    teacher = bench.model(large=True)
    first = bench.train(teacher, "teacher", max(1, round(s.share * steps)), large=True)
    student = bench.model()
    both = Distilled(student, teacher, s.temperature)
    rest = bench.steps_in(both, "distilled_step", seconds - first.seconds)
    add("distilled", student, first, bench.train(both, "distilled", rest))

    measured = Windows(text.training, s.length, seed).loader(s.batch)
    with own_randomness():
        torch.manual_seed(seed)
        cut = narrowed(teacher.requires_grad_(True), s.kept_heads, s.kept_neurons,
                       islice(measured, 20))  # fmt: skip
    rows["cut"] = {
        "loss": mean_loss(cut, text.test, s.length), "parameters": parameters(cut) / 1e6,
    }  # fmt: skip
    rest = bench.steps_in(cut, "pruned_step", seconds - first.seconds)
    add("pruned", cut, first, bench.train(cut, "pruned", rest, large=True))

    experts = with_experts(bench.model(), s)
    steps = bench.steps_in(experts, "experts_step", seconds)
    add("experts", experts, bench.train(experts, "experts", steps))
    return {"rows": rows, "series": series}


@torch.no_grad()
def tokens_a_second(model: Any, length: int) -> float:
    """Return how many tokens a second it writes, one text, with a cache: the best of three."""
    model.eval()
    start, found = torch.zeros(1, 1, dtype=torch.long), []
    count = length - 1
    for _ in range(3):
        began = time.perf_counter()
        model.generate(
            input_ids=start, max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        found.append(count / (time.perf_counter() - began))
    return max(found)


def paint(canvas: Figure, scheme: Scheme, results: Mapping[str, Any]) -> None:
    """Plot each row's loss against its parameters."""
    axes = canvas.subplots()
    for (key, found), colour in zip(results["rows"].items(), _cycle(scheme), strict=False):
        several = list(found.values())
        axes.plot([one["parameters"] for one in several], [one["loss"] for one in several], "o",
                  color=colour, label=RECIPE.rows[key])  # fmt: skip
    axes.set(xlabel="parameters, M", ylabel="loss, nats a character", xscale="log")
    axes.legend(fontsize="small")


def _cycle(scheme: Scheme) -> list[str]:
    return list(scheme.series) * 2


RECIPE = Recipe(
    name="students",
    title="Small models that took the same time to make",
    rows={
        "small": "Small, from the start",
        "large": "Large, for comparison",
        "distilled": "Large, then taught to a small one",
        "cut": "Large, then pruned, before it learns on",
        "pruned": "Large, then pruned",
        "experts": "Small, with experts",
    },
    columns={
        "loss": "Loss, nats a character",
        "parameters": "Parameters, M",
        "seconds": "Seconds of training",
        "speed": "Tokens written a second",
    },
    settings=Settings(),
    scaled={"steps": 20},
    trial=trial,
    paint=paint,
    formats={"loss": ".3f", "parameters": ".2f", "speed": ".0f"},
    notes=("The loss is over all of the last 10 % of the text.",),
)
