"""What counting gives: the distribution after each context of up to n − 1 tokens, mixed."""

from __future__ import annotations

import numpy as np


class Counts:
    """P_n(x | c) = (N(c x) + λ P_{n−1}(x | c′)) / (N(c) + λ),  c′ = c without its first token.

    P₀ is uniform. Counts of long contexts speak where there are enough, shorter ones where there
    are not (Jelinek & Mercer 1980; MacKay & Peto 1995).

    Args:
        tokens: int64 ``[N]``, what is counted.
        vocabulary: the number of tokens.
        order: n.
        weight: λ, how many counts the shorter context is worth.

    Raises:
        ValueError: where an n-gram has no code in 63 bits.
    """

    def __init__(self, tokens: np.ndarray, vocabulary: int, order: int, weight: float) -> None:
        if vocabulary**order >= 1 << 63:
            raise ValueError(f"{order}-grams of {vocabulary} tokens have no code in 63 bits")
        self.vocabulary, self.weight = vocabulary, weight
        self.grams, self.contexts = [], []  # for each n: sorted codes, and their counts
        for n in range(1, order + 1):
            codes, counts = np.unique(_codes(tokens, vocabulary, n), return_counts=True)
            before, first = np.unique(codes // vocabulary, return_index=True)
            self.grams.append((codes, counts))
            self.contexts.append((before, np.add.reduceat(counts, first)))

    def loss(self, tokens: np.ndarray) -> float:
        """Return the mean of −log P over all tokens ``[N]``, in nats a token."""
        p = np.full(len(tokens), 1.0 / self.vocabulary)
        for n, (grams, contexts) in enumerate(zip(self.grams, self.contexts, strict=True), 1):
            codes = _codes(tokens, self.vocabulary, n)  # of those that end at n − 1, n, …
            own, of_context = _found(grams, codes), _found(contexts, codes // self.vocabulary)
            p[n - 1 :] = (own + self.weight * p[n - 1 :]) / (of_context + self.weight)
        return float(-np.log(p).mean())


def _found(counts: tuple[np.ndarray, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """Return how often each code was counted."""
    known, numbers = counts
    at = np.searchsorted(known, codes).clip(max=len(known) - 1)
    return np.where(known[at] == codes, numbers[at], 0)


def _codes(tokens: np.ndarray, vocabulary: int, n: int) -> np.ndarray:
    """Return a number for each n-gram of tokens ``[N]``, ``[N − n + 1]``."""
    codes = np.zeros(len(tokens) - n + 1, dtype=np.int64)
    for i in range(n):
        codes = codes * vocabulary + tokens[i : len(tokens) - n + 1 + i]
    return codes
