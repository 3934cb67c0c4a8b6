"""A bag of word pieces: a small masked language model without word order."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Block(nn.Module):
    """LN(x + W₂ gelu(W₁ x)) ``[B, d]``."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Bag(nn.Module):
    """h = blocks(Σ E over the ordinary tokens / √count) ``[B, d]``, with two heads.

    The continuous bag of words of Mikolov et al. 2013 (arXiv:1301.3781) with residual layers. The
    head of word pieces is E·LN(gelu(W h)) + b, where E ``[vocab, d]`` are the input embeddings; the
    head of classes is V·h + c.

    Args:
        vocab: The number of word pieces; those of :data:`SPECIAL` are not read.
        d: The width.
        layers: The number of blocks.
        classes: The number of classes of the second head.
    """

    def __init__(self, vocab: int, d: int, layers: int, classes: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d) for _ in range(layers))
        self.transform = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d))
        self.bias = nn.Parameter(torch.zeros(vocab))
        self.head = nn.Linear(d, classes)
        nn.init.normal_(self.table.weight, std=d**-0.5)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, kinds: Tensor | None = None
    ) -> MaskedLMOutput | SequenceClassifierOutput:
        """Predict word pieces if there are ``labels``, else classes.

        Args:
            input_ids: Int64 ``[B, n]``.
            labels: Int64 ``[B, n]``: the piece at a masked position, elsewhere −100. The logits are
                ``[B, vocab]``, the same for all positions.
            kinds: Int64 ``[B]``: the class. The logits are ``[B, classes]``.
        """
        seen = (input_ids >= len(SPECIAL))[..., None].to(self.table.weight.dtype)  # [B, n, 1]
        h = (self.table(input_ids) * seen).sum(1) / seen.sum(1).clamp(min=1).sqrt()  # [B, d]
        for block in self.blocks:
            h = block(h)
        if labels is not None:
            text, place = (labels != -100).nonzero(as_tuple=True)  # [M] of masked positions
            scores = F.linear(self.transform(h), self.table.weight, self.bias)  # [B, vocab]
            loss = -scores.log_softmax(-1)[text, labels[text, place]].mean()
            return MaskedLMOutput(loss=loss, logits=scores)
        logits = self.head(h)  # [B, classes]
        loss = None if kinds is None else F.cross_entropy(logits, kinds)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a WordPiece tokenizer that ignores case and accents, and reads every number as 0.

    It puts ``[CLS]`` before a text and ``[SEP]`` after it.
    """
    made = Tokenizer(models.WordPiece(unk_token=UNK, max_input_chars_per_word=100))  # pyright: ignore[reportCallIssue]
    made.normalizer = normalizers.Sequence(
        [
            normalizers.BertNormalizer(lowercase=True, strip_accents=True),
            normalizers.Replace(Regex(r"\p{N}+"), " 0 "),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.BertProcessing((SEP, 3), (CLS, 2))
    return made
