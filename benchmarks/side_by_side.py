"""n modules trained side by side in one pass, against one after the other by ``host.fit``.

The host has BERT's shape, 6 layers × 384, random weights, no dropout, and a class to say of each
text of 16 tokens. Every module has data of its own. Both ways start from the same tensors; what
they become is compared before anything is timed, and the largest difference is in the table. A
time is that of a whole training, set-up included, by steps; both run in turn, on one thread.

    python -m benchmarks.side_by_side [--rounds 5] [--steps 8] [--markdown]
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification

import modgraft as mg
from benchmarks.show import Claim, add_output, show
from benchmarks.timing import side_by_side

LENGTH, CLASSES = 16, 5
KINDS: dict[str, tuple[mg.Computation, Any]] = {
    "LoRA(8) on query, value": (mg.LoRA(rank=8), ["query", "value"]),
    "adapters after each block": (mg.Adapter(reduction=16), "block"),
    "prefixes of 5": (mg.Prefix(length=5), None),
}
MIXED = "all three, as many of each"
CASES = [
    *((kind, 8, 4) for kind in KINDS),
    (MIXED, 9, 4),
    *(("LoRA(8) on query, value", n, 4) for n in (2, 4, 16, 32)),
    *(("LoRA(8) on query, value", 8, rows) for rows in (1, 16)),
]


def host_of(kind: str, count: int) -> tuple[mg.Host, list[str]]:
    """A host with ``count`` modules, none in force."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=6,
        intermediate_size=1536, num_labels=CLASSES, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    host = mg.Host(BertForSequenceClassification(config))
    kinds = list(KINDS.values())
    for i in range(count):
        module, at = kinds[i % len(kinds)] if kind == MIXED else KINDS[kind]
        host.implant(f"m{i}", module, at, active=False)
    return host, [f"m{i}" for i in range(count)]


def data(names: list[str], rows: int) -> dict[str, list[dict[str, Any]]]:
    """Three batches for each module."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: [
            {
                "input_ids": torch.randint(0, 1000, (rows, LENGTH), generator=draw),
                "labels": torch.randint(0, CLASSES, (rows,), generator=draw),
            }
            for _ in range(3)
        ]
        for name in names
    }


def measured(kind: str, count: int, rows: int, steps: int, rounds: int) -> list[str]:
    host, names = host_of(kind, count)
    loaders = data(names, rows)
    fit: dict[str, Any] = {"steps": steps, "lr": 1e-4, "progress": False}

    def one_pass() -> None:
        mg.fit_side_by_side(host, loaders, **fit)

    def one_after_the_other() -> None:
        for name in names:
            with host.using(name):
                host.fit(loaders[name], train=name, **fit)

    start = {k: v.clone() for k, v in host.implants.state_dict().items()}
    ends = []
    for way in (one_pass, one_after_the_other):
        host.implants.load_state_dict(start)
        way()
        ends.append({k: v.clone() for k, v in host.implants.state_dict().items()})
    apart = max(
        float((a - b).abs().max()) for a, b in zip(*(e.values() for e in ends), strict=True)
    )
    pair = side_by_side(one_pass, one_after_the_other, rounds)
    low, high = pair.spread
    return [
        kind, str(count), str(rows), f"{1e3 * median(pair.a) / steps:,.0f}",
        f"{1e3 * median(pair.b) / steps:,.0f}", f"{pair.ratio:.2f} ({low:.2f} to {high:.2f})",
        f"{apart:.0e}",
    ]  # fmt: skip


def main() -> None:
    """Compare, time, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cases", type=int, help="only the first so many")
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(
        title=f"a step of n modules on one host, {LENGTH} tokens a text, one thread, "
        f"{options.steps} steps, {options.rounds} rounds in turn"
    )
    table.add_column("modules")
    for title in (
        "n", "texts each", "ms in one pass", "ms one after the other",
        "times as long (smallest, largest)", "largest difference",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    claims = []
    for case in CASES[: options.cases]:
        cells = measured(*case, steps=options.steps, rounds=options.rounds)
        table.add_row(*cells)
        what = f"{cells[1]} × {cells[0]}, {cells[2]} texts each: one after the other / in one pass"
        claims.append(Claim(what, cells[5]))
    show([table], claims, options)


if __name__ == "__main__":
    main()
