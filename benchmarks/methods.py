"""Every module on a real pretrained host and a real task, beside full fine-tuning and a probe.

The host is all-MiniLM-L6-v2, the task the part of the standard library that a docstring describes
(:mod:`benchmarks.minilm`). Every row trains the same classification head beside its module, for the
same steps on the same batches; the linear probe trains the head alone. A method with two trainings
(a pruning and a second training, two phases) takes the steps twice. The learning rate of each row
was chosen on the validation split by ``--select`` and stands in ``ROWS``; the test split is read
once a seed, at the end. Seeds change the head's and the module's start and the order of the data.

Time and memory are measured apart, one thread, nothing beside it: a training step (forward,
backward, AdamW) in turn with one of full fine-tuning, on one batch of 16 × 64 tokens; memory is the
peak of what torch allocates in the first two steps, so gradients and the optimiser's state count,
the weights do not (see :mod:`modgraft.training.memory`).

    python -m benchmarks.methods [--seeds 0,1,2] [--jobs 2] [--only lora,dora]
    python -m benchmarks.methods --select [--only lora]       # choose the learning rates again
    python -m benchmarks.methods --steps 2 --seeds 0          # a quick look whether it all runs
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

import modgraft as mg
from benchmarks.minilm import classifier
from benchmarks.show import Claim, add_output, show
from benchmarks.timing import side_by_side
from benchmarks.train_step import batch as step_batch
from modgraft.data.labelled import Batches
from modgraft.data.library_topics import majority, split
from modgraft.models.minilm import folder, tokenizer
from modgraft.recipes.workers import end_with_parent
from modgraft.training.memory import peak_bytes

STEPS, BATCH, WARMUP, ROUNDS = 100, 16, 0.1, 3
QV, EVERY = ["query", "value"], ["output", "down"]
HEAD = "host.head"


@dataclass(frozen=True)
class Row:
    """One method: what is implanted where, how it trains, and the learning rate that was chosen."""

    title: str
    modules: Mapping[str, tuple[Callable[[], mg.Computation], Any]]
    lr: float
    grid: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    procedure: str = "fit"
    train: tuple[str, ...] | None = None  # None: the modules and the head
    use: str | None = None  # a composition other than the modules in their order

    def host(self, seed: int) -> mg.Host:
        """The host with the modules in it, born from ``seed``."""
        host = mg.Host(classifier(seed))
        for name, (make, at) in self.modules.items():
            host.implant(name, make(), at=at, active=self.use is None)
        if self.use is not None:
            host.use(self.use)
        return host

    @property
    def learns(self) -> list[str]:
        return list(self.train or (*self.modules, HEAD))

    def fit(self, host: mg.Host, loader: Any, **settings: Any) -> None:
        """Train by the method's own procedure."""
        if self.procedure == "magnitude_pruning":
            for _ in mg.magnitude_pruning(host, "m", loader, rounds=1, also=[HEAD], **settings):
                pass
        elif self.procedure == "sparse_finetuning":
            mg.sparse_finetuning(host, "m", loader, also=[HEAD], **settings)
        else:
            host.fit(loader, train=self.learns, **settings)


def one(make: Callable[[], mg.Computation], at: Any) -> dict[str, Any]:
    """A row's only module."""
    return {"m": (make, at)}


def prompt() -> mg.Computation:
    return mg.Prompt("Which part of the standard library is this?", tokenizer=tokenizer())


MADX = {
    "m": (mg.InvertibleAdapter, ["embedding", "encoder.output"]),
    "a": (lambda: mg.Adapter(reduction=16), "down"),
}
IA3 = {
    "m": (mg.Rescale, ["key", "value"]),
    "inner": (lambda: mg.Rescale(where="input"), "down"),
}
SLOW = (3e-4, 1e-3, 3e-3)  # where as many weights learn as a layer has

ROWS: dict[str, Row] = {
    "probe": Row("linear probe", {}, 3e-2),
    "full": Row("full fine-tuning", {}, 3e-4, (3e-5, 1e-4, 3e-4), train=("host",)),
    "lora": Row("LoRA(8)", one(lambda: mg.LoRA(8), QV), 3e-3),
    "rslora": Row("LoRA(8, rslora)", one(lambda: mg.LoRA(8, alpha=8, rslora=True), QV), 3e-3),
    "dora": Row("LoRA(8, dora)", one(lambda: mg.LoRA(8, dora=True), QV), 1e-2),
    "lora_bias": Row("LoRA(8, bias)", one(lambda: mg.LoRA(8, bias=True), QV), 3e-3),
    "subnetwork": Row(
        "SparseSubnetwork, one pruning", one(mg.SparseSubnetwork, QV), 3e-3, SLOW,
        procedure="magnitude_pruning",
    ),
    "supermask": Row("Supermask(0.95)", one(lambda: mg.Supermask(0.95), QV), 3e-2),
    "sparse": Row(
        "SparseDelta(0.05), two phases", one(lambda: mg.SparseDelta(0.05), QV), 3e-3, SLOW,
        procedure="sparse_finetuning",
    ),
    "intrinsic": Row(
        "IntrinsicDimension(200)", one(lambda: mg.IntrinsicDimension(200), QV), 3e-2
    ),
    "rescale": Row("Rescale as IA³", IA3, 3e-2),
    "houlsby": Row("Adapter, Houlsby", one(lambda: mg.Adapter(reduction=16), EVERY), 1e-2),
    "pfeiffer": Row("Adapter, Pfeiffer", one(lambda: mg.Adapter(reduction=16), "down"), 3e-2),
    "parallel": Row(
        "ParallelAdapter", one(lambda: mg.ParallelAdapter(reduction=16), "attention"), 1e-2
    ),
    "compacter": Row("Compacter", one(lambda: mg.Compacter(reduction=16), EVERY), 3e-2),
    "conv": Row(
        "ConvAdapter(3, depthwise)",
        one(lambda: mg.ConvAdapter(kernel=3, depthwise=True), EVERY), 1e-2,
    ),
    "soft_prompt": Row("SoftPrompt(10)", one(lambda: mg.SoftPrompt(10), None), 3e-2),
    "prompt": Row("Prompt (the head learns)", one(prompt, None), 3e-2, train=(HEAD,)),
    "prefix": Row("Prefix(10)", one(lambda: mg.Prefix(10), None), 3e-2),
    "prefix_mlp": Row(
        "Prefix(10) by an MLP", one(lambda: mg.Prefix(10, reparametrise=64), None), 1e-2
    ),
    "shared": Row(
        "Shared(LoRA(8)), by name", one(lambda: mg.Shared(mg.LoRA(8), group="name"), QV), 1e-2
    ),
    "hyper": Row(
        "HyperNetwork(LoRA(8)), one task",
        one(lambda: mg.HyperNetwork(mg.LoRA(8), tasks=("docs",), embedding=8), QV), 1e-2,
        use="m['docs']",
    ),
    "invertible": Row("InvertibleAdapter and Adapter", MADX, 1e-2),
}  # fmt: skip


# -- accuracy ----------------------------------------------------------------------------------


@cache
def data() -> dict[str, Batches]:
    """The three splits, read and tokenised once a process."""
    own = tokenizer()
    return {part: Batches(rows, own) for part, rows in split().items()}


@torch.no_grad()
def accuracy(host: mg.Host, part: str) -> float:
    """The share of a split's docstrings that get their class."""
    host.eval()
    right = total = 0
    for rows in data()[part].loader(64, shuffle=False):
        found = host(**{k: v for k, v in rows.items() if k != "labels"}).logits.argmax(-1)
        right += int((found == rows["labels"]).sum())
        total += len(found)
    return right / total


def run(name: str, seed: int, lr: float, steps: int, part: str) -> dict[str, Any]:
    """Train one row from one seed, and read one split at the end."""
    torch.set_num_threads(1)
    row = ROWS[name]
    host = row.host(seed)
    row.fit(
        host, data()["train"].loader(BATCH, shuffle=True), steps=steps, lr=lr, warmup=WARMUP,
        weight_decay=0.0, seed=seed, progress=False,
    )  # fmt: skip
    with host.training_only(row.learns):
        learned = {id(p): p.numel() for p in host.parameters() if p.requires_grad}
    head = sum(p.numel() for p in host.model.head.parameters())
    return {
        "accuracy": accuracy(host, part),
        "parameters": sum(learned.values()) - head,
        "of": sum(p.numel() for p in host.model.parameters()) - head,
    }


# -- time and memory ---------------------------------------------------------------------------


def measure(name: str) -> dict[str, Any]:
    """A training step of one row, in turn with one of full fine-tuning."""
    torch.set_num_threads(1)
    steps = [_step(ROWS[name]), _step(ROWS["full"])]
    pair = side_by_side(*steps, rounds=ROUNDS)
    fresh = _step(ROWS[name])
    return {"step": 1 / pair.ratio, "peak": peak_bytes(lambda: (fresh(), fresh()))}


def _step(row: Row) -> Callable[[], None]:
    host = row.host(0).train()
    host.requires_grad_(False)
    with host.training_only(row.learns):
        learn = [p for p in host.parameters() if p.requires_grad]
    for parameter in learn:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(learn, lr=1e-4, fused=True)
    rows = step_batch()

    def step() -> None:
        optimiser.zero_grad()
        host(**rows).loss.backward()
        optimiser.step()

    return step


# -- the whole ---------------------------------------------------------------------------------


class Record:
    """What has been run, in a JSON file: a run that is there with the same settings is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.found = json.loads(path.read_text(encoding="utf-8"))["runs"]

    def add(self, key: str, result: dict[str, Any]) -> None:
        self.found[key] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        about = {"python": platform.python_version(), "torch": torch.__version__}
        text = json.dumps({**about, "runs": self.found}, indent=1)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


def do(record: Record, jobs: int, function: Callable[..., Any], calls: dict[str, tuple]) -> None:
    """Run what is not recorded yet, ``jobs`` processes side by side, and record each at its end.

    The processes end at once with this one, or when one of them fails; what is recorded is kept.
    """
    left = {key: call for key, call in calls.items() if key not in record.found}
    if not left:
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with_parent) as pool:
        futures = {pool.submit(function, *call): key for key, call in left.items()}
        try:
            for future in track(as_completed(futures), function.__name__, total=len(futures)):
                record.add(futures[future], future.result())
        except BaseException:
            for process in active_children():
                process.terminate()
            raise


def key_of(name: str, seed: int, lr: float, steps: int, part: str) -> str:
    return f"{name} seed={seed} lr={lr:g} steps={steps} {part}"


def select(names: list[str], steps: int, jobs: int, record: Record) -> Table:
    """Validation accuracy of each row at each rate of its grid, from seed 0."""
    calls = {
        key_of(*call): call
        for name in names
        for lr in ROWS[name].grid
        for call in [(name, 0, lr, steps, "validation")]
    }
    do(record, jobs, run, calls)
    table = Table(title=f"validation accuracy after {steps} steps, seed 0")
    for title in ("method", "learning rate: accuracy", "best", "in the file"):
        table.add_column(title)
    for name in names:
        row = ROWS[name]
        scores = {
            lr: record.found[key_of(name, 0, lr, steps, "validation")]["accuracy"]
            for lr in row.grid
        }
        shown = ", ".join(f"{lr:g}: {score:.3f}" for lr, score in scores.items())
        table.add_row(row.title, shown, f"{max(scores, key=scores.__getitem__):g}", f"{row.lr:g}")
    return table


def results(names: list[str], seeds: list[int], steps: int, jobs: int, record: Record) -> Table:
    """Test accuracy over the seeds, parameters, time and memory of each row."""
    calls = {
        key_of(*call): call
        for seed in seeds
        for name in names
        for call in [(name, seed, ROWS[name].lr, steps, "test")]
    }
    do(record, jobs, run, calls)
    do(record, 1, measure, {f"{name} measured": (name,) for name in names})
    common = majority(split()["test"])
    table = Table(
        title=f"{len(seeds)} seeds, {steps} steps of {BATCH} docstrings, Python "
        f"{platform.python_version()}; the commonest class: {common:.1%}"
    )
    table.add_column("method")
    for title in ("test accuracy", "lr", "parameters", "%", "step / full", "peak MiB"):
        table.add_column(title, justify="right")
    for name in names:
        row, measured = ROWS[name], record.found[f"{name} measured"]
        found = [record.found[key_of(name, s, row.lr, steps, "test")] for s in seeds]
        scores = [100 * f["accuracy"] for f in found]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        count, of = found[0]["parameters"], found[0]["of"]
        table.add_row(
            row.title, f"{mean(scores):.1f}{spread}", f"{row.lr:g}", f"{count:,}",
            f"{100 * count / of:.2f}", f"{measured['step']:.2f}",
            f"{measured['peak'] / 2**20:,.0f}",
        )  # fmt: skip
    return table


def main() -> None:
    """Run what is asked for and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default=",".join(ROWS), help="rows, by name")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--select", action="store_true", help="choose learning rates instead")
    add_output(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/methods.json"),
        help="what is recorded here is not run again; a new file begins anew",
    )  # fmt: skip
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    folder()  # before any process is started: the host must be there
    record = Record(options.out)
    if options.select:
        table = select(names, options.steps, options.jobs, record)
    else:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        table = results(names, seeds, options.steps, options.jobs, record)
    steps = {name: record.found.get(f"{name} measured") for name in names}
    claims = [
        Claim(f"{ROWS[name].title}: a step / full fine-tuning's", f"{found['step']:.2f}")
        for name, found in steps.items()
        if found is not None and not options.select
    ]
    show([table], claims, options)


if __name__ == "__main__":
    main()
