"""The language model of the recipe `arithmetic`: its tokenizer, its data and its measurements."""

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
from modgraft.training.randomness import fold, own_randomness

END = "<end>"
"""The token between excerpts; its id is 0."""
OPTIONS = 4
"""The number of continuations that a question offers."""

_NAMES = re.compile(r"[^\W\d_]{3,}")
_BATCH = 32


def make_tokenizer(texts: Sequence[str], size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of ``size`` tokens; it can encode any text without loss."""
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
    """Create a small Llama with random weights and no end token: generation never stops early."""
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
    """The texts of one trial and their tokenizer.

    Attributes:
        tokenizer: Trained on the training texts.
        texts: Split → kind → excerpts.
        length: The number of tokens in a window.
        words: All words of the training texts, in lower case.
    """

    tokenizer: Tokenizer
    texts: Texts
    length: int
    words: frozenset[str]

    @classmethod
    def of(cls, texts: Texts, vocabulary: int, length: int) -> Corpus:
        """Train the tokenizer on the training texts."""
        train = [text for kind in texts["train"].values() for text in kind]
        words = frozenset(w for text in train for w in _NAMES.findall(text.lower()))
        return cls(make_tokenizer(train, vocabulary), texts, length, words)

    def windows(self, split: str, kinds: Sequence[str], seed: int = 0) -> Tensor:
        """Join excerpts of these kinds in random order, and cut them: int64 [windows, length]."""
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
        """Return batches of training windows for ``host.fit``, with the inputs as labels."""
        rows = [{"input_ids": w, "labels": w} for w in self.windows("train", kinds, seed)]
        return DataLoader(rows, batch_size=batch, shuffle=True, drop_last=len(rows) >= batch)  # type: ignore[arg-type]

    def prompts(self, split: str, kind: str, count: int, tokens: int) -> Tensor:
        """Return prompts for the model to continue, int64 [count, tokens].

        For ``"wanted"``, a prompt is the beginning of an excerpt, which is neutral. For a habit, it
        is the text right before the habit begins, which invites it. If there are fewer than
        ``count``, they repeat.
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
        """Return multiple-choice questions: which continuation belongs to this beginning?

        Returns:
            Beginnings of wanted excerpts, int64 [count, tokens], and continuations, int64
            [count, OPTIONS, tokens]: the right one first, then those of other excerpts.
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


# -- measurements ------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Return exp of the mean cross-entropy of windows [N, n], each token given those before it."""
    model.eval()
    total, count = 0.0, 0
    for batch in windows.split(_BATCH):
        terms = batch[:, 1:].numel()
        total += float(model(input_ids=batch, labels=batch).loss) * terms
        count += terms
    return math.exp(total / count)


@torch.no_grad()
def continuation_accuracy(model: nn.Module, questions: tuple[Tensor, Tensor]) -> float:
    """Return the percentage of questions whose right continuation has the highest likelihood."""
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
def sample(model: Any, corpus: Corpus, prompts: Tensor, tokens: int, seed: int) -> list[str]:
    """Sample a continuation of ``tokens`` tokens after each prompt [B, n].

    Sampling is at temperature 1 from the whole vocabulary, and goes on past the end of an excerpt.
    The same seed draws the same random numbers for every model.
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


def habit_rates(texts: Sequence[str], words: frozenset[str]) -> Mapping[str, float]:
    """Return percentages: texts with a session, texts with a footnote, words of the real text."""
    found = [w for text in texts for w in _NAMES.findall(text.replace(END, " ").lower())]
    cut = [text.replace(END, "\n") for text in texts]  # a habit may begin where an excerpt does
    return {
        "doctest": 100 * sum(map(has_session, cut)) / len(texts),
        "citation": 100 * sum(map(has_citation, cut)) / len(texts),
        "words": 100 * sum(w in words for w in found) / max(1, len(found)),
    }


class Evaluator:
    """Measures compositions on one split, by perplexity and by freely sampled text.

    Args:
        corpus: The texts.
        split: ``"validation"`` or ``"test"``.
        seed: The seed of sampling, the same for every composition.
        prompts: Kind → number of prompts; those of ``"wanted"`` are neutral.
        prompt, written: The number of tokens of a prompt and of its continuation.
        windows: The number of windows for the perplexity of each kind.
        questions: The number of multiple-choice questions; with 0, none are asked.
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
        """Measure the ordinary model that ``composition`` merges to; results are remembered.

        Returns:
            ``<habit>``: the percentage of continuations of neutral prompts that show the habit;
            ``<habit>_invited``: the same after prompts that invite it; ``ppl_<kind>``: perplexity;
            ``words``: the percentage of words that occur in the real text; ``knows``: accuracy on
            the multiple-choice questions.
        """
        if composition not in self._known:
            self._known[composition] = self._measured(host.merge(composition))
        return self._known[composition]

    def _measured(self, model: nn.Module) -> dict[str, float]:
        prompts = torch.cat([*self.prompts.values()])
        texts = sample(model, self.corpus, prompts, self.written, self.seed)
        found: dict[str, float] = {}
        for kind, own in self.prompts.items():
            said, texts = habit_rates(texts[: len(own)], self.corpus.words), texts[len(own) :]
            found |= said if kind == "wanted" else {f"{kind}_invited": said[kind]}
            found[f"ppl_{kind}"] = perplexity(model, self.windows[kind])
        if self.questions is not None:
            found["knows"] = continuation_accuracy(model, self.questions)
        return found
