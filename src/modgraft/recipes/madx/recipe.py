"""MAD-X: train a task module in one language, and swap the language module to use it in another.

Pfeiffer et al. 2020, arXiv:2005.00052. A multilingual host is frozen. Each language has a module,
here at the embeddings, trained to fill in masked words of that language. The task module, in the
layers, is trained in English while English's module is active; at test, the module of another
language takes its place. In Ansell et al. 2022, arXiv:2110.07560, both modules are sparse changes
of the weights, and are added. The task: what is this the name of?
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

import modgraft as mg
from modgraft.data.cldr import KINDS
from modgraft.models.bag import Bag
from modgraft.recipes.madx.data import Corpus
from modgraft.recipes.trials import Recipe
from modgraft.report.figures import Scheme


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        known: The languages that the host is pretrained on; the task is trained in the first.
        targets: The languages that neither the host nor the task module has seen.
        vocab: The number of tokens.
        width, layers: The host's shape.
        batch: Lines, or names, in a batch.
        steps_host, lr_host: Steps and learning rate of the host's pretraining.
        reduction_language, reduction_task: Reductions of the adapters; MAD-X takes 2 and 16.
        steps_language, lr_language: Steps and learning rate of a language's adapters.
        steps_task, lr_task: Steps and learning rate of the task's adapters.
        density: The share of the weights that a sparse module changes.
        steps_sparse, lr_sparse: Steps and learning rate of each of its two training phases.
        lr_full: The learning rate of fine-tuning the whole host, which takes ``steps_task``.
        names: The most English names of each kind that the task is trained on.
    """

    known: str = "en de fr it es sv pl cs"
    targets: str = "eu fi hu"
    vocab: int = 2500
    width: int = 128
    layers: int = 2
    batch: int = 128
    steps_host: int = 2000
    lr_host: float = 3e-3
    reduction_language: int = 1
    reduction_task: int = 4
    steps_language: int = 200
    lr_language: float = 3e-3
    steps_task: int = 60
    lr_task: float = 2e-3
    density: float = 0.3
    steps_sparse: int = 120
    lr_sparse: float = 5e-3
    lr_full: float = 1e-3
    names: int = 100


ROWS = {
    "stack": "Stacked, the right language: `fi >> kind`",
    "stack_source": "Stacked, English's left in: `en >> kind`",
    "stack_wrong": "Stacked, another unseen language's",
    "stack_none": "Stacked, no language module at test",
    "task": "Task adapter alone, trained so",
    "sum": "Sparse, the right language: `fi + kind`",
    "sum_source": "Sparse, English's left in: `en + kind`",
    "sum_wrong": "Sparse, another unseen language's",
    "sum_none": "Sparse, no language module at test",
    "sum_task": "Sparse task module alone, trained so",
    "full": "The whole host fine-tuned in English",
    "chance": "Chance",
}

COLUMNS = {
    "en": "English",
    "unseen": "Unseen languages",
    "named": "named in text",
    "hidden": "hidden from it",
    "eu": "Basque",
    "fi": "Finnish",
    "hu": "Hungarian",
}

WORDS, LAYERS = "table", "blocks.*.norm"
WEIGHTS = ["blocks.*.up", "blocks.*.down"]

Composed = Callable[[str | None], str]
"""Language, or None for no language module → its composition with the task module."""


@dataclass(frozen=True)
class Experiment:
    """The corpus and the pretrained host of one seed, and how its modules are trained.

    Attributes:
        folder: The seed's folder; every training resumes in a folder inside it.
        settings: The run's settings.
        seed: The seed of everything that is random.
    """

    folder: Path
    settings: Settings
    seed: int

    @cached_property
    def corpus(self) -> Corpus:
        """The text, the names and the tokenizer."""
        s = self.settings
        return Corpus(
            s.known.split(), s.targets.split(), vocab=s.vocab, batch=s.batch, names=s.names,
            seed=self.seed, folder=self.folder,
        )  # fmt: skip

    @cached_property
    def pretrained(self) -> Bag:
        """The host, pretrained to fill in masked word pieces of the known languages."""
        s, loader = self.settings, self.corpus.masked_loader()
        torch.manual_seed(self.seed)
        model = Bag(s.vocab, s.width, s.layers, len(KINDS))
        host = mg.Host(model, freeze=False)
        self.fit(host, "host", loader, train="host", steps=s.steps_host, lr=s.lr_host)
        return model.requires_grad_(False).eval()

    def host(self) -> mg.Host:
        """Return a host around a copy of the pretrained model."""
        return mg.Host(copy.deepcopy(self.pretrained))

    def fit(
        self, host: mg.Host, key: str, loader: DataLoader, *, train: Any, steps: int, lr: float
    ) -> None:
        """Train on ``loader``, resumably in the folder ``key``."""
        host.fit(
            loader, train=train, steps=steps, lr=lr, warmup=0.1, seed=self.seed,
            folder=self.folder / key, progress=False,
        )  # fmt: skip

    def train_task(self, host: mg.Host, key: str, composition: str) -> None:
        """Train task adapters and the classification head in English, under a composition."""
        s = self.settings
        host.implant("kind", mg.Adapter(reduction=s.reduction_task), at=LAYERS, active=False)
        with host.using(composition):
            self.fit(
                host, key, self.corpus.task_loader(), train=["kind", "host.head"],
                steps=s.steps_task, lr=s.lr_task,
            )  # fmt: skip

    def train_sparse(
        self, host: mg.Host, name: str, key: str, loader: DataLoader, composition: str, at: Any,
        also: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Implant a sparse module, and train it in its two phases under a composition."""
        s = self.settings
        host.implant(name, mg.SparseDelta(density=s.density), at=at, active=False)
        with host.using(composition):
            mg.sparse_finetuning(
                host, name, loader, also=also, steps=s.steps_sparse, lr=s.lr_sparse, warmup=0.1,
                weight_decay=0.0, seed=self.seed, folder=self.folder / key, progress=False,
            )  # fmt: skip

    def train_sparse_task(self, host: mg.Host, key: str, composition: str) -> None:
        """Train a sparse task module and the classification head in English."""
        loader = self.corpus.task_loader()
        self.train_sparse(host, "kind", key, loader, composition, WEIGHTS, ["host.head"])


def train_stacked(experiment: Experiment) -> tuple[mg.Host, Composed]:
    """Train language modules, and the task module on English's: ``fi_words >> fi >> kind``."""
    host, corpus, s = experiment.host(), experiment.corpus, experiment.settings
    for code in (corpus.source, *corpus.targets):
        words = f"{code}_words"
        host.implant(code, mg.Adapter(reduction=s.reduction_language), at=WORDS, active=False)
        host.implant(words, mg.InvertibleAdapter(), at=WORDS, expect=1, active=False)
        with host.using(f"{words} >> {code}"):
            experiment.fit(
                host, f"stacked/{code}", corpus.masked_loader(code), train=[code, words],
                steps=s.steps_language, lr=s.lr_language,
            )  # fmt: skip

    def composed(code: str | None) -> str:
        return "kind" if code is None else f"{code}_words >> {code} >> kind"

    experiment.train_task(host, "stacked/kind", composed(corpus.source))
    return host, composed


def train_sum(experiment: Experiment) -> tuple[mg.Host, Composed]:
    """Train language and task modules as sparse changes of the weights: ``fi + kind``."""
    host, corpus = experiment.host(), experiment.corpus
    for code in (corpus.source, *corpus.targets):
        loader = corpus.masked_loader(code)
        experiment.train_sparse(host, code, f"sparse/{code}", loader, code, WORDS)

    def composed(code: str | None) -> str:
        return "kind" if code is None else f"{code} + kind"

    experiment.train_sparse_task(host, "sparse/kind", composed(corpus.source))
    return host, composed


def fine_tune(experiment: Experiment) -> mg.Host:
    """Train the baseline: all weights of the host are fine-tuned on the task."""
    s, loader = experiment.settings, experiment.corpus.task_loader()
    host = mg.Host(copy.deepcopy(experiment.pretrained).requires_grad_(), freeze=False)
    experiment.fit(host, "full", loader, train="host", steps=s.steps_task, lr=s.lr_full)
    return host


def trial(folder: Path, settings: Settings, seed: int) -> dict[str, Any]:
    """Pretrain a host, train every module, and test the unseen languages once."""
    experiment = Experiment(folder, settings, seed)
    corpus, task, sparse_task = experiment.corpus, experiment.host(), experiment.host()
    rows = score_swaps("stack", corpus, *train_stacked(experiment))
    rows |= score_swaps("sum", corpus, *train_sum(experiment))
    experiment.train_task(task, "task", "kind")
    rows["task"] = accuracy(corpus, task, lambda _: "kind")
    experiment.train_sparse_task(sparse_task, "few/kind", "kind")
    rows["sum_task"] = accuracy(corpus, sparse_task, lambda _: "kind")
    rows["full"] = accuracy(corpus, fine_tune(experiment), lambda _: None)
    rows["chance"] = dict.fromkeys([*rows["full"]], 100 / len(KINDS))
    return {
        "rows": {row: {c: n for c, n in rows[row].items() if c in COLUMNS} for row in ROWS},
        "series": {
            "names": {code: len(corpus.test(code)) for code in (corpus.source, *corpus.targets)},
            "languages": {row: {c: rows[row][c] for c in corpus.targets} for row in ROWS},
        },
    }


def score_swaps(
    form: str, corpus: Corpus, host: mg.Host, composed: Composed
) -> dict[str, dict[str, float]]:
    """Score one form with the right language's module, English's, a wrong one, and none."""
    other = dict(zip(corpus.targets, corpus.targets[1:] + corpus.targets[:1], strict=True))
    other[corpus.source] = corpus.targets[0]
    ways: dict[str, Callable[[str], str]] = {
        form: composed,
        f"{form}_source": lambda _: composed(corpus.source),
        f"{form}_wrong": lambda code: composed(other[code]),
        f"{form}_none": lambda _: composed(None),
    }
    return {row: accuracy(corpus, host, way) for row, way in ways.items()}


def accuracy(
    corpus: Corpus, host: mg.Host, composed: Callable[[str], str | None]
) -> dict[str, float]:
    """Return a row of the table: the accuracy in each language under its composition."""
    scores = {code: corpus.score(host, composed(code), code) for code in corpus.targets}
    row = {code: score.all for code, score in scores.items()}
    for column, part in (("unseen", "all"), ("named", "named"), ("hidden", "hidden")):
        row[column] = mean(getattr(score, part) for score in scores.values())
    return {"en": corpus.score(host, composed(corpus.source), corpus.source).all, **row}


# -- table and picture -------------------------------------------------------------------------


SHOWN = {
    "task": "task adapter alone",
    "stack_source": "stacked, English's left in",
    "stack": "stacked, the right language",
    "sum": "sparse, the right language",
}


def paint(canvas: Figure, scheme: Scheme, results: dict[str, Any]) -> None:
    """Draw the accuracy in each unseen language: a point for each seed, a bar for the mean."""
    seeds = [made["languages"] for made in results["series"].values()]
    languages: list[str] = list(seeds[0]["stack"])
    axes = canvas.subplots()
    for place, (row, label) in enumerate(SHOWN.items()):
        colour, aside = scheme.series[place], (place - (len(SHOWN) - 1) / 2) * 0.19
        for x, code in enumerate(languages):
            own = [seed[row][code] for seed in seeds]
            once = label if x == 0 else None
            axes.bar(x + aside, mean(own), 0.16, color=colour, alpha=0.45, label=once)
            axes.plot([x + aside] * len(own), own, "o", color=colour, ms=3.5)
    axes.axhline(100 / len(KINDS), color=scheme.faint, lw=1, ls="--")
    axes.set_xticks(range(len(languages)), [COLUMNS.get(c) or c for c in languages])
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, 100)
    axes.set_ylabel("right, % (dashed: chance)")
    canvas.legend(loc="outside lower center", ncols=2)


RECIPE = Recipe(
    name="madx",
    title="MAD-X: what is this the name of? Learned in English, asked in languages never seen",
    rows=ROWS,
    columns=COLUMNS,
    settings=Settings(),
    scaled=dict.fromkeys(("steps_host", "steps_language", "steps_task", "steps_sparse"), 2),
    trial=trial,
    paint=paint,
    notes=(
        "Percent of names whose kind (territory, language, currency, unit, time zone) was "
        "told, the mean over the five kinds; chance is 20.",
        "The task was learned from English names of other things than those asked for; names that "
        "are spelled as in English are not asked for outside English.",
        "Named: a line of the language's text names it, none says its kind; hidden: no line does.",
    ),
)
