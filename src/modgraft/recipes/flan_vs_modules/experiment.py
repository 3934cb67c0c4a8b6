"""What all arms of ``flan_vs_modules`` share: data, pretrained T5, training and scoring."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration

import modgraft as mg
from modgraft.data.batches import SortedBatches
from modgraft.data.families import Example, Split, plain_texts, split
from modgraft.data.pairs import Denoising, Pairs, collate
from modgraft.data.tokenizer import load_tokenizer, save_tokenizer, train_pieces
from modgraft.models.copy_init import copy_init
from modgraft.models.transformers_t5 import small_t5

SENTINELS = 8
Rows = Pairs | Denoising


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        train, val, test: The number of examples of each family.
        shots: The number of examples of the new family in the few-shot arms.
        vocabulary: The number of word pieces.
        d_model, d_ff, heads, layers: T5's shape.
        steps_pretrain, lr_pretrain: Steps and learning rate of T5's pretraining, without answers.
        steps: Optimiser steps for each family; a model of all families takes as many for each.
        steps_few: Optimiser steps of the few-shot arms.
        lr, lr_module: The peak learning rates of T5's weights and of modules.
        batch: Examples in a batch.
        longest: The most tokens of an answer.
        rank: The rank of a LoRA, at every linear layer of attention and feed-forward.
    """

    train: int = 3200
    val: int = 60
    test: int = 100
    shots: int = 32
    vocabulary: int = 1000
    d_model: int = 96
    d_ff: int = 192
    heads: int = 4
    layers: int = 2
    steps_pretrain: int = 300
    lr_pretrain: float = 2e-3
    steps: int = 120
    steps_few: int = 40
    lr: float = 2e-3
    lr_module: float = 1e-2
    batch: int = 32
    longest: int = 18
    rank: int = 16


@dataclass(frozen=True)
class Arm:
    """One arm of the comparison: a trained model and the cost of its training.

    Attributes:
        host: The model.
        trained: The number of parameters that were trained.
        steps, seconds: The length of the training.
        modules: The composition to test: one for all families, or one for each.
    """

    host: mg.Host
    trained: int
    steps: int
    seconds: float
    modules: str | Mapping[str, str] | None = None

    @property
    def cost(self) -> dict[str, float]:
        """The trained parameters in thousands, the steps and the seconds."""
        return {"trained": self.trained / 1e3, "steps": self.steps, "seconds": self.seconds}


@dataclass(frozen=True)
class Experiment:
    """The data, the tokenizer and the pretrained T5 of one seed, all saved in ``folder``.

    Attributes:
        folder: The seed's folder.
        settings: The run's settings.
        seed: Decides the splits, the initial weights and the order of the training examples.
        families: The families that are trained first.
        new: The family that is added later.
    """

    folder: Path
    settings: Settings
    seed: int
    families: tuple[str, ...]
    new: str

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The examples of every family, the new one included."""
        s = self.settings
        sizes = {"train": s.train, "val": s.val, "test": s.test}
        return {f: split(f, **sizes, seed=self.seed) for f in (*self.families, self.new)}

    @cached_property
    def unlabelled(self) -> list[str]:
        """The texts of pretraining: docstrings, and inputs of the families trained first."""
        inputs = [e.text for f in self.families for e in self.splits[f].train]
        return plain_texts(self.seed) + inputs

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, trained on the pretraining texts and the targets of the same families."""
        if not (self.folder / "tokenizer.json").is_file():
            targets = [e.target for f in self.families for e in self.splits[f].train]
            made = train_pieces(
                self.unlabelled + targets, vocab_size=self.settings.vocabulary, sentinels=SENTINELS
            )
            save_tokenizer(made, self.folder)
        return load_tokenizer(self.folder)

    @cached_property
    def pretrained(self) -> T5ForConditionalGeneration:
        """The pretrained T5 that every arm starts from."""
        s = self.settings
        model = small_t5(
            len(self.tokenizer), d_model=s.d_model, d_ff=s.d_ff, heads=s.heads, layers=s.layers,
            seed=self.seed,
        )  # fmt: skip
        model = copy_init(model, seed=self.seed)
        self.fit(
            mg.Host(model), "pretrained", Denoising(self.unlabelled, self.tokenizer),
            train="host", steps=s.steps_pretrain, lr=s.lr_pretrain,
        )  # fmt: skip
        return model.eval()

    def host(self) -> mg.Host:
        """Return a host around a copy of the pretrained T5."""
        return mg.Host(copy.deepcopy(self.pretrained))

    def rows(self, examples: Sequence[Example]) -> Pairs:
        """Tokenise examples."""
        return Pairs([e.text for e in examples], [e.target for e in examples], self.tokenizer)

    def train(self, *families: str) -> Pairs:
        """Return the tokenised training examples of some families."""
        return self.rows([e for f in families for e in self.splits[f].train])

    def fit(
        self, host: mg.Host, key: str, rows: Rows, *, train: str, steps: int, lr: float
    ) -> float:
        """Train on ``rows``, resumably in the folder ``key``; return the seconds it took."""
        history = host.fit(
            batches(rows, self.settings.batch), train=train, steps=steps, lr=lr, warmup=0.05,
            betas=(0.9, 0.98), seed=self.seed, folder=self.folder / key, save_every=steps,
            progress=False,
        )  # fmt: skip
        return history.seconds

    @torch.no_grad()
    def accuracy(self, arm: Arm, family: str, part: str = "test") -> float:
        """Return the percentage of a split's examples whose exact target the arm writes.

        Decoding is greedy and free-running. White space and capitals do not count, because the
        tokenizer drops them.
        """
        chosen = arm.modules[family] if isinstance(arm.modules, Mapping) else arm.modules
        rows, right = self.rows(getattr(self.splits[family], part)), 0
        arm.host.eval()
        for batch in DataLoader(rows, 128, collate_fn=collate):
            labels = batch.pop("labels")
            written = arm.host.generate(
                **batch,
                modules=chosen,
                max_new_tokens=self.settings.longest,
                do_sample=False,
                num_beams=1,
            )
            right += sum(map(self._writes, written, labels))
        return 100 * right / len(rows)

    def _writes(self, written: Tensor, labels: Tensor) -> bool:
        end = self.tokenizer.eos_token_id
        tokens = written[1:].tolist()  # without the start token
        return end in tokens and tokens[: tokens.index(end) + 1] == labels[labels >= 0].tolist()


def batches(rows: Rows, size: int) -> DataLoader:
    """Return batches of examples of similar length, in random order."""
    order = SortedBatches(rows.lengths, size, pool=8)
    return DataLoader(rows, batch_sampler=order, collate_fn=collate)


def size(model: nn.Module) -> int:
    """Return the number of a model's parameters."""
    return sum(p.numel() for p in model.parameters())
