"""What two processes train; run by test_processes with torchrun: `two_processes.py FOLDER`.

Each function trains in one way, and returns what the test compares with one process. The first
process writes all of it to FOLDER/found.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.profiler import profile
from torch.utils.data import DataLoader

import modgraft as mg
from modgraft.core.errors import ModgraftError
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.training.fit import fit
from modgraft.training.history import History
from modgraft.training.stream import label_tokens
from training.tiny import Line, loader, points, t5

GIVEN: dict[str, Any] = {"progress": False, "note": False}


def rows(n: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(50, (n, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def shuffled(batch: int) -> DataLoader:
    """Thirteen batches of four rows, or seven of eight, of which the last has four."""
    return DataLoader(rows(52), batch, shuffle=True)


def host_of(seed: int = 0, rank: int = 4) -> mg.Host:
    """A GPT with one module in force and one that is not."""
    torch.manual_seed(seed)
    host = mg.Host(GPT(GPTConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2)))
    torch.manual_seed(0)
    host.implant("qa", mg.LoRA(rank=rank), at=["query", "value"])
    host.implant("idle", mg.LoRA(rank=4), at="up", active=False)
    return host


def curve(history: History) -> dict[str, Any]:
    return {
        "losses": history.losses,
        "evaluations": [e["loss"] for e in history.evaluations],
        "untouched": history.untouched,
        "parts": history.parts,
    }


def over_an_epoch(host: mg.Host, batch: int, **more: Any) -> History:
    return host.fit(
        shuffled(batch), train=["qa", "idle"], steps=14, lr=1e-2, evaluate=shuffled(batch),
        evaluate_every=7, **GIVEN, **more,
    )  # fmt: skip


def whole_model(batch: int, optimizer: str) -> list[float]:
    """Train a GPT with tables of pairs, whose gradients are sparse, over the end of an epoch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    host = mg.Host(GPT(GPTConfig(vocab_size=50, ngram_rows=(64,), **sizes)))
    given = GIVEN | {"steps": 10, "lr": 1e-3, "optimizer": optimizer}
    return host.fit(shuffled(batch), train="host", **given).losses


def two_tasks(accumulate: int) -> History:
    """Learn two tasks, of which the two processes may read different ones at a step."""
    host = host_of()
    data = {"qa": DataLoader(rows(24, 2), 2), "idle": DataLoader(rows(28, 3), 2)}
    tasks = mg.Tasks(data, sampling="equal", mix=1)
    return host.fit(tasks, train=[*data], steps=6, accumulate=accumulate, lr=1e-2, **GIVEN)


def statistics(host: Line) -> list[float]:
    """Train a host with running statistics, and return its last evaluation and these."""
    host.use_norm = True
    history = fit(host, points(6), steps=4, evaluate=points(6), **GIVEN)
    return [history.evaluations[-1]["loss"], *host.norm.running_mean.tolist()]


# -- in two processes ------------------------------------------------------------------------------


def accumulated(folder: Path) -> dict[str, Any]:
    """A T5 whose batches are weighed, resumed when it was over."""
    given = GIVEN | {
        "lr": 1e-3, "weigh": label_tokens, "accumulate": 2, "evaluate_every": 2, "save_every": 2,
        "evaluate": loader(n=9, noisy=False), "folder": folder / "run", "steps": 4,
    }  # fmt: skip
    host, data = t5(dropout=0.0).double(), loader(n=16, batch=2, noisy=False, shuffle=False)
    history = fit(host, data, **given)
    weights = {n: p.detach().clone() for n, p in host.named_parameters()}
    save_file(weights, folder / f"{distributed.get_rank()}.safetensors")
    again = fit(t5(3, dropout=0.0).double(), data, **given)
    assert again.losses == history.losses
    assert [e["loss"] for e in again.evaluations] == [e["loss"] for e in history.evaluations]
    assert again.resumed_from == 4
    return curve(history)


def replicated(folder: Path) -> dict[str, Any]:
    return curve(over_an_epoch(host_of(), 4))


def sent(folder: Path) -> dict[str, Any]:
    """Count the numbers that are sent, by what sends them."""
    host = host_of()
    with profile(record_shapes=True) as seen:
        host.fit(shuffled(4), train="qa", steps=3, **GIVEN)
    found: dict[str, Any] = {
        "modules": sum(p.numel() for p in host["qa"].parameters()),
        "host": sum(p.numel() for p in host.model.parameters()),
    }
    for event in seen.events():
        if event.name in ("gloo:broadcast", "gloo:all_reduce"):
            found.setdefault(event.name, []).append(event.input_shapes[0][0])
    return found


def sharded(folder: Path) -> dict[str, Any]:
    """Blocks, and what is around them, spread by fully_shard; saved, and gone on with whole."""
    host = host_of()
    for block in host.model.blocks:
        fully_shard(block)
    fully_shard(host.model)
    found = curve(over_an_epoch(host, 4, folder=folder / "sharded"))
    host.save("qa", folder / "qa")
    again = over_an_epoch(host_of(), 4, folder=folder / "sharded")
    assert again.resumed_from == 14
    assert again.losses == found["losses"]
    return found | {"refused": refused(lambda: host.merge("qa"))}


def tasks(folder: Path) -> dict[str, Any]:
    return curve(two_tasks(accumulate=1))


def tables(folder: Path) -> dict[str, list[float]]:
    return {optimizer: whole_model(4, optimizer) for optimizer in ("adamw", "lion", "muon")}


def moving(folder: Path) -> list[float]:
    return statistics(Line())


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except ModgraftError as error:
        return str(error)
    return ""


def batches(some: list[dict[str, torch.Tensor]]) -> DataLoader:
    return DataLoader(some, 4)


def unlike(folder: Path) -> dict[str, str]:
    """What each of several differences between the processes is refused with."""
    one = distributed.get_rank()
    every = rows(16)
    given = GIVEN | {"train": "qa", "steps": 2}
    return {
        "host": refused(lambda: host_of(seed=one).fit(batches(every), **given)),
        "module": refused(lambda: host_of(rank=2 + one).fit(batches(every), **given)),
        "lr": refused(lambda: host_of().fit(batches(every), lr=1e-3 * (1 + one), **given)),
        "data": refused(lambda: host_of().fit(batches(every[8 * one :]), **given)),
    }


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    ways = (accumulated, replicated, sent, sharded, tasks, tables, moving, unlike)
    found = {way.__name__: way(folder) for way in ways}
    every: list[Any] = [None, None]
    distributed.all_gather_object(every, found)
    if distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(every))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
