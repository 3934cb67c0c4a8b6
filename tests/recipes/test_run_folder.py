"""One command at a time in a run's folder, from its first byte until the last process has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chores
import pytest

from command import files, modgraft, refused, train
from modgraft.core.errors import ModgraftError
from modgraft.core.files import LOCK, held
from modgraft.recipes.folder import run_folder

HERE = Path(chores.__file__)


def a_run(folder: Path) -> dict[str, tuple[int, int]]:
    """A run whose data are prepared, and of which no net has begun to train."""
    (folder / "seed0" / "data").mkdir(parents=True)
    (folder / "seed0" / "data" / "problems.json").write_text("{}")
    (folder / "run.json").write_text("{}")
    return files(folder)


@pytest.mark.parametrize("args", [(), ("--fresh",), ("--set", "batch=3")])
@pytest.mark.parametrize("command", [("mmcot", "train"), ("recipe", "madx")])
def test_a_second_command_changes_nothing(
    tmp_path: Path, command: tuple[str, ...], args: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    before = a_run(run)
    with held(run, "at work"):
        result = modgraft(*command, "--run", run, *args)
        words = ("another process is at work", str(run), f"process {os.getpid()}: ")
        assert "give another folder" in refused(result, *words)
    assert files(run) == before


def test_fresh_deletes_a_run_and_nothing_else(tmp_path: Path) -> None:
    a_run(tmp_path / "run")
    with run_folder(tmp_path / "run", fresh=True):
        assert [p.name for p in (tmp_path / "run").iterdir()] == [LOCK]
    with run_folder(tmp_path / "run", fresh=True):  # as after a kill before the first byte
        pass
    assert not any((tmp_path / "run").iterdir())
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    for how in ((), ("--fresh",)):
        refused(train(tmp_path / "own", *how), "holds no run, and other things (notes.txt", "own")
    assert files(tmp_path / "own").keys() == {"notes.txt"}


def test_the_lock_of_a_killed_run_ends_with_its_last_process(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE), str(tmp_path), "2"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not all((tmp_path / k / "pid").exists() for k in ("one", "two")):
            assert process.poll() is None, "it ended before its jobs began"
            assert time.monotonic() < end
            time.sleep(0.05)
        with (
            pytest.raises(ModgraftError, match=rf"process {process.pid}: chores.py"),
            held(tmp_path, "at work"),
        ):
            pass
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with (
        pytest.raises(ModgraftError, match="another process is at work"),
        held(tmp_path, "at work"),
    ):
        pass  # its jobs end their steps first
    while time.monotonic() < end:
        try:
            with held(tmp_path, "at work"):
                break
        except ModgraftError:
            time.sleep(0.1)
    else:
        pytest.fail("the lock was never released")
    assert all((tmp_path / k / "stopped").exists() for k in ("one", "two"))
    assert not (tmp_path / LOCK).exists()
