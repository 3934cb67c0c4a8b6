"""Eight LoRA modules merged into one: beside PEFT's ``add_weighted_adapter``, in one run.

A BERT of width 768 with modules of rank 8 at each query, value, up and down, the same ones in both
libraries. The error is ‖Δ − Σ w·Δᵢ‖ / ‖Σ w·Δᵢ‖ over all sites, against a sum in
float64. Merging alone is timed, in turn, on one thread. Then checkpoints of twice the memory that a
process may have are merged (:mod:`benchmarks.merging_memory`).

python -m benchmarks.merging [--layers 2] [--rounds 7]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import BertConfig, BertModel

import modgraft as mg
from benchmarks.merging_memory import within
from benchmarks.show import Claim, add_output, show
from modgraft.store.merging.low_rank import dense
from modgraft.store.merging.modules import changes_of

COUNT, RANK = 8, 8
WEIGHTS = [0.5, 1.0, -0.25, 0.75, 1.0, 0.5, 1.5, 0.3]
AT = ["query", "value", "up", "down"]
NAMES = [f"lora_{i}" for i in range(COUNT)]
WHAT = {
    "size": "each checkpoint",
    "limit": "the limit",
    "resident": "peak of resident memory",
    "data": "private memory at the end",
}


def bare(layers: int, width: int) -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig(
        vocab_size=100, hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width,
        num_attention_heads=width // 64,
    )).eval()  # fmt: skip


def ours(layers: int, width: int) -> mg.Host:
    """A host with eight modules that have been moved away from 0."""
    host = mg.Host(bare(layers, width))
    for name in NAMES:
        handle = host.implant(name, mg.LoRA(rank=RANK), at=AT, active=False)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.normal_(0, 0.02)
    return host


def theirs(host: mg.Host, layers: int, width: int) -> Any:
    """PEFT's model with the same modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        targets = "|".join(path.replace(".", r"\.") for path in host[NAMES[0]].paths)
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=f"({targets})")
        model: Any = peft.get_peft_model(bare(layers, width), config, adapter_name=NAMES[0])
        for name in NAMES[1:]:
            model.add_adapter(name, config)
    with torch.no_grad():
        for name in NAMES:
            for path, place in zip(host[name].paths, host[name].places, strict=True):
                layer: Any = model.base_model.model.get_submodule(path)
                factors: Any = place
                layer.lora_A[name].weight.copy_(factors.A)
                layer.lora_B[name].weight.copy_(factors.B)
    return model


def merging(layers: int, width: int, rounds: int) -> tuple[Table, list[Claim]]:
    """Time every way, check its error, and say what was asked."""
    host = ours(layers, width)
    model = theirs(host, layers, width)
    paths = host[NAMES[0]].paths
    with torch.no_grad():
        parts = changes_of(host, NAMES)
        exact = {
            path: sum(w * dense(d).double() for w, d in zip(WEIGHTS, parts[path], strict=True))  # type: ignore[arg-type]
            for path in paths
        }

    def own(method: str, rank: int | None = None, **options: Any) -> None:
        mg.merge(host, NAMES, "new", method, weights=WEIGHTS, rank=rank, **options)

    def peers(kind: str, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=kind, **options)

    def delta(of_peft: bool) -> dict[str, Tensor]:
        with torch.no_grad():
            if not of_peft:
                found = changes_of(host, ["new"])
                return {path: dense(found[path][0]).double() for path in paths}  # type: ignore[arg-type]
            inner = model.base_model.model
            return {p: inner.get_submodule(p).get_delta_weight("new").double() for p in paths}

    trimmed: dict[str, Any] = {"density": 0.2}
    ways: dict[str, tuple[Callable[[], None], bool]] = {
        "the exact sum: arithmetic": (lambda: own("arithmetic"), False),
        "PEFT cat": (lambda: peers("cat"), True),
        "PEFT linear": (lambda: peers("linear"), True),
        f"arithmetic, rank={RANK}": (lambda: own("arithmetic", RANK), False),
        f"PEFT svd, rank {RANK}": (lambda: peers("svd", svd_rank=RANK), True),
        "arithmetic, rank=32": (lambda: own("arithmetic", 32), False),
        "PEFT svd, rank 32": (lambda: peers("svd", svd_rank=32), True),
        "ties, whole": (lambda: own("ties", **trimmed), False),
        f"ties, rank={RANK}": (lambda: own("ties", RANK, **trimmed), False),
        f"PEFT ties_svd, rank {RANK}": (lambda: peers("ties_svd", svd_rank=RANK, **trimmed), True),
        "PEFT ties, of the factors": (lambda: peers("ties", **trimmed), True),
        "dare, whole": (lambda: own("dare", **trimmed), False),
        "PEFT dare_linear, of the factors": (lambda: peers("dare_linear", **trimmed), True),
        f"isotropic, rank={RANK}": (lambda: own("isotropic", RANK), False),
        f"tsv, rank={RANK}": (lambda: own("tsv", RANK), False),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    errors = {}
    for number in range(rounds + 1):
        for name, (way, of_peft) in ways.items():
            start = time.perf_counter()
            way()
            if number:  # the first is not counted
                seconds[name].append(time.perf_counter() - start)
            else:
                errors[name] = _error(delta(of_peft), exact)
            model.delete_adapter("new") if of_peft else host.remove("new")
    table = Table(
        title=f"{COUNT} modules of rank {RANK} at {len(paths)} weights of a BERT of width {width}, "
        f"merged with weights, {rounds} rounds in turn; the error is that against the exact sum"
    )
    for title in ("way", "error", "milliseconds (quartiles)"):
        table.add_column(title, justify="left" if title == "way" else "right")
    for name, times in seconds.items():
        table.add_row(name, f"{errors[name]:.2e}", _quartiles([1e3 * t for t in times]))
    sums = list(ways)[:3]
    model.add_weighted_adapter(NAMES[:2], [1.0, 1.0], "new", combination_type="linear")
    with torch.no_grad():
        pair = {p: sum(dense(d).double() for d in parts[p][:2]) for p in paths}  # type: ignore[arg-type]
    of_two = _error(delta(True), pair)
    claims = [
        Claim("error of the exact sum", f"{errors[sums[0]]:.1e}", "≤ 1e-6",
              f"linear: {errors[sums[2]]:.2f}, of two alone {of_two:.2f}"),
    ]  # fmt: skip
    for rank in (RANK, 32):
        mine, peer = f"arithmetic, rank={rank}", f"PEFT svd, rank {rank}"
        ratios = [b / a for a, b in zip(seconds[mine], seconds[peer], strict=True)]
        claims += [
            Claim(f"PEFT's svd / rank={rank}, seconds", _quartiles(ratios), "≥ 10"),
            Claim(f"error, rank={rank}", f"{errors[mine]:.6f}", "≤ PEFT's", f"{errors[peer]:.6f}"),
        ]
    return table, claims


def beyond_memory() -> tuple[Table, list[Claim]]:
    """Merge checkpoints of twice the limit of memory; say what was needed."""
    with TemporaryDirectory() as folder:
        found = within(Path(folder))
    table = Table(title="Two checkpoints and their base merged by TIES under RLIMIT_DATA")
    for title in ("what", "MiB"):
        table.add_column(title, justify="left" if title == "what" else "right")
    for what in ("size", "limit", "resident", "data"):
        table.add_row(WHAT[what], f"{getattr(found, what) / 2**20:,.0f}")
    peak = f"{found.resident / found.limit:.2f}"
    larger = f"{found.size / found.limit:.2f}"
    return table, [Claim(f"peak memory / its limit, checkpoints of {larger} limits", peak, "≤ 1")]


def _error(found: dict[str, Tensor], exact: dict[str, Any]) -> float:
    apart = sum(float((found[path] - exact[path]).square().sum()) for path in exact)
    return (apart / sum(float(each.square().sum()) for each in exact.values())) ** 0.5


def _quartiles(values: Sequence[float]) -> str:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return f"{median(values):.3g} ({low:.3g} to {high:.3g})"


def _of(claims: Sequence[Claim]) -> Table:
    table = Table(title="What was asked")
    for title in ("", "asked", "modgraft", "PEFT"):
        table.add_column(title, justify="right" if title else "left")
    for claim in claims:
        table.add_row(claim.what, claim.asked, claim.ratio, claim.peer)
    return table


def main() -> None:
    """Time everything, and print one table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table, claims = merging(options.layers, 768, options.rounds)
    page, more = beyond_memory()
    show([table, _of(claims + more), page], claims + more, options)


if __name__ == "__main__":
    main()
