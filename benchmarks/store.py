"""1,000 modules from files, each verified before its first use: time and memory, beside PEFT's.

The host has MiniLM's shape, BERT of 6 layers × 384, random weights; each module is a LoRA of rank 8
at every linear layer, with tensors of its own, in a folder of its own. They are loaded lazily: the
host is compared and the card is read now, the tensors are mapped into memory, and verified and
copied at the first use. Every module's tensors are compared with what was written.

PEFT's ``load_adapter`` reads the same tensors from its own folders, of 200 of them in the same run.

    python -m benchmarks.store [--modules 1000] [--markdown]
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import modgraft as mg
from benchmarks.show import Claim, add_output, show
from modgraft.store.file import CARD, digest_of, write_tensors
from modgraft.store.folder import FILE, packed

MODULES, SAMPLE, PEFTS, RANK = 1000, 100, 200, 8
MB = 2**20


def bare_model() -> BertModel:
    """The host, the same one every time."""
    torch.manual_seed(0)
    size = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    return BertModel(BertConfig(**size, num_attention_heads=12)).eval()


def drawn(like: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Tensors of a module's shapes, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator) * 0.02 for name, t in like.items()}


def write(root: Path, count: int) -> int:
    """Write modules to folders, ``lora_0`` and so on; return the bytes of all their tensors."""
    host = mg.Host(bare_model())
    host.implant("lora", mg.LoRA(rank=RANK), at=nn.Linear, active=False)
    tensors, card = packed(host, ["lora"], {}, False)
    size = 0
    for i in range(count):
        own = {k.replace("lora", f"lora_{i}", 1): t for k, t in drawn(tensors, i).items()}
        module = card.modules[0].model_copy(update={"name": f"lora_{i}"})
        said = {"names": [module.name], "modules": [module], "tensors": digest_of(own)}
        text = card.model_copy(update=said).to_text()
        write_tensors(own, root / module.name / FILE, {CARD: text})
        size += sum(t.nbytes for t in own.values())
    return size


def write_peft(root: Path, count: int) -> None:
    """Write the same tensors to PEFT's folders."""
    import peft
    from safetensors.torch import save_file

    host = mg.Host(bare_model())
    host.implant("lora", mg.LoRA(rank=RANK), at=nn.Linear, active=False)
    like = host["lora"].tensors()
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    config.target_modules = {path.rpartition(".")[2] for path in host["lora"].paths}
    for i in range(count):
        folder = root / f"lora_{i}"
        config.save_pretrained(folder)
        own = {f"lora:{name}": t for name, t in like.items()}
        named = {_peft_name(k): t for k, t in drawn(own, i).items()}
        save_file(named, folder / "adapter_model.safetensors")


def _peft_name(name: str) -> str:
    _, path, factor = name.split(":")
    return f"base_model.model.{path}.lora_{factor}.weight"


def resident() -> dict[str, int]:
    """The process's memory in bytes: its own (anonymous), and of files that it has mapped."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    said = dict(line.split(":", 1) for line in lines if ":" in line)
    return {key: 1024 * int(said[key].split()[0]) for key in ("RssAnon", "RssFile")}


def each(function: Callable[[Any], object], values: Iterable[Any]) -> list[float]:
    """Seconds of each call."""
    times = []
    for value in values:
        start = time.perf_counter()
        function(value)
        times.append(time.perf_counter() - start)
    return times


def ours(root: Path, count: int, size: int) -> tuple[Table, list[Claim]]:
    """Load all, use some, then all."""
    host = mg.Host(bare_model()).eval()
    ids = {"input_ids": torch.arange(100, 116)[None]}
    names = [f"lora_{i}" for i in range(count)]
    with torch.no_grad():
        host(**ids)
    gc.collect()
    before = resident()
    start, busy = time.perf_counter(), time.process_time()
    loading = each(lambda name: host.load(root / name, lazy=True), names)
    total, busy = time.perf_counter() - start, time.process_time() - busy
    mapped = resident()
    random.Random(0).shuffle(names)
    first, rest = names[:SAMPLE], names[SAMPLE:]
    using = each(host.use, first)
    with torch.no_grad():
        calls = each(lambda name: host(**ids, modules=name), first)
    later = each(host.use, rest)
    after = resident()
    check(host, names)
    grown = {key: after[key] - before[key] for key in after}
    ratio = sum(grown.values()) / size
    claims = [
        Claim(f"{count:,} modules loaded lazily", f"{total:.2f} s", "≤ 2 s"),
        Claim(f"first use of {len(first)} of them", _spread(using), "p50 ≤ 30 ms"),
        Claim("memory with all in use / bytes of their tensors", f"{ratio:.3f}", "≤ 1.1"),
    ]
    table = Table(title=f"{count:,} modules of {size / count / MB:.2f} MiB, one thread")
    for title in ("", "asked", "modgraft"):
        table.add_column(title, justify="right" if title else "left")
    for claim in claims:
        table.add_row(claim.what, claim.asked, claim.ratio)
    table.add_row("that, in processor time", "", f"{busy:.2f} s")
    table.add_row("a lazy load", "", _spread(loading))
    table.add_row("a call with each of them after that", "", _spread(calls))
    if later:
        table.add_row(f"first use of the other {len(later)}", "", _spread(later))
    for what, then in (("all loaded", mapped), ("all in use", after)):
        said = ", ".join(f"{key} {(then[key] - before[key]) / MB:+,.0f}" for key in then)
        table.add_row(f"MiB more when {what}", "", said)
    table.add_row("MiB of the tensors", "", f"{size / MB:,.0f}")
    return table, claims


def check(host: mg.Host, names: list[str]) -> None:
    """Each module must have the tensors that were written."""
    for name in names:
        have = host[name].tensors()
        own = drawn({f"lora:{key}": t for key, t in have.items()}, int(name.split("_")[1]))
        for key, tensor in have.items():
            torch.testing.assert_close(tensor, own[f"lora:{key}"], rtol=0, atol=0)


def theirs(root: Path, count: int) -> float:
    """Seconds that PEFT takes to load its folders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        start = time.perf_counter()
        model = peft.PeftModel.from_pretrained(bare_model(), root / "lora_0", "lora_0")
        for i in range(1, count):
            model.load_adapter(root / f"lora_{i}", f"lora_{i}")
    return time.perf_counter() - start


def _spread(seconds: list[float]) -> str:
    ms = [1e3 * s for s in seconds]
    return f"p50 {median(ms):.2f} ms, p95 {quantiles(ms, n=20)[-1]:.2f} ms"


def main() -> None:
    """Write, load, use and compare; print one table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--modules", type=int, default=MODULES)
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as root:
        size = write(Path(root), options.modules)
        table, claims = ours(Path(root), options.modules, size)
    with TemporaryDirectory() as root:
        count = min(PEFTS, options.modules)
        write_peft(Path(root), count)
        seconds = theirs(Path(root), count)
        table.add_row(f"PEFT's load_adapter of {count}", "", f"{seconds:.2f} s")
        claims[0] = Claim(
            claims[0].what, claims[0].ratio, claims[0].asked, f"{seconds:.2f} s for {count}"
        )
    show([table], claims, options)


if __name__ == "__main__":
    main()
