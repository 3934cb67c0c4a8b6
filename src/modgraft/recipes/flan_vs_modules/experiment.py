"""What the arms of ``flan_vs_modules`` share: one seed's examples, its T5, training and scoring."""

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
from modgraft.models.t5 import copy_init, small_t5
from modgraft.recipes.flan_vs_modules.settings import Settings

SENTINELS = 8
Rows = Pairs | Denoising


@dataclass(frozen=True)
class Arm:
    """A trained net and what it cost.

    Attributes:
        host: the net.
        trained: how many parameters learned.
        steps, seconds: of training.
        modules: the composition in which it is asked: one, or one for each family.
    """

    host: mg.Host
    trained: int
    steps: int
    seconds: float
    modules: str | Mapping[str, str] | None = None

    @property
    def cost(self) -> dict[str, float]:
        """Parameters in thousands, steps and seconds."""
        return {"trained": self.trained / 1e3, "steps": self.steps, "seconds": self.seconds}


@dataclass(frozen=True)
class Experiment:
    """One seed: families divided, a tokenizer, a pretrained T5; all kept in ``folder``.

    Attributes:
        folder: of the seed.
        settings: of the run.
        seed: decides the division, the start of every net, and the order of all training.
        families: those that are trained.
        new: the family that comes later.
    """

    folder: Path
    settings: Settings
    seed: int
    families: tuple[str, ...]
    new: str

    @cached_property
    def splits(self) -> dict[str, Split]:
        """Each family's examples; the new one's as well."""
        s = self.settings
        sizes = {"train": s.train, "val": s.val, "test": s.test}
        return {f: split(f, **sizes, seed=self.seed) for f in (*self.families, self.new)}

    @cached_property
    def unlabelled(self) -> list[str]:
        """What T5 is pretrained on: docstrings, and inputs of the families that are trained."""
        inputs = [e.text for f in self.families for e in self.splits[f].train]
        return plain_texts(self.seed) + inputs

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Trained on the unlabelled texts and the targets of the families that are trained."""
        if not (self.folder / "tokenizer.json").is_file():
            targets = [e.target for f in self.families for e in self.splits[f].train]
            made = train_pieces(
                self.unlabelled + targets, vocab_size=self.settings.vocabulary, sentinels=SENTINELS
            )
            save_tokenizer(made, self.folder)
        return load_tokenizer(self.folder)

    @cached_property
    def pretrained(self) -> T5ForConditionalGeneration:
        """The T5 that every arm begins with."""
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
        """A host of a copy of the pretrained T5."""
        return mg.Host(copy.deepcopy(self.pretrained))

    def rows(self, examples: Sequence[Example]) -> Pairs:
        """Examples, tokenised."""
        return Pairs([e.text for e in examples], [e.target for e in examples], self.tokenizer)

    def train(self, *families: str) -> Pairs:
        """The training examples of families, tokenised."""
        return self.rows([e for f in families for e in self.splits[f].train])

    def fit(
        self, host: mg.Host, key: str, rows: Rows, *, train: str, steps: int, lr: float
    ) -> float:
        """Train on ``rows``; what it can be resumed from is kept under ``key``. Returns seconds."""
        history = host.fit(
            batches(rows, self.settings.batch), train=train, steps=steps, lr=lr, warmup=0.05,
            betas=(0.9, 0.98), seed=self.seed, folder=self.folder / key, save_every=steps,
            progress=False,
        )  # fmt: skip
        return history.seconds

    @torch.no_grad()
    def right(self, arm: Arm, family: str, part: str = "test") -> float:
        """The share of a part's examples whose target the arm writes, in percent.

        It decodes greedily and freely. White space and capitals do not count: the tokenizer keeps
        neither.
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
            right += sum(map(self._same, written, labels))
        return 100 * right / len(rows)

    def _same(self, written: Tensor, labels: Tensor) -> bool:
        end = self.tokenizer.eos_token_id
        tokens = written[1:].tolist()  # behind the start
        return end in tokens and tokens[: tokens.index(end) + 1] == labels[labels >= 0].tolist()


def batches(rows: Rows, size: int) -> DataLoader:
    """Batches of examples of like length, in random order."""
    lengths = [len(rows[i].input) for i in range(len(rows))]  # type: ignore[arg-type]
    return DataLoader(
        rows, batch_sampler=SortedBatches(lengths, size, pool=8), collate_fn=collate
    )  # fmt: skip


def size(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(p.numel() for p in model.parameters())
