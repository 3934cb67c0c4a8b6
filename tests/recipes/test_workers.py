from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import chores
import pytest
from chores import die, jobs, learn, leave, note, refuse, stumble
from rich.console import Console

from modgraft.core.errors import ModgraftError
from modgraft.recipes import workers
from modgraft.recipes.workers import Job, side_by_side

HERE = Path(chores.__file__)


@pytest.fixture(autouse=True)
def found_by_the_children(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def job(folder: Path, key: str, *after: str, seconds: float = 0.0) -> Job:
    args = (folder, key, seconds)
    return Job(key, f"Job {key}", note, args, folder / "log", after=after, last_file=folder / key)


def events(folder: Path) -> list[str]:
    return (folder / "events").read_text().splitlines()


# order


def test_jobs_run_in_their_order_after_those_they_wait_for(tmp_path: Path) -> None:
    asked = [job(tmp_path, "last", "first"), job(tmp_path, "first"), job(tmp_path, "any")]
    side_by_side(asked, 1, quiet())
    began = [e.split()[1] for e in events(tmp_path) if e.startswith("began")]
    assert began == ["first", "last", "any"]  # once it may run, the earlier one goes first
    assert "a line for the log" in (tmp_path / "log" / "log.txt").read_text()


def test_at_most_so_many_at_once_and_none_before_its_time(tmp_path: Path) -> None:
    parts = [job(tmp_path, k, seconds=0.6) for k in ("a", "b", "c")]
    side_by_side([job(tmp_path, "sum", "a", "b", "c"), *parts], 2, quiet())
    seen = events(tmp_path)
    running, most = 0, 0
    for event in seen:
        running += 1 if event.startswith("began") else -1
        most = max(most, running)
    assert most == 2
    assert seen[-2:] == ["began sum", "ended sum"]


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    (tmp_path / "first").touch()
    side_by_side([job(tmp_path, "first"), job(tmp_path, "next", "first", "absent")], 2, quiet())
    assert events(tmp_path) == ["began next", "ended next"]


def test_jobs_that_wait_for_each_other(tmp_path: Path) -> None:
    with pytest.raises(ModgraftError, match="wait for each other: a, b"):
        side_by_side([job(tmp_path, "a", "b"), job(tmp_path, "b", "a")], 2, quiet())


# failing


def test_a_failing_job_says_why_and_the_others_keep_what_they_have(tmp_path: Path) -> None:
    asked = [
        Job("net", "Net", learn, (tmp_path / "net", 400, 0.05), tmp_path / "net", 400),
        job(tmp_path, "wait", seconds=0.5),
        Job("eye", "Eye", refuse, (tmp_path,), tmp_path / "eye", after=("wait",)),
        job(tmp_path, "never", "eye"),
    ]
    with pytest.raises(ModgraftError) as caught:
        side_by_side(asked, 2, quiet())
    text = str(caught.value)
    assert text.startswith("Eye: 7/image.png, question '7': the image is missing. Put it there")
    assert f"whole log: {tmp_path / 'eye' / 'log.txt'}; the same command goes on" in text
    assert "Traceback" in (tmp_path / "eye" / "log.txt").read_text()
    assert "Traceback" not in text
    kept = int((tmp_path / "net" / "count").read_text())
    assert 0 < kept < 400
    assert not (tmp_path / "never").exists()

    (tmp_path / "remedied").touch()
    short = Job("net", "Net", learn, (tmp_path / "net", kept + 1, 0.0), tmp_path / "net")
    side_by_side([short, *asked[1:]], 2, quiet())
    assert (tmp_path / "never").exists()
    assert events(tmp_path).count("began wait") == 1
    steps = (tmp_path / "net" / "metrics.jsonl").read_text().count('"step"')
    assert steps == kept + 1  # it went on; no step was taken twice


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (stumble, r"RuntimeError\('no message for people'\)"),
        (die, "its process was killed, by somebody or for want of memory"),
        (leave, "its process ended with status 3, without a word"),
    ],
)
def test_how_a_job_may_end(tmp_path: Path, function: Callable[[], None], why: str) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "error.txt").write_text("what was wrong the last time")
    with pytest.raises(ModgraftError, match=rf"Job: {why}\n\(whole log: .*log.txt"):
        side_by_side([Job("job", "Job", function, (), folder)], 1, quiet())
    assert not (folder / "error.txt").exists()


# stopping


def wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Two jobs that learn, in a process group of their own, a few steps along."""
    process = subprocess.Popen(
        [sys.executable, str(HERE), str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: all((tmp_path / k / "metrics.jsonl").exists() for k in ("one", "two")))
    yield process
    process.kill()
    process.communicate()


def stopped(folder: Path) -> list[int]:
    """The steps that each had done, after checking that it ended a step and then stopped."""
    pids = [int((folder / k / "pid").read_text()) for k in ("one", "two")]
    wait_for(lambda: not any(map(alive, pids)))
    counts = [int((folder / k / "count").read_text()) for k in ("one", "two")]
    for key, count in zip(("one", "two"), counts, strict=True):
        assert 0 < count < 200
        assert (folder / key / "stopped").read_text() == f"after step {count}"
        assert (folder / key / "metrics.jsonl").read_text().count('"step"') == count
    return counts


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("everyone", [False, True], ids=["parent", "terminal"])
def test_ctrl_c_stops_all_after_a_step_and_it_goes_on(
    tmp_path: Path, started: subprocess.Popen[str], everyone: bool
) -> None:
    # a terminal sends it to every process of the group
    (os.killpg if everyone else os.kill)(started.pid, signal.SIGINT)
    out, _ = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "stopping: every job ends its step and saves" in out
    assert "Traceback" not in out
    assert "Net one: started" in out
    counts = stopped(tmp_path)
    again = [
        Job(j.key, j.title, learn, (j.folder, n + 2, 0.0), j.folder)
        for j, n in zip(jobs(tmp_path), counts, strict=True)
    ]
    side_by_side(again, 2, quiet())
    for j, n in zip(again, counts, strict=True):
        assert (j.folder / "metrics.jsonl").read_text().count('"step"') == n + 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_of_a_killed_parent_save_and_stop(
    tmp_path: Path, started: subprocess.Popen[str]
) -> None:
    started.kill()
    stopped(tmp_path)


# progress


def test_progress_off_a_terminal_is_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "EVERY", 0.5)
    console = quiet()
    net = Job("net", "Net", learn, (tmp_path / "net", 40, 0.05), tmp_path / "net", 40)
    side_by_side([net, job(tmp_path, "other")], 2, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "Net: started"
    assert "Job other: started" in lines
    shown = [line for line in lines if re.match(r"Net: \d+/40  loss 0\.\d{4}  lr 1\.0e-03", line)]
    assert any(re.search(r"steps/s  \d+:\d\d left$", line) for line in shown)
    assert re.fullmatch(r"Net: done in \d+ s", lines[-1])


def test_progress_on_a_terminal_is_bars(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    net = Job("net", "Net", learn, (tmp_path / "net", 20, 0.05), tmp_path / "net", 20)
    side_by_side([net], 1, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Net" in text
    assert "loss" in text
    assert "done" in text
    assert "started" not in text
