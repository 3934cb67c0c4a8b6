"""Trains, is killed again and again by SIGKILL, and resumes; run by test_checkpoint in a process.

`python crash.py FOLDER WAY` trains several times: in FOLDER/whole uninterrupted; in FOLDER/timed
with attempts that are killed at random moments; in FOLDER/inside with attempts that kill themselves
at a random call into the file system while they save (fsync, mkdir, rename, rmtree), which covers a
save half done; in FOLDER/killed with both. Each then runs to its end. One process imports
everything once and forks a child for every attempt: a kill costs no import. Prints what was done as
one line of JSON.

The ways: "t5", with rows and an order from generators of their own; and "adamw", "lion", "muon": a
GPT on a corpus of shards, and then a LoRA in it, by that optimiser.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_model
from tiny import Pairs, collate, loader, t5
from torch.utils.data import DataLoader, Sampler

import modgraft as mg
from modgraft.data.shards import Shards, Windows, character_tokenizer, write_shards
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.training.fit import fit

STEPS = 30


class Own:
    """Holds a generator, as the samplers of other libraries do."""

    def __init__(self, generator: object) -> None:
        self.generator = [generator]


class Shuffled(Sampler):
    """Orders rows by a generator of its own, which moves on from epoch to epoch."""

    def __init__(self, n: int) -> None:
        self.n, self.own = n, Own(random.Random(5))

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        rows = list(range(self.n))
        self.own.generator[0].shuffle(rows)
        return iter(rows)


class Cut(Pairs):
    """Cuts rows by a generator of its own, beside the noise from torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Own(np.random.default_rng(5))

    def __getitem__(self, i: int) -> dict[str, object]:
        row = super().__getitem__(i)
        row["input_ids"][int(self.own.generator[0].integers(1, 7)) :] = 2
        return row


def shuffled() -> DataLoader:
    return DataLoader(Cut(), batch_size=4, sampler=Shuffled(22), collate_fn=collate)


def train_t5(folder: str) -> list[int | None]:
    host = t5(seed=0)
    history = fit(
        host, shuffled(), steps=STEPS, lr=3e-3, accumulate=2, evaluate=loader(n=8, noisy=False),
        evaluate_every=7, save_every=4, restore_best=True, folder=folder, progress=False,
    )  # fmt: skip
    save_model(host, folder + "/final.safetensors")
    return [history.resumed_from]


def train_gpt(folder: str, optimizer: str) -> list[int | None]:
    """Train a GPT with dropout and tables of pairs on shards, and then a LoRA in it on the rest."""
    shards = Shards.open(Path(folder).parent / "shards")
    half = len(shards) // 2
    first, rest = (Windows(tokens, 16, seed=1) for tokens in (shards[:half], shards[half:]))
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=shards.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        dropout=0.1, ngram_rows=(256,),
    )  # fmt: skip
    host = mg.Host(GPT(config))
    given = {
        "steps": STEPS, "lr": 3e-3, "optimizer": optimizer, "evaluate": rest.loader(16),
        "evaluate_every": 7, "save_every": 3, "restore_best": True, "progress": False,
    }  # fmt: skip
    learned = host.fit(first.loader(8), train="host", folder=folder + "/host", **given)
    host.implant("other", mg.LoRA(rank=4), at=["query", "value", "up", "down"])
    adapted = host.fit(rest.loader(8), train="other", folder=folder + "/other", **given)
    save_model(host, folder + "/final.safetensors")
    return [learned.resumed_from, adapted.resumed_from]


def train(folder: str, way: str) -> list[int | None]:
    return train_t5(folder) if way == "t5" else train_gpt(folder, way)


def die_at(count: int) -> None:
    """Have this process kill itself at its `count`-th call of a function that changes a disk."""
    left = [count]

    def counted(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: object, **more: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **more)

        setattr(owner, name, call)

    for owner, name in [(os, "fsync"), (Path, "rename"), (shutil, "rmtree")]:
        counted(owner, name)
    counted(Path, "mkdir")


def attempt(folder: str, way: str, how: str = "", when: float | None = None) -> bool:
    """Run the child; return whether it finished."""
    child = os.fork()
    if child == 0:
        if how == "inside" and when is not None:
            die_at(int(when))
        resumed = train(folder, way)
        with Path(folder, "resumed").open("a") as file:
            file.write(f"{resumed}\n")
        os._exit(0)
    if how == "timed" and when is not None:
        time.sleep(when)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"a child failed with {status}, killed at {when}")
    return os.WIFEXITED(status)


def moments(way: str, seconds: float) -> dict[str, list[tuple[str, float]]]:
    """Return when each attempt is killed: seconds after its start, or at which call."""
    rng = random.Random(time.time_ns())  # other moments in every run; the report tells which
    if way == "t5":
        timed = [("timed", rng.uniform(0.05, 0.5) * seconds) for _ in range(5)]
        return {
            "timed": timed,
            "inside": [("inside", n) for n in [1, 2, *rng.sample(range(3, 50), 8)]],
        }
    # each attempt gets about a tenth of the way
    both: list[tuple[str, float]] = [
        *(("timed", rng.uniform(0.05, 0.35) * seconds) for _ in range(6)),
        *(("inside", n) for n in rng.sample(range(3, 30), 4)),
    ]
    rng.shuffle(both)
    return {"killed": both}


def main(folder: Path, way: str) -> dict[str, object]:
    t5()  # imports transformers, in the parent
    folder.mkdir(exist_ok=True)
    text = "".join(f"{i} bottles of beer on the wall, {i} bottles.\n" for i in range(60))
    write_shards(folder / "shards", character_tokenizer(text), [text], size=500)
    began = time.monotonic()
    (folder / "whole").mkdir()
    attempt(str(folder / "whole"), way)
    seconds = time.monotonic() - began
    report: dict[str, object] = {"seconds": seconds}
    for name, kills in moments(way, seconds).items():
        (folder / name).mkdir()
        ended = [attempt(str(folder / name), way, *kill) for kill in kills]
        attempt(str(folder / name), way)
        resumed = (folder / name / "resumed").read_text().splitlines()
        report[name] = {"moments": kills, "ended": ended, "resumed": resumed}
    return report


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
