"""What the recipe `arithmetic` needs of a language model: text as tokens, and what is measured."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from modgraft.core.errors import DataError
from modgraft.data.docstrings import Texts, before_habit, has_citation, has_session
from modgraft.host.host import Host
from modgraft.training.stream import fold, own_randomness

END = "<end>"
"""Between excerpts, token 0."""
OPTIONS = 4
"""Continuations that a question offers."""

_NAMES = re.compile(r"[^\W\d_]{3,}")
_BATCH = 32


def make_tokenizer(texts: Sequence[str], size: int) -> Tokenizer:
    """A byte-level BPE of ``size`` tokens, learned from ``texts``; every text survives it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def new_model(vocabulary: int, width: int, layers: int, heads: int, seed: int) -> LlamaForCausalLM:
    """A small Llama with fresh weights; its generation never stops by itself."""
    with own_randomness():
        torch.manual_seed(fold(seed, "model"))
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers,
                intermediate_size=round(width * 8 / 3 / 16) * 16, num_attention_heads=heads,
                num_key_value_heads=heads, max_position_embeddings=512, tie_word_embeddings=True,
                bos_token_id=0, eos_token_id=None, pad_token_id=None,  # type: ignore[arg-type]
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """The texts of one trial as tokens.

    Attributes:
        tokenizer: learned from the training texts.
        texts: split → kind → excerpts.
        length: tokens of a window.
        words: words that the training texts hold, in lower case.
    """

    tokenizer: Tokenizer
    texts: Texts
    length: int
    words: frozenset[str]

    @classmethod
    def of(cls, texts: Texts, vocabulary: int, length: int) -> Corpus:
        """Learn the tokenizer from the training texts."""
        train = [text for kind in texts["train"].values() for text in kind]
        words = frozenset(w for text in train for w in _NAMES.findall(text.lower()))
        return cls(make_tokenizer(train, vocabulary), texts, length, words)

    def windows(self, split: str, kinds: Sequence[str], seed: int = 0) -> Tensor:
        """Excerpts of these kinds in random order, one after another, cut: [windows, length]."""
        chosen = [text for kind in kinds for text in self.texts[split][kind]]
        random.Random(fold(seed, "order")).shuffle(chosen)
        stream = [0]
        for encoded in self.tokenizer.encode_batch(chosen):
            stream += [*encoded.ids, 0]
        count = len(stream) // self.length
        if not count:
            raise DataError(
                f"{split} has {len(stream)} tokens of {', '.join(kinds)}, less than a window of "
                f"{self.length}", remedy="ask for more characters of it",
            )  # fmt: skip
        return torch.tensor(stream[: count * self.length]).view(count, self.length)

    def loader(self, kinds: Sequence[str], batch: int, seed: int) -> DataLoader:
        """Batches of training windows for ``host.fit``; labels are the inputs."""
        rows = [{"input_ids": w, "labels": w} for w in self.windows("train", kinds, seed)]
        return DataLoader(rows, batch_size=batch, shuffle=True, drop_last=len(rows) >= batch)  # type: ignore[arg-type]

    def prompts(self, split: str, kind: str, count: int, tokens: int) -> Tensor:
        """Beginnings to be continued, [count, tokens].

        Of ``"wanted"`` the first tokens of excerpts: neutral. Of a habit's kind the last ones
        before the habit begins: they invite it. Where there are fewer, they come again.
        """
        rows = []
        for text in self.texts[split][kind]:
            ids = self.tokenizer.encode(text if kind == "wanted" else before_habit(text)).ids
            if len(ids) >= tokens:
                rows.append(ids[:tokens] if kind == "wanted" else ids[-tokens:])
        if not rows:
            raise DataError(
                f"no excerpt of {kind!r} in {split} has a beginning of {tokens} tokens",
                remedy="ask for shorter prompts, or for more text",
            )
        random.Random(0).shuffle(rows)
        return torch.tensor([rows[i % len(rows)] for i in range(count)])

    def questions(self, split: str, count: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Which continuation is an excerpt's own?

        Returns:
            Beginnings [count, tokens] of wanted excerpts, and continuations
            [count, OPTIONS, tokens], its own first, then those of other excerpts.
        """
        rows = [self.tokenizer.encode(text).ids for text in self.texts[split]["wanted"]]
        rows = [ids[: 2 * tokens] for ids in rows if len(ids) >= 2 * tokens]
        if len(rows) < OPTIONS:
            raise DataError(
                f"{len(rows)} wanted excerpts of {split} have {2 * tokens} tokens, and a question "
                f"needs {OPTIONS}", remedy="ask for shorter questions, or for more text",
            )  # fmt: skip
        draw = random.Random(0)
        draw.shuffle(rows)
        rows = rows[:count]
        begin = torch.tensor([ids[:tokens] for ids in rows])
        own = torch.tensor([ids[tokens:] for ids in rows])
        order = torch.tensor(
            [[i, *draw.sample([j for j in range(len(rows)) if j != i], OPTIONS - 1)]
             for i in range(len(rows))]
        )  # fmt: skip
        return begin, own[order]


# -- what is measured --------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean cross-entropy of a token [N, n] given those before it in its window."""
    model.eval()
    total, count = 0.0, 0
    for batch in windows.split(_BATCH):
        terms = batch[:, 1:].numel()
        total += float(model(input_ids=batch, labels=batch).loss) * terms
        count += terms
    return math.exp(total / count)


@torch.no_grad()
def knows(model: nn.Module, questions: tuple[Tensor, Tensor]) -> float:
    """Percent of questions where an excerpt's own continuation is the likeliest."""
    model.eval()
    begin, options = questions
    count, offered, n = options.shape
    rows = torch.cat([begin[:, None].expand(-1, offered, -1), options], -1).flatten(0, 1)
    scores = []
    for batch in rows.split(_BATCH * 2):
        said = model(input_ids=batch).logits[:, -n - 1 : -1].log_softmax(-1)  # [B, n, V]
        scores.append(said.gather(-1, batch[:, -n:, None]).sum((1, 2)))
    best = torch.cat(scores).view(count, offered).argmax(1)
    return 100 * float((best == 0).float().mean())


@torch.no_grad()
def write(model: Any, corpus: Corpus, prompts: Tensor, tokens: int, seed: int) -> list[str]:
    """What the model writes after each prompt [B, n]: sampled from its own distribution.

    Neither cut nor cooled: temperature 1, over excerpts' ends, always ``tokens`` tokens. The same
    seed draws the same random numbers for every model.
    """
    model.eval()
    with own_randomness():
        torch.manual_seed(fold(seed, "write"))
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, max_new_tokens=tokens,
        )  # fmt: skip
    return [
        corpus.tokenizer.decode(row, skip_special_tokens=False)
        for row in out[:, prompts.shape[1] :].tolist()
    ]


def rates(texts: Sequence[str], words: frozenset[str]) -> Mapping[str, float]:
    """Percent of texts with a session, with a footnote, and of words that the real text has."""
    found = [w for text in texts for w in _NAMES.findall(text.replace(END, " ").lower())]
    cut = [text.replace(END, "\n") for text in texts]  # a habit may begin where an excerpt does
    return {
        "doctest": 100 * sum(map(has_session, cut)) / len(texts),
        "citation": 100 * sum(map(has_citation, cut)) / len(texts),
        "words": 100 * sum(w in words for w in found) / max(1, len(found)),
    }


class Judge:
    """Measures compositions on one split: perplexities, and what is written freely.

    Args:
        corpus: the text.
        split: ``"validation"`` or ``"test"``.
        seed: of what is sampled, the same for every composition.
        prompts: kind → how many continuations; those of ``"wanted"`` are neutral.
        prompt, written: tokens of a prompt and of its continuation.
        windows: of the perplexity of each kind.
        questions: how many are asked; with 0, what the model knows is not measured.
    """

    def __init__(
        self, corpus: Corpus, split: str, seed: int, *, prompts: Mapping[str, int], prompt: int,
        written: int, windows: int, questions: int,
    ) -> None:  # fmt: skip
        self.corpus, self.seed, self.written = corpus, seed, written
        self.prompts = {k: corpus.prompts(split, k, n, prompt) for k, n in prompts.items()}
        self.windows = {k: corpus.windows(split, [k])[:windows] for k in prompts}
        self.questions = corpus.questions(split, questions, prompt) if questions else None
        self._known: dict[str | None, dict[str, float]] = {}

    def __call__(self, host: Host, composition: str | None) -> dict[str, float]:
        """Figures of what ``composition`` merges to: an ordinary model, run by transformers.

        A habit's rate in percent after neutral prompts, by its name; after its own, which invite
        it, as ``<habit>_invited``; ``ppl_<kind>``; ``words``; and ``knows``. What was measured once
        is remembered.
        """
        if composition not in self._known:
            self._known[composition] = self._measured(host.merge(composition))
        return self._known[composition]

    def _measured(self, model: nn.Module) -> dict[str, float]:
        prompts = torch.cat([*self.prompts.values()])
        texts = write(model, self.corpus, prompts, self.written, self.seed)
        found: dict[str, float] = {}
        for kind, own in self.prompts.items():
            said, texts = rates(texts[: len(own)], self.corpus.words), texts[len(own) :]
            found |= said if kind == "wanted" else {f"{kind}_invited": said[kind]}
            found[f"ppl_{kind}"] = perplexity(model, self.windows[kind])
        if self.questions is not None:
            found["knows"] = knows(model, self.questions)
        return found
