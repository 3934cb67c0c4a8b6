"""A character GPT in nanoGPT's published setting for a CPU: counted, naive, fast.

Runs recipe ``chargpt`` on a text (one seed after another, one thread, nothing beside it), and times
a step of the naive GPT in turn with that of the same model of torch's own layers.

    python -m benchmarks.chargpt shakespeare.txt [--seeds 0,1,2] [--run runs/shakespeare]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.show import Claim, add_output, show
from benchmarks.timing import Pair, side_by_side
from modgraft.data.shards import Windows
from modgraft.recipes import trials
from modgraft.recipes.bigram.recipe import RECIPE as BIGRAM
from modgraft.recipes.chargpt.naive import NaiveGPT, TorchGPT
from modgraft.recipes.chargpt.recipe import RECIPE, Settings
from modgraft.recipes.language import Text

ASKED = {
    ("naive", "loss"): "1.90 ± 0.03",
    ("fast_short", "share"): "≤ 8 %, aim 4",
    ("fast_long", "loss"): "≤ 1.60, aim 1.56",
    ("small_short", "share"): "≤ 25 %",
    ("small_long", "loss"): "≤ 1.75, aim 1.68",
    ("small_long", "parameters"): "≤ 0.80 M",
}
"""Row and column of the recipe → what is asked of it."""


def step_ratio(corpus: str, rounds: int) -> Pair:
    """Time a step of the naive GPT in turn with one of torch's layers."""
    s = Settings(corpus=corpus)
    text = Text.read(corpus, 0)
    batch = next(iter(Windows(text.training, s.length).loader(s.batch)))

    def steps(model: nn.Module) -> object:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

        def run() -> None:
            for _ in range(5):
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()

        return run

    torch.manual_seed(0)
    shape = (text.vocabulary, s.length, s.width, s.heads, s.layers)
    return side_by_side(steps(TorchGPT(*shape)), steps(NaiveGPT(*shape)), rounds)  # type: ignore[arg-type]


def main() -> None:
    """Time a step, run both recipes, and show their tables and what is asked of them."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("corpus", help="a text, such as tinyshakespeare")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--run", type=Path, default=Path("runs/chargpt-benchmark"))
    parser.add_argument("--rounds", type=int, default=30)
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    pair = step_ratio(options.corpus, options.rounds)
    low, high = pair.spread
    claims = [
        Claim(
            "a step of the naive GPT by torch's layers",
            f"{pair.ratio:.2f} ({low:.2f} … {high:.2f})",
            "≤ 1.1",
        )
    ]
    console = Console(width=150)
    for recipe in (BIGRAM, RECIPE):
        settings = type(recipe.settings)(corpus=str(Path(options.corpus).resolve()))
        folder = options.run / recipe.name
        results = trials.run(recipe, folder, settings, seeds, jobs=1, console=console, note=False)
        trials.show(folder, console, wide=True)
        rows = results["rows"]
        if recipe is BIGRAM:
            learned = mean(found["training"] for found in rows["bigram"].values())
            least = mean(found["training"] for found in rows["optimum"].values())
            apart = f"{learned - least:+.3f}"
            claims.append(Claim("the bigram's loss, from its optimum", apart, "± 0.02"))
            continue
        for (row, column), asked in ASKED.items():
            found = [one[column] for one in rows[row].values()]
            what = f"{recipe.rows[row]}: {recipe.columns[column]}"
            each = ", ".join(f"{x:.3f}" for x in found)
            claims.append(Claim(what, f"{mean(found):.3f} ({each})", asked))
    table = Table(title="What is asked")
    for column in ("of", "asked", "found"):
        table.add_column(column)
    for claim in claims:
        table.add_row(claim.what, claim.asked, claim.ratio)
    show([table], claims, options)


if __name__ == "__main__":
    main()
