"""mm-cot: what the KV cache saves in decoding, and what padding labels to 512 costs in training.

The released code lost the cache and padded every label to 512 tokens. Both ways run here in turn,
on the recipe's own fused T5 and batches of DigitsQA, and on a T5 of T5-small's published shape.

    python -m benchmarks.mmcot
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import T5Config, T5ForConditionalGeneration

import modgraft as mg
from benchmarks.show import Claim, add_output, show
from benchmarks.timing import Pair, side_by_side
from modgraft.data.batches import Collate, QADataset
from modgraft.data.digits import digits_qa
from modgraft.data.records import Questions
from modgraft.data.tokenizer import train_tokenizer
from modgraft.models.transformers_t5 import small_t5
from modgraft.recipes.mmcot.recipe import NETS, Settings, build_host

WIDTH, PATCHES, TOKENS = 80, 12, 64


def t5_small(vocabulary: int) -> T5ForConditionalGeneration:
    """T5-small's shape (Raffel et al. 2020), random weights: speed does not depend on them."""
    del vocabulary  # its own, of 32,128 tokens
    return T5ForConditionalGeneration(T5Config(d_model=512, num_layers=6, decoder_start_token_id=0))


def fused(t5: T5ForConditionalGeneration) -> mg.Host:
    """The recipe's stage-1 net."""
    return build_host(t5, NETS["stage1"], WIDTH, Settings())


def batches(rows: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    """One DigitsQA batch with labels to its longest, the same padded to 512, and the vocabulary."""
    qa = digits_qa(rows, 0, 0)
    features = {qid: torch.randn(PATCHES, WIDTH) for qid in qa.strips}
    questions = Questions.from_json(qa.problems, features=features)
    tokenizer = train_tokenizer(f"{r.question} {r.hint} {r.solution}" for r in questions)
    examples = [QADataset(questions)[i] for i in range(rows)]
    common = {"width": WIDTH, "with_ids": False}
    short = Collate(tokenizer, "QCM-E", **common)(examples)
    long = Collate(tokenizer, "QCM-E", pad_labels_to=512, **common)(examples)
    assert short["labels"].shape[1] < 64 < long["labels"].shape[1] == 512
    return short, long, len(tokenizer)


def decoding(host: mg.Host, batch: dict[str, Any], tokens: int, rounds: int) -> Pair:
    """``generate`` with the KV cache against the same without it: same tokens, in turn."""
    host.eval()
    inputs = {k: v for k, v in batch.items() if k != "labels"}

    def write(use_cache: bool) -> torch.Tensor:
        return host.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, use_cache=use_cache
        )

    assert torch.equal(write(True), write(False)), "with and without the cache must agree"
    return side_by_side(lambda: write(True), lambda: write(False), rounds)


def training(host: mg.Host, short: dict[str, Any], long: dict[str, Any], rounds: int) -> Pair:
    """A training step with labels padded to the batch's longest, against all padded to 512."""
    host.train()
    optimiser = torch.optim.AdamW(host.parameters(), lr=1e-6)

    def step(batch: dict[str, Any]) -> Callable[[], None]:
        def run() -> None:
            optimiser.zero_grad()
            host(**batch).loss.backward()
            optimiser.step()

        return run

    return side_by_side(step(short), step(long), rounds)


def main() -> None:
    """Run both and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(title=f"one thread, {options.rounds} rounds in turn")
    for title in ("", "modgraft", "the other way", "ratio (smallest to largest round)"):
        table.add_column(title, justify="right" if title else "left")
    console, claims = Console(width=150, stderr=True), []
    for name, make, rows in (
        ("recipe's T5, batch of 32", small_t5, 32),
        ("T5-small's shape, batch of 8", t5_small, 8),
    ):
        short, long, vocabulary = batches(rows)
        console.print(f"{name}: decoding, then training …")
        pair = decoding(fused(make(vocabulary)), short, TOKENS, options.rounds)
        fast, slow = rows * TOKENS / median(pair.a), rows * TOKENS / median(pair.b)
        table.add_row(
            f"{name}: decoding {TOKENS} tokens with KV cache / without",
            f"{fast:,.0f} tokens/s", f"{slow:,.0f} tokens/s", _ratio(pair),
        )  # fmt: skip
        claims.append(Claim(f"{name}: decoding without a KV cache / with", _ratio(pair)))
        pair = training(fused(make(vocabulary)), short, long, options.rounds)
        longest = short["labels"].shape[1]
        table.add_row(
            f"{name}: training step, labels padded to the longest ({longest}) / to 512",
            f"{1e3 * median(pair.a):,.0f} ms", f"{1e3 * median(pair.b):,.0f} ms", _ratio(pair),
        )  # fmt: skip
        claims.append(Claim(f"{name}: a step, labels of 512 / of the longest", _ratio(pair)))
    show([table], claims, options)


def _ratio(pair: Pair) -> str:
    low, high = pair.spread
    return f"{pair.ratio:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
