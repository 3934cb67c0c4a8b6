"""A GPT of characters, step by step: why each part is there, and where it goes.

A language model gives each place of a text a distribution over what comes next. The simplest one, a
bigram, looks at one character. This file grows it into a GPT (Radford et al. 2019), with nothing
but matrices. :mod:`modgraft.models.gpt` is the same with every choice open.

The path of a batch, with B texts of n characters and width d::

    ids [B, n] → token and position vectors [B, n, d] → blocks → norm → logits [B, n, vocabulary]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput


class Head(nn.Module):
    """All heads of causal self-attention, each of width d/h.

    1. **Averages by a triangular matrix.** A character may look back, not forward. The mean of all
       before it is a product with a triangular matrix whose row i is 1/(i + 1) up to i, then 0. The
       softmax of a row that is 0 up to i and −∞ behind it is the same matrix: the mask says *who
       may be seen*, the softmax makes *weights* of it that add up to 1.
    2. **Averages that choose.** Instead of 0 the matrix holds scores, q_i · k_j: what i looks for
       times what j has. Each character so chooses what it takes, and takes v_j, what j gives.
    3. **Scores of size 1.** The product of two random vectors of d_h numbers of variance 1 has
       variance d_h. Without 1/√d_h the scores of wide heads are so far apart that the softmax is
       nearly one-hot from the start, and nearly no gradient passes it.
    """

    def __init__(self, d: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)  # three matrices in one: one pass over x instead of three
        self.output = nn.Linear(d, d)  # mixes what the heads found, and writes it to the path
        self.dropout = dropout
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.hidden = nn.Buffer(hidden, persistent=False)  # who comes later is not seen

    def forward(self, x: Tensor) -> Tensor:
        """Return what each character of ``x`` ``[B, n, d]`` takes from those up to itself."""
        b, n, d = x.shape
        # [B, n, 3 d] → three times [B, h, n, d_h]
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(d // self.heads)  # [B, h, n, n]
        weights = scores.masked_fill(self.hidden[:n, :n], -math.inf).softmax(-1)
        # first dropout: some characters are not seen, so that none is relied on alone
        weights = F.dropout(weights, self.dropout, self.training)
        y = weights @ v  # [B, h, n, d_h]
        return self.output(y.transpose(1, 2).reshape(b, n, d))  # heads side by side


class Block(nn.Module):
    """x + Attention(Norm x): look around;  x + MLP(Norm x): think about what was seen.

    The **residual path**: a block *adds* to x, and x itself goes on unchanged. The gradient of a
    sum goes to both parts whole, so that it reaches the first block past all others, however deep
    the model is. The norms stand inside the branches, before what they serve, and not on the path.
    """

    def __init__(self, d: int, heads: int, length: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(d), Head(d, heads, length, dropout)
        self.mlp_norm, self.up, self.down = (
            nn.LayerNorm(d),
            nn.Linear(d, 4 * d),
            nn.Linear(4 * d, d),
        )
        # second dropout: of what is added to the path, the path itself is whole
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, n, d]`` of ``[B, n, d]``."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))


class NaiveGPT(nn.Module):
    """Token and position vectors, blocks, a norm, and the token vectors again as the head.

    Args:
        vocabulary: the number of characters.
        length: the number of positions.
        d: the width.
        heads, layers: their numbers.
        dropout: the share that is dropped in each of three places.
    """

    def __init__(
        self, vocabulary: int, length: int = 64, d: int = 128, heads: int = 4, layers: int = 4,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        # attention sees a set: where a character stands has to be in its vector
        self.tokens, self.places = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        # third dropout: of the vectors that everything is read from
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(d, heads, length, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(d)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # 2 branches a block are added up: smaller at first, so that the sum is of size 1
                last = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> CausalLMOutput:
        """Predict what comes after each character.

        Args:
            input_ids: int64 ``[B, n]``.
            targets: int64 ``[B, n]``, what does come.

        Returns:
            The logits ``[B, n, vocabulary]``, with the mean cross-entropy if that is given.
        """
        x = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        x = self.norm(self.blocks(self.dropout(x)))
        # a head that is the table of tokens scores each by how near it is to what is expected
        logits = F.linear(x, self.tokens.weight)
        if targets is None:
            return CausalLMOutput(logits=logits)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class TorchGPT(nn.Module):
    """The same model of torch's own layers, for `benchmarks/chargpt.py` to compare a step with."""

    def __init__(
        self, vocabulary: int, length: int = 64, d: int = 128, heads: int = 4, layers: int = 4,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        layer = nn.TransformerEncoderLayer(
            d, heads, 4 * d, dropout, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(d), False)
        self.hidden = nn.Buffer(nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> CausalLMOutput:
        """As :meth:`NaiveGPT.forward`."""
        n = input_ids.shape[1]
        x = self.tokens(input_ids) + self.places.weight[:n]
        x = self.blocks(x, mask=self.hidden[:n, :n], is_causal=True)
        logits = F.linear(x, self.tokens.weight)
        if targets is None:
            return CausalLMOutput(logits=logits)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return CausalLMOutput(loss=loss, logits=logits)
