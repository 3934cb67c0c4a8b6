"""Jobs side by side: each a process of one torch thread, its progress seen throughout."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from modgraft.errors import ModgraftError


@dataclass(frozen=True)
class Job:
    """A function to run in a process of its own.

    Attributes:
        key: its name among the jobs.
        title: what a person reads.
        function: a module-level function; it must find out by itself that its work is done already.
        args: picklable arguments.
        folder: where its log goes, and where a ``metrics.jsonl`` tells how far it is.
        steps: the last step in that file; None for a job that counts no steps.
        after: keys of jobs that must have ended before.
    """

    key: str
    title: str
    function: Callable[..., None]
    args: tuple[Any, ...]
    folder: Path
    steps: int | None = None
    after: tuple[str, ...] = ()


def side_by_side(jobs: Sequence[Job], workers: int, console: Console | None = None) -> None:
    """Run jobs, at most ``workers`` at once, and show how far each is.

    Raises:
        ModgraftError: if a job fails; the others are stopped, and what they have is kept.
        KeyboardInterrupt: after every job has saved what it has.
    """
    console = console or Console()
    waiting, done = list(jobs), set[str]()
    running: dict[str, tuple[Job, BaseProcess]] = {}
    spawn = multiprocessing.get_context("spawn")  # a forked torch may hang in its thread pools
    with _Board(console) as board:
        try:
            while waiting or running:
                for job in [j for j in waiting if done.issuperset(j.after)]:
                    if len(running) < workers:
                        waiting.remove(job)
                        process = spawn.Process(
                            target=_child, args=(job.function, job.args, job.folder), daemon=True
                        )
                        process.start()
                        running[job.key] = job, process
                        board.start(job)
                for key, (job, process) in list(running.items()):
                    board.update(job)
                    if process.exitcode is not None:
                        del running[key]
                        if process.exitcode:
                            raise ModgraftError(_failure(job, process.exitcode))
                        board.finish(job)
                        done.add(key)
                time.sleep(0.2)
        finally:
            _stop([process for _, process in running.values()])


def _child(function: Callable[..., None], args: tuple[Any, ...], folder: Path) -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stop saves, as Ctrl-C does
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "log.txt").open("a", encoding="utf-8")
    with log, redirect_stdout(log), redirect_stderr(log):
        try:
            function(*args)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:  # noqa: BLE001  (it goes to the log and the exit status)
            traceback.print_exc()
            shown = str(error) if isinstance(error, ModgraftError) else repr(error)
            (folder / "error.txt").write_text(shown, encoding="utf-8")
            sys.exit(1)


def _failure(job: Job, status: int) -> str:
    error = job.folder / "error.txt"
    if error.is_file():
        why = error.read_text(encoding="utf-8")
        error.unlink()
    else:
        why = f"its process ended with status {status}, without a word (out of memory?)"
    return f"{job.title}: {why}\n(whole log: {job.folder / 'log.txt'}; the same command goes on)"


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(30)
        if process.is_alive():
            process.kill()


class _Board:
    """Bars on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.began: dict[str, float] = {}
        self.first: dict[str, tuple[int, float]] = {}
        self.tasks: dict[str, TaskID] = {}
        self.spoken = time.monotonic()
        self.bars = Progress(
            TextColumn("{task.description:<46}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]:<58}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> _Board:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def start(self, job: Job) -> None:
        self.began[job.key] = time.monotonic()
        self.tasks[job.key] = self.bars.add_task(job.title, total=job.steps, state="")
        if not self.console.is_terminal:
            self._say(f"{job.title}: started")

    def update(self, job: Job) -> None:
        line = _last_line(job.folder / "metrics.jsonl") if job.steps else None
        if line is not None:
            self.bars.update(self.tasks[job.key], completed=line["step"])
            self.bars.update(self.tasks[job.key], state=self._state(job, line))
        if not self.console.is_terminal and time.monotonic() - self.spoken > 10:
            self.spoken = time.monotonic()
            for key in [k for k in self.began if k in self.tasks]:
                state = self.bars.tasks[self.tasks[key]]
                done = f"{state.completed:.0f}/{state.total:.0f}" if state.total else "running"
                self._say(f"{state.description}: {done}  {state.fields['state']}")

    def finish(self, job: Job) -> None:
        seconds = time.monotonic() - self.began.pop(job.key)
        task = self.tasks.pop(job.key)
        self.bars.update(task, total=job.steps or 1, completed=job.steps or 1, state="done")
        self.bars.stop_task(task)
        if not self.console.is_terminal:
            self._say(f"{job.title}: done in {seconds:.0f} s")

    def _state(self, job: Job, line: dict[str, Any]) -> str:
        step, now = int(line["step"]), time.monotonic()
        first, then = self.first.setdefault(job.key, (step, now))
        text = f"loss {line['loss']:.4f}"
        if line.get("lr") is not None:
            text += f"  lr {line['lr']:.1e}"
        if step > first and now > then:
            rate = (step - first) / (now - then)
            left = ((job.steps or step) - step) / rate
            text += f"  {rate:.1f} steps/s  {int(left) // 60}:{int(left) % 60:02d} left"
        return text

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last whole training record of a metrics file; None where there is none yet."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        tail = file.read().decode("utf-8", "replace").rpartition("\n")[0].split("\n")
    for text in reversed(tail):
        if text.startswith("{") and text.endswith("}") and '"train"' in text:
            return json.loads(text)
    return None
