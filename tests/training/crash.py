"""Trains, is killed again and again by SIGKILL, and resumes; run by test_checkpoint in a process.

`python crash.py FOLDER` trains three times: in FOLDER/whole uninterrupted; in FOLDER/timed with
attempts that are killed at random moments; in FOLDER/inside with attempts that kill themselves at
a random call into the file system while they save (fsync, mkdir, rename, rmtree), which covers a
save half done. Each then runs to its end. One process imports everything once and forks a child
for every attempt: a kill costs no import. Prints what was done as one line of JSON.
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
from safetensors.torch import save_model
from tiny import Pairs, collate, loader, t5
from torch.utils.data import DataLoader, Sampler

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


def train(folder: str) -> int | None:
    host = t5(seed=0)
    history = fit(
        host, shuffled(), steps=STEPS, lr=3e-3, accumulate=2, evaluate=loader(n=8, noisy=False),
        evaluate_every=7, save_every=4, restore_best=True, folder=folder, progress=False,
    )  # fmt: skip
    save_model(host, folder + "/final.safetensors")
    return history.resumed_from


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


def attempt(folder: str, how: str, when: float | None) -> bool:
    """Run the child; return whether it finished."""
    child = os.fork()
    if child == 0:
        if how == "inside" and when is not None:
            die_at(int(when))
        resumed = train(folder)
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


def main(folder: Path) -> dict[str, object]:
    t5()  # imports transformers, in the parent
    rng = random.Random(time.time_ns())  # other moments in every run; the report tells which
    began = time.monotonic()
    for name in ("whole", "timed", "inside"):
        (folder / name).mkdir(parents=True)
    attempt(str(folder / "whole"), "", None)
    seconds = time.monotonic() - began
    whens = {
        "timed": [rng.uniform(0.05, 0.5) * seconds for _ in range(5)],
        "inside": [1, 2, *rng.sample(range(3, 50), 8)],
    }
    report: dict[str, object] = {"seconds": seconds}
    for how, moments in whens.items():
        ended = [attempt(str(folder / how), how, when) for when in moments]
        attempt(str(folder / how), how, None)
        resumed = (folder / how / "resumed").read_text().split()
        report[how] = {"moments": moments, "ended": ended, "resumed": resumed}
    return report


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
