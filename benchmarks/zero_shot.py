"""Routing among modules that were trained apart: who is sent where, and what comes of it.

The host is all-MiniLM-L6-v2 under a linear head that was trained for all ten classes of docstrings
(:mod:`benchmarks.minilm`) and is frozen. Three LoRA modules of ranks 4, 8 and 16 are trained by
themselves, each on the docstrings of three classes of its own; the tenth class is left out. A test
docstring comes without a word on whose it is. A choice is right where it falls on the module of
the docstring's class; token routers choose at every layer for every token, so that their figure is
a mean over tokens and layers. Nothing here is chosen by results: the learning rate is LoRA's of
:mod:`benchmarks.methods`, gates have the paper's, and each row is run for both lengths of training.

    python -m benchmarks.zero_shot [--seeds 0,1,2] [--steps 50,150] [--markdown]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from statistics import mean, stdev
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

import modgraft as mg
from benchmarks.methods import BATCH, HEAD, WARMUP
from benchmarks.minilm import classifier
from benchmarks.show import Claim, add_output, show
from modgraft.data.labelled import Batches
from modgraft.data.library_topics import Example, split
from modgraft.models.minilm import tokenizer

#: module → its rank and the labels of its classes; label 9 belongs to none
GROUPS: dict[str, tuple[int, range]] = {
    "data": (4, range(0, 3)),
    "outside": (8, range(3, 6)),
    "programs": (16, range(6, 9)),
}
NAMES = tuple(GROUPS)
QV = ["query", "value"]
ROUTERS: dict[str, mg.Router] = {
    "Arrow": mg.Arrow(k=1),
    "Phatgoose": mg.Phatgoose(k=1),
    "Similarity": mg.Similarity(k=1),
}
ROWS = (
    "the head alone", "average of the three", "a wrong module", *ROUTERS, "the right module",
    "one LoRA(8) for all",
)  # fmt: skip
HEAD_LR, LORA_LR, GATE_STEPS = 3e-2, 3e-3, 50


def group_of(label: int) -> str | None:
    return next((name for name, (_, labels) in GROUPS.items() if label in labels), None)


def loaders(rows: list[Example]) -> dict[str, Any]:
    """For each module the batches of its own classes."""
    own = tokenizer()
    return {
        name: Batches([e for e in rows if group_of(e.label) == name], own).loader(BATCH, True)
        for name in NAMES
    }


def fit(host: mg.Host, loader: Any, train: str, lr: float, steps: int, seed: int) -> None:
    host.fit(
        loader, train=train, lr=lr, steps=steps, warmup=WARMUP, weight_decay=0.0, seed=seed,
        progress=False,
    )  # fmt: skip


def trial(seed: int, steps: int) -> dict[str, dict[str, float]]:
    """For each row the test accuracy, and of a router the share of right choices, in percent."""
    parts, words = split(), tokenizer()
    train = [e for e in parts["train"] if group_of(e.label)]
    host = mg.Host(classifier(seed))
    fit(host, Batches(train, words).loader(BATCH, True), HEAD, HEAD_LR, 100, seed)
    own = loaders(train)
    for name, (rank, _) in GROUPS.items():
        host.implant(name, mg.LoRA(rank), QV, active=False)
        with host.using(name):
            fit(host, own[name], name, LORA_LR, steps, seed)
    host.implant("all", mg.LoRA(8), QV, active=False)
    with host.using("all"):
        fit(host, Batches(train, words).loader(BATCH, True), "all", LORA_LR, 3 * steps, seed)
    for name, router in ROUTERS.items():
        host.implant(name, mg.Mixture(NAMES, router=router), active=False)
    mg.train_gates(host, "Phatgoose", own, steps=GATE_STEPS, progress=False)
    mg.embed_tasks(host, "Similarity", own)
    return tested(host, [e for e in parts["test"] if group_of(e.label)])


def buckets(rows: list[Example]) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Docstrings of one module and one length together, so that no choice is for padding."""
    words = tokenizer()
    found: dict[tuple[str, int], list[Example]] = {}
    for row in rows:
        length = len(Batches([row], words).encoded["input_ids"][0])
        found.setdefault((str(group_of(row.label)), length), []).append(row)
    return [
        (owner, batch)
        for (owner, _), some in sorted(found.items(), key=lambda item: item[0])
        for batch in Batches(some, words).loader(64, shuffle=False)
    ]


@torch.no_grad()
def tested(host: mg.Host, rows: list[Example]) -> dict[str, dict[str, float]]:
    host.eval()
    wrong = {name: NAMES[(NAMES.index(name) + 1) % len(NAMES)] for name in NAMES}
    ways: dict[str, Callable[[str], str | None]] = {
        "the head alone": lambda owner: None,
        "average of the three": lambda owner: f"average({', '.join(NAMES)})",
        "a wrong module": wrong.__getitem__,
        **{name: lambda owner, name=name: name for name in ROUTERS},
        "the right module": lambda owner: owner,
        "one LoRA(8) for all": lambda owner: "all",
    }
    found: dict[str, dict[str, float]] = {}
    batches = buckets(rows)
    for row in ROWS:
        right, chosen = 0, 0.0
        for owner, batch in batches:
            labels, texts = batch["labels"], {k: v for k, v in batch.items() if k != "labels"}
            out = host(**texts, modules=ways[row](owner))
            right += int((out.logits.argmax(-1) == labels).sum())
            if row in ROUTERS:
                uses = host[row].stats(reset=True)
                chosen += len(labels) * mean(use.share[NAMES.index(owner)] for use in uses)
        found[row] = {"accuracy": 100 * right / len(rows)}
        if row in ROUTERS:
            found[row]["right"] = 100 * chosen / len(rows)
    return found


def cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}" if values else "–"


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", default="50,150", help="of each module's training")
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, lengths = ([int(n) for n in text.split(",")] for text in (options.seeds, options.steps))
    runs: dict[tuple[int, int], Mapping[str, dict[str, float]]] = {}
    for pair in track([(s, n) for n in lengths for s in seeds], "routing"):
        runs[pair] = trial(*pair)
    table = Table(title=f"modules trained apart, {len(seeds)} seeds, percent; chance 33.3")
    table.add_column("")
    for steps in lengths:
        for title in ("right choices", "accuracy"):
            table.add_column(f"{title}, {steps} steps", justify="right")
    for row in ROWS:
        cells = []
        for steps in lengths:
            for kind in ("right", "accuracy"):
                values = [runs[s, steps][row].get(kind) for s in seeds]
                cells.append(cell([v for v in values if v is not None]))
        table.add_row(row, *cells)
    claims = [
        Claim(f"{row}: right choices, % after {steps} steps",
              cell([runs[s, steps][row]["right"] for s in seeds]))
        for row in ROUTERS
        for steps in lengths
    ]  # fmt: skip
    show([table], claims, options)


if __name__ == "__main__":
    main()
