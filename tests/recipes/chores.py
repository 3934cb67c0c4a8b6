"""What the jobs of test_workers.py do, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from modgraft.core.errors import DataError
from modgraft.core.files import held
from modgraft.recipes.workers import Job, side_by_side
from modgraft.training.processes import Interrupt


def note(folder: Path, word: str, seconds: float = 0.0) -> None:
    """Append that it began and that it ended, one line each, to `folder/events`."""
    for what in ("began", "ended"):
        with (folder / "events").open("a") as file:
            file.write(f"{what} {word}\n")
        if what == "began":
            time.sleep(seconds)
    print("a line for the log")
    (folder / word).touch()


def refuse(folder: Path) -> None:
    if not (folder / "remedied").exists():
        raise DataError("the image is missing", id="7", file="7/image.png", remedy="Put it there")


def stumble() -> None:
    raise RuntimeError("no message for people")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def learn(folder: Path, steps: int, seconds: float) -> None:
    """Count to `steps` in `folder/count`, as fit trains: a step is done whole, then it stops."""
    folder.mkdir(exist_ok=True)
    (folder / "pid").write_text(str(os.getpid()))
    count = folder / "count"
    with Interrupt() as interrupt:
        for step in range(int(count.read_text()) + 1 if count.exists() else 1, steps + 1):
            time.sleep(seconds)
            line = {"step": step, "split": "train", "loss": 1 / step, "lr": 1e-3}
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            if interrupt.requested:
                count.write_text(str(step))
                (folder / "stopped").write_text(f"after step {step}")
                raise KeyboardInterrupt
    count.write_text(str(steps))


def jobs(folder: Path, seconds: float = 0.05) -> list[Job]:
    """Two that learn for long, as a run of the recipe has them, with a step in so many seconds."""
    return [
        Job(k, f"Net {k}", learn, (folder / k, 200, seconds), folder / k, 200)
        for k in ("one", "two")
    ]


if __name__ == "__main__":
    home = Path(sys.argv[1])
    try:
        with held(home, "at work") as lock:
            side_by_side(jobs(home, *map(float, sys.argv[2:])), 2, Console(), lock)
    except KeyboardInterrupt:
        sys.exit(130)
