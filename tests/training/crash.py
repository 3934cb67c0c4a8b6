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
from pathlib import Path

from safetensors.torch import save_model
from tiny import loader, t5

from modgraft.training.fit import fit

STEPS = 30


def train(folder: str) -> int | None:
    host = t5(seed=0)
    history = fit(
        host, loader(), steps=STEPS, lr=3e-3, accumulate=2, evaluate=loader(n=8, noisy=False),
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
