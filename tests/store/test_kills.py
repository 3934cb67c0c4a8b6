"""A save that is killed leaves the modules that were there or the new ones, whole.

``make damage`` kills 200 saves; ``KILLS`` says how many.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import modgraft as mg
from modgraft.store.folder import native
from modgraft.store.verify import verify

KILLS = int(os.environ.get("KILLS", "20"))
LEFT = 3  # temporaries of one save

# A process that has imported everything reads lines of a folder and a number. Where there is no
# such folder it saves version 1, and then forks a child. That saves versions 2, 1, 2, 1 … for good;
# or, for a number n above 0, version 2 once, and ends itself at the n-th file that Python is about
# to open, rename or remove. The answer is the child's process and, when it has ended, how.
CODE = """
import contextlib, os, signal, sys, torch, modgraft as mg
def host(version):
    host = mg.Host(torch.nn.Sequential(torch.nn.Linear(64, 64)))
    with torch.no_grad():
        host.model[0].weight.fill_(0.5), host.model[0].bias.zero_()
    host.implant("qa", mg.LoRA(rank=16), at="0")
    for parameter in host["qa"].parameters():
        torch.nn.init.constant_(parameter, version)
    return host
hosts = {version: host(version) for version in (1, 2)}
def save(version):
    hosts[version].save("qa", folder, metrics={"version": float(version)})
steps = 0
def step(event, _):
    global steps
    if armed and event in {"open", "os.rename", "os.remove", "os.chmod", "tempfile.mkstemp"}:
        steps -= 1
        if not steps:
            os.kill(os.getpid(), signal.SIGKILL)
armed = False
sys.addaudithook(step)
for line in sys.stdin:
    folder, steps = line.rsplit(maxsplit=1)
    if not os.path.exists(folder):
        save(1)
    child = os.fork()
    if not child:
        if steps := int(steps):
            armed = True
            save(2)
            os._exit(0)
        while True:
            for version in (2, 1):
                with contextlib.suppress(mg.ModgraftError):
                    save(version)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Saver:
    """The process that saves."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", CODE]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self) -> int:
        assert self.process.stdout
        return int(self.process.stdout.readline())

    def start(self, folder: Path, steps: int = 0) -> int:
        """Start a child, and return its process."""
        assert self.process.stdin
        self.process.stdin.write(f"{folder} {steps}\n")
        self.process.stdin.flush()
        return self.answer()

    def kill(self, child: int) -> None:
        os.kill(child, signal.SIGKILL)
        assert self.answer() == signal.SIGKILL


@pytest.fixture(scope="module")
def saves() -> Iterator[Saver]:
    made = Saver()
    yield made
    made.process.communicate(timeout=60)


def version(folder: Path) -> int:
    """Return which version is in a folder, which is whole."""
    found = native(folder)
    said = int(found.card.metrics["version"])
    assert all(tensor.eq(said).all() for tensor in found.read().values())
    return said


def host() -> mg.Host:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[0].bias.zero_()
    return mg.Host(model)


def loaded(folder: Path) -> float:
    """Return a value of the module that ``host.load`` finds."""
    return host().load(folder).places[0].A[0, 0].item()


def is_left(problem: str) -> bool:
    """Return whether a problem is what a killed save may leave, and no damage."""
    return ".part is what a save" in problem or "is not what the card" in problem


def test_kills_at_random_moments(saves: Saver, tmp_path: Path) -> None:
    draw, folder, seen = random.Random(0), tmp_path / "qa", Counter[str]()
    saves.start(folder, 10**9)
    saves.answer()
    start = time.perf_counter()
    saves.start(folder, 10**9)
    saves.answer()
    one = time.perf_counter() - start  # a save's time
    (folder / "mine.txt").write_text("a user's own")
    before = version(folder)
    for _ in range(KILLS):
        child = saves.start(folder)
        time.sleep(draw.uniform(0, 4 * one))
        saves.kill(child)
        now, found = version(folder), verify(folder)
        assert loaded(folder) == now
        assert found.whole, found.problems
        assert all(map(is_left, found.problems)), found.problems
        left = [each for each in folder.iterdir() if each.suffix == ".part"]
        assert len(left) <= LEFT
        seen[f"version {now}"] += 1
        seen["temporaries"] += bool(left)
        seen["derived files that lag behind"] += any("is not what" in p for p in found.problems)
        seen["another version than before"] += now != before
        before = now
    print(f"{KILLS} kills: {dict(seen)}")
    assert (folder / "mine.txt").read_text() == "a user's own"
    assert min(seen["version 1"], seen["version 2"]) > 0


def test_a_kill_at_each_step_of_a_save(saves: Saver, tmp_path: Path) -> None:
    folder, seen, status = tmp_path / "qa", [], -1
    while status != 0:
        saves.start(folder, len(seen) + 1)
        status = saves.answer()
        seen.append(version(folder))
        found = verify(folder)
        assert found.whole
        assert all(map(is_left, found.problems)), found.problems
    assert seen == sorted(seen)  # the old one until the new one is there, at one step
    assert set(seen) == {1, 2}
    assert found.problems == []  # the last save, which ended, has left nothing of others


def test_a_reader_beside_a_writer(saves: Saver, tmp_path: Path) -> None:
    folder, seen = tmp_path / "qa", Counter[int]()
    child, end = saves.start(folder), time.monotonic() + 1.5
    while time.monotonic() < end or len(seen) < 2:
        seen[version(folder)] += 1
    for _ in range(20):
        assert loaded(folder) in (1, 2)
    saves.kill(child)
    print(f"reads beside a writer: {dict(seen)}")


def test_two_processes_save_to_one_place(saves: Saver, tmp_path: Path) -> None:
    """One of them is told; the other's module is there, whole."""
    folder = tmp_path / "qa"
    child, own = saves.start(folder), host()
    implant = own.implant("qa", mg.LoRA(rank=16), at="0")
    with torch.no_grad():
        for parameter in implant.parameters():
            parameter.fill_(3)
    said: list[str] = []
    while len(said) < 3:
        try:
            own.save("qa", folder, metrics={"version": 3.0})
        except mg.ModgraftError as error:
            said.append(str(error))
        assert version(folder) in (1, 2, 3)
    saves.kill(child)
    assert all(f"another process is writing to {folder}" in each for each in said)
    own.save("qa", folder, metrics={"version": 3.0})
    assert version(folder) == 3
    assert verify(folder).problems == []
