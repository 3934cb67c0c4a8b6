"""Run jobs in parallel processes with one torch thread each, and show their progress."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from modgraft.core.errors import ModgraftError
from modgraft.core.files import Lock
from modgraft.log.record.runs import part_of_a_run

PATIENCE = 30.0
"""Seconds that a stopped job has to finish its step and save, before it is killed."""

EVERY = 10.0
"""Seconds between lines of progress where the output is no terminal."""


@dataclass(frozen=True)
class Job:
    """A function to run in a separate process.

    Attributes:
        key: Its name among the jobs.
        title: Its description for people.
        function: A module-level function.
        args: Its arguments, which must be picklable.
        folder: The folder of its log, and of a ``metrics.jsonl`` that shows its progress.
        steps: The number of the last step in that file; None for a job without steps.
        after: Keys of the jobs that must end first; a key that no job has counts as done.
        last_file: The file that the job writes last: once it exists, the job is done.
    """

    key: str
    title: str
    function: Callable[..., None]
    args: tuple[Any, ...]
    folder: Path
    steps: int | None = None
    after: tuple[str, ...] = ()
    last_file: Path | None = None

    @property
    def done(self) -> bool:
        """Whether the job has already run to its end."""
        return self.last_file is not None and self.last_file.exists()


def side_by_side(
    jobs: Sequence[Job], workers: int, console: Console | None = None, lock: Lock | None = None
) -> None:
    """Run the jobs that are not done, at most ``workers`` at a time, and show their progress.

    Jobs start in order, each as soon as the jobs that it depends on have ended. They share the
    ``lock`` of their run's folder, so that it holds until all of them have ended.

    Raises:
        ModgraftError: A job failed, or jobs wait for each other; the others are stopped after they
            have saved.
        KeyboardInterrupt: After every job has saved; a second Ctrl-C does not wait for that.
    """
    console = console or Console()
    waiting = [job for job in jobs if not job.done]
    missing = {job.key for job in waiting}
    running: dict[str, tuple[Job, BaseProcess]] = {}
    context = _context(waiting)
    with _ProgressBoard(console) as board:
        try:
            while waiting or running:
                ready = [job for job in waiting if missing.isdisjoint(job.after)]
                if not ready and not running:
                    stuck = ", ".join(job.key for job in waiting)
                    raise ModgraftError(f"these jobs wait for each other: {stuck}")
                for job in ready[: workers - len(running)]:
                    waiting.remove(job)
                    board.start(job)
                    work = job.function, job.args, job.folder, lock
                    process = context.Process(target=_child, args=work, daemon=True)
                    process.start()
                    running[job.key] = job, process
                for key, (job, process) in list(running.items()):
                    board.update(job)
                    if process.exitcode is not None:
                        del running[key]
                        if process.exitcode:
                            raise ModgraftError(_failure(job, process.exitcode))
                        board.finish(job)
                        missing.discard(key)
                time.sleep(0.2)
        except KeyboardInterrupt:
            board.say("stopping: every job ends its step and saves; Ctrl-C again does not wait")
            raise
        finally:
            _stop([process for _, process in running.values()])


def _context(jobs: Sequence[Job]) -> Any:
    """Return the context that starts processes, with torch imported once for all, where possible.

    On Linux, a server process imports the jobs' modules and then forks for every job. Forking this
    process itself might hang in torch's thread pools. On other systems, whose libraries may not
    survive a fork at all, every job imports everything again.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted({job.function.__module__ for job in jobs}))
    # A terminal sends Ctrl-C to every process. Only this one should receive it, and then stop the
    # jobs after their current step: they inherit the blocked signal. The resource tracker is
    # started first because its start would unblock the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _child(
    function: Callable[..., None], args: tuple[Any, ...], folder: Path, lock: Lock | None
) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    end_with_parent()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").unlink(missing_ok=True)
    log = (folder / "log.txt").open("a", encoding="utf-8")
    with log, redirect_stdout(log), redirect_stderr(log):
        try:
            with part_of_a_run():  # the run writes the note; trainings inside a job write none
                function(*args)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:  # noqa: BLE001  (it goes to the log and the exit status)
            traceback.print_exc()
            shown = str(error) if isinstance(error, ModgraftError) else repr(error)
            (folder / "error.txt").write_text(shown, encoding="utf-8")
            sys.exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM as Ctrl-C, on which ``fit`` finishes its step and saves."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(number, frame)


def end_with_parent() -> None:
    """Send this process a SIGTERM once its parent has ended, so that it does not run on alone.

    Does nothing in a process that ``multiprocessing`` did not start.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _failure(job: Job, status: int) -> str:
    error = job.folder / "error.txt"
    if error.is_file():
        why = error.read_text(encoding="utf-8")
        error.unlink()
    elif status == -signal.SIGKILL:
        why = "its process was killed, by somebody or for want of memory"
    else:
        why = f"its process ended with status {status}, without a word"
    return f"{job.title}: {why}\n(whole log: {job.folder / 'log.txt'}; the same command goes on)"


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()


class _ProgressBoard:
    """Shows progress: bars on a terminal, otherwise a line every few seconds."""

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

    def __enter__(self) -> _ProgressBoard:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def start(self, job: Job) -> None:
        self.began[job.key] = time.monotonic()
        self.tasks[job.key] = self.bars.add_task(job.title, total=job.steps, state="")
        if not self.console.is_terminal:
            self.say(f"{job.title}: started")

    def update(self, job: Job) -> None:
        line = _last_line(job.folder / "metrics.jsonl") if job.steps else None
        if line is not None:
            self.bars.update(self.tasks[job.key], completed=line["step"])
            self.bars.update(self.tasks[job.key], state=self._state(job, line))
        if not self.console.is_terminal and time.monotonic() - self.spoken > EVERY:
            self.spoken = time.monotonic()
            for key in [k for k in self.began if k in self.tasks]:
                state = self.bars.tasks[self.tasks[key]]
                done = f"{state.completed:.0f}/{state.total:.0f}" if state.total else "running"
                self.say(f"{state.description}: {done}  {state.fields['state']}")

    def finish(self, job: Job) -> None:
        seconds = time.monotonic() - self.began.pop(job.key)
        task = self.tasks.pop(job.key)
        self.bars.update(task, total=job.steps or 1, completed=job.steps or 1, state="done")
        self.bars.stop_task(task)
        if not self.console.is_terminal:
            self.say(f"{job.title}: done in {seconds:.0f} s")

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

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _last_line(path: Path) -> dict[str, Any] | None:
    """Read the last complete training record of a metrics file; None if there is none yet."""
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
