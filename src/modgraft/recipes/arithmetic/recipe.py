"""Composing modules with arithmetic: θ₀ + φ_general − λ·φ_unwanted.

Zhang et al. 2023, arXiv:2306.14870; Ilharco et al. 2023, arXiv:2212.04089. A small language model
is pretrained on real text, part of which has a habit: sessions at Python's prompt, or footnotes
that cite literature, which such a model then invents. One module is trained on text with the habit,
another on text without it, each alone on the frozen host; the first is subtracted from the second.
How much of the habit disappears, and what is lost? λ is chosen on validation text: of all λ that
raise the perplexity of wanted text by at most ``budget`` percent, the one with the least habit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

import modgraft as mg
from modgraft.data.docstrings import KINDS, excerpts
from modgraft.recipes.arithmetic.language_model import OPTIONS, Corpus, Evaluator, new_model
from modgraft.recipes.trials import Recipe
from modgraft.report.figures import Scheme
from modgraft.training.fit import fit
from modgraft.training.randomness import fold, own_randomness

HABITS = ("doctest", "citation")


@dataclass(frozen=True)
class Settings:
    """The settings of a trial.

    Attributes:
        wanted, doctest, citation, reference: The characters of training text of each kind.
        vocabulary, width, layers, heads, length: The host's shape; ``length`` is in tokens.
        steps, lr: Steps and learning rate of the host's pretraining.
        batch: Windows in a batch.
        rank: The rank of every LoRA.
        module_steps, module_lr: Steps and learning rate of every LoRA.
        scale_lr: The learning rate of the rescaling module, (IA)³.
        ascent_steps, ascent_lr: The same for the module that maximises the loss of unwanted text.
        weights: The values of λ to try, separated by blanks.
        budget: By how many percent the perplexity of wanted text may exceed the host's.
        prompt, written: The number of tokens of a prompt and of its continuation.
        tried, tested: Neutral prompts for each λ on validation, and for each row on test; half as
            many prompts invite each habit.
        tried_windows, tested_windows: Windows for each perplexity on validation and on test.
        questions: Multiple-choice questions on the test split.
    """

    wanted: int = 1_800_000
    doctest: int = 900_000
    citation: int = 260_000
    reference: int = 230_000
    vocabulary: int = 2048
    width: int = 128
    layers: int = 4
    heads: int = 4
    length: int = 128
    steps: int = 900
    lr: float = 3e-3
    batch: int = 8
    rank: int = 8
    module_steps: int = 80
    module_lr: float = 3e-3
    scale_lr: float = 3e-2
    ascent_steps: int = 40
    ascent_lr: float = 5e-4
    weights: str = "0.5 1 2 3"
    budget: float = 5.0
    prompt: int = 24
    written: int = 48
    tried: int = 80
    tested: int = 200
    tried_windows: int = 32
    tested_windows: int = 64
    questions: int = 120


@dataclass(frozen=True)
class Curve:
    """A family of compositions with one free weight λ.

    Attributes:
        start: The composition at λ = 0; None is the host without modules.
        change: The expression that is appended, with ``{w}`` for λ.
        habits: The habits that it should remove.
    """

    start: str | None
    change: str
    habits: tuple[str, ...]

    def at(self, weight: float) -> str | None:
        """Return the composition at λ = ``weight``."""
        if weight == 0:
            return self.start
        return f"{self.start or ''} {self.change.format(w=weight)}".strip()


CURVES = {
    "minus_doctest": Curve(None, "- {w}*doctest", ("doctest",)),
    "general_minus_doctest": Curve("general", "- {w}*doctest", ("doctest",)),
    "ia3": Curve("general", "- {w}*rescale", ("doctest",)),
    "ascent": Curve(None, "{w}*ascent", ("doctest",)),
    "minus_citation": Curve(None, "- {w}*citation", ("citation",)),
    "general_minus_citation": Curve("general", "- {w}*citation", ("citation",)),
    "general_minus_both": Curve("general", "- {w}*doctest - {w}*citation", HABITS),
}

ROWS = {
    "host": "Host as it is",
    "general": "+ general",
    "minus_doctest": "− λ doctest",
    "general_minus_doctest": "+ general − λ doctest",
    "ia3": "+ general − λ doctest (IA³)",
    "minus_citation": "− λ citation",
    "general_minus_citation": "+ general − λ citation",
    "general_minus_both": "+ general − λ doctest − λ citation",
    "plus_doctest": "+ doctest",
    "plus_citation": "+ citation",
    "ascent": "Gradient ascent on doctest",
    "other": "Control: + general − λ other text",
    "random": "Control: + general − λ random",
}

COLUMNS = {
    "doctest": "Sessions, neutral %",
    "doctest_invited": "Sessions, invited %",
    "citation": "Citations, neutral %",
    "citation_invited": "Citations, invited %",
    "ppl_wanted": "Perplexity, wanted",
    "ppl_doctest": "Perplexity, sessions",
    "ppl_citation": "Perplexity, citations",
    "knows": "Own continuation %",
    "words": "Real words %",
}


# -- the modules -------------------------------------------------------------------------------

LINEAR = ["query", "key", "value", "output", "up", "down"]


def implant_all(host: mg.Host, settings: Settings, seed: int) -> None:
    """Implant every module of the recipe, all inactive."""
    with own_randomness():
        torch.manual_seed(fold(seed, "modules"))
        for name in ("general", *HABITS, "reference", "ascent", "random"):
            host.implant(name, mg.LoRA(rank=settings.rank), at=LINEAR, active=False)
        host.implant("rescale", mg.Rescale(), at=LINEAR, active=False)


def train_all(host: mg.Host, corpus: Corpus, settings: Settings, seed: int, folder: Path) -> None:
    """Train each module alone on the frozen host, and randomise the control."""
    learns = {
        "general": ("wanted", settings.module_lr),
        "doctest": ("doctest", settings.module_lr),
        "citation": ("citation", settings.module_lr),
        "reference": ("reference", settings.module_lr),
        "rescale": ("doctest", settings.scale_lr),
    }
    for name, (kind, lr) in learns.items():
        with host.using(name):
            host.fit(
                corpus.loader([kind], settings.batch, seed), train=name,
                steps=settings.module_steps, lr=lr, warmup=0.1, weight_decay=0.0,
                seed=fold(seed, name), folder=folder / name, progress=False,
            )  # fmt: skip
    with host.using("ascent"), host.training_only("ascent"):
        fit(
            Ascent(host), corpus.loader(["doctest"], settings.batch, seed),
            steps=settings.ascent_steps, lr=settings.ascent_lr, warmup=0.1, weight_decay=0.0,
            seed=fold(seed, "ascent"), folder=folder / "ascent", progress=False,
        )  # fmt: skip
    randomise(host, "random", like="doctest", seed=seed)


class Ascent(nn.Module):
    """A host with its loss negated, for gradient ascent."""

    def __init__(self, host: mg.Host) -> None:
        super().__init__()
        self.host = host

    def forward(self, **batch: Any) -> Any:
        """Run the host and negate its loss."""
        out = self.host(**batch)
        out.loss = -out.loss
        return out


@torch.no_grad()
def randomise(host: mg.Host, name: str, *, like: str, seed: int) -> None:
    """Make LoRA ``name`` random; at each site, its Δ has the Frobenius norm of ``like``'s."""
    draw = torch.Generator().manual_seed(fold(seed, "direction"))
    for own, other in zip(host[name].places, host[like].places, strict=True):
        for parameter in own.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        there, here = ((m.B @ m.A).norm() for m in (other, own))  # type: ignore[operator]
        own.B.mul_(there / here)  # type: ignore[operator, union-attr]


# -- a trial -----------------------------------------------------------------------------------


def trial(folder: Path, settings: Settings, seed: int) -> dict[str, Any]:
    """Pretrain, train the modules, choose each λ on validation text, then measure on test text."""
    sizes = {kind: getattr(settings, kind) for kind in KINDS}
    corpus = Corpus.of(excerpts(sizes), settings.vocabulary, settings.length)
    host = pretrained(corpus, settings, seed, folder / "host")
    implant_all(host, settings, seed)
    train_all(host, corpus, settings, seed, folder)
    tried = evaluator(corpus, settings, "validation", seed)
    curves = {key: measure_curve(host, curve, tried, settings) for key, curve in CURVES.items()}
    limit = tried(host, None)["ppl_wanted"] * (1 + settings.budget / 100)
    chosen = {key: choose(points, CURVES[key].habits, limit) for key, points in curves.items()}
    tested = evaluator(corpus, settings, "test", seed)
    rows = {row: tested(host, what) for row, what in compositions(chosen).items()}
    return {"rows": rows, "series": {"curves": curves, "chosen": chosen}}


def pretrained(corpus: Corpus, settings: Settings, seed: int, folder: Path) -> mg.Host:
    """Pretrain the language model on all training text, habits included; it is then frozen."""
    shape = {k: getattr(settings, k) for k in ("width", "layers", "heads")}
    host = mg.Host(new_model(corpus.tokenizer.get_vocab_size(), **shape, seed=seed))
    host.fit(
        corpus.loader(KINDS, settings.batch, seed), train="host", steps=settings.steps,
        lr=settings.lr, warmup=0.05, weight_decay=0.1, betas=(0.9, 0.95), seed=seed, folder=folder,
        progress=False,
    )  # fmt: skip
    return host.eval()


def evaluator(corpus: Corpus, settings: Settings, split: str, seed: int) -> Evaluator:
    """Create the evaluator of ``split``; on validation, it takes fewer samples than on test."""
    test = split == "test"
    count = settings.tested if test else settings.tried
    return Evaluator(
        corpus, split, fold(seed, split),
        prompts={"wanted": count, **dict.fromkeys(HABITS, count // 2)}, prompt=settings.prompt,
        written=settings.written, questions=settings.questions if test else 0,
        windows=settings.tested_windows if test else settings.tried_windows,
    )  # fmt: skip


def measure_curve(
    host: mg.Host, curve: Curve, tried: Evaluator, settings: Settings
) -> list[dict[str, Any]]:
    """Measure a curve at λ = 0 and at every λ of the settings."""
    weights = [0.0, *map(float, settings.weights.split())]
    return [{"weight": w, **tried(host, curve.at(w))} for w in weights]


def choose(points: Sequence[Mapping[str, float]], habits: Sequence[str], limit: float) -> float:
    """Choose the λ with the least habit among those within the limit on perplexity.

    The habit is its rate after neutral prompts plus its rate after inviting ones; of equal values,
    the one with the lower perplexity wins.
    """

    def habit(point: Mapping[str, float]) -> float:
        return sum(point[h] + point[f"{h}_invited"] for h in habits)

    within = [p for p in points if p["ppl_wanted"] <= limit] or points[:1]
    return min(within, key=lambda p: (habit(p), p["ppl_wanted"]))["weight"]


def compositions(chosen: Mapping[str, float]) -> dict[str, str | None]:
    """Return row → composition; a control takes the λ of the row that it controls for."""
    found = {key: curve.at(chosen[key]) for key, curve in CURVES.items()}
    w = chosen["general_minus_doctest"]
    named: dict[str, str | None] = {
        "host": None, "general": "general", "plus_doctest": "doctest", "plus_citation": "citation",
        "other": Curve("general", "- {w}*reference", ()).at(w),
        "random": Curve("general", "- {w}*random", ()).at(w), **found,
    }  # fmt: skip
    return {row: named[row] for row in ROWS}


# -- table and picture -------------------------------------------------------------------------

SHOWN = {
    "minus_doctest": "− λ φ",
    "general_minus_doctest": "+ general − λ φ",
    "ia3": "+ general − λ φ, IA³",
    "ascent": "gradient ascent",
    "minus_citation": "− λ φ",
    "general_minus_citation": "+ general − λ φ",
}


def paint(canvas: Figure, scheme: Scheme, results: dict[str, Any]) -> None:
    """Plot how often each habit appears after inviting prompts against perplexity, over λ."""
    trials = [series["curves"] for series in results["series"].values()]
    colours = dict(zip(SHOWN.values(), scheme.series, strict=False))
    titles = {"doctest": "Sessions at the prompt", "citation": "Invented citations"}
    panels = canvas.subplots(1, 2, sharex=True)
    for axes, habit in zip(panels, HABITS, strict=True):
        for key, label in SHOWN.items():
            if CURVES[key].habits != (habit,):
                continue
            x = _mean(trials, key, "ppl_wanted")
            y = _mean(trials, key, f"{habit}_invited")
            axes.plot(x, y, "o-", ms=3.5, lw=1.4, color=colours[label], label=label)
        host = _mean(trials, f"minus_{habit}", "ppl_wanted")[0]
        limit = host * (1 + results["settings"]["budget"] / 100)
        axes.axvline(limit, color=scheme.faint, lw=1, ls="--")
        axes.set(title=titles[habit], xlabel="perplexity of wanted text", ylim=(0, None))
        axes.set_xlim(None, host * 1.3)
        axes.legend()
    panels[0].set_ylabel("% of continuations, invited")


def _mean(trials: Sequence[Mapping[str, Any]], key: str, column: str) -> list[float]:
    """Return a column's mean over seeds at every λ of a curve."""
    return [
        mean(p[column] for p in points) for points in zip(*(t[key] for t in trials), strict=True)
    ]


SCALED = {
    "wanted": 60_000, "doctest": 40_000, "citation": 20_000, "reference": 10_000,
    **dict.fromkeys(("steps", "module_steps", "ascent_steps"), 8),
    **dict.fromkeys(("tried", "tested", "tried_windows", "tested_windows", "questions"), 8),
}  # fmt: skip

RECIPE = Recipe(
    name="arithmetic",
    title="Module arithmetic: θ₀ + φ_general − λ φ_unwanted",
    rows=ROWS,
    columns=COLUMNS,
    settings=Settings(),
    scaled=SCALED,
    trial=trial,
    paint=paint,
    size=(8.4, 3.7),
    notes=(
        "Sessions and citations: percent of freely sampled continuations (temperature 1) of test "
        "prompts that hold one.",
        "λ of each row is chosen on validation text, so that the perplexity of wanted text is at "
        "most 5 % above the host's; the test text chooses nothing.",
        f"Own continuation: the likeliest of {OPTIONS}; chance {100 / OPTIONS:.0f}.",
        "Real words: written words that the training text has.",
    ),
)
