"""How a run shows itself: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: seconds between two plain lines
EVERY = 5.0
#: parts of a batch whose losses are shown; all of them are in metrics.jsonl
SHOWN = 6


class Show:
    """Shows loss, learning rate, steps a second and time left while a run goes on.

    On a terminal a bar in place; in a pipe or a log file one line at the start, at the end and
    every `EVERY` seconds. Both go to standard error, so that a program's own output stays clean.

    Args:
        label: what is being trained, first on the line.
        total: number of steps of the whole run.
        start: steps taken before, in the run that is resumed.
        enabled: False shows nothing.

    """

    def __init__(self, label: str, total: int, *, start: int = 0, enabled: bool = True) -> None:
        self.label, self.total, self.start, self.enabled = label, total, start, enabled
        self.console = Console(stderr=True, highlight=False)
        self._began = self._shown = time.monotonic()
        self._parts: dict[str, float] = {}
        self._bar: Progress | None = None
        if enabled and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console,
                speed_estimate_period=60,
            )
            self._task = self._bar.add_task(label, total=total, completed=start, line="")

    def __enter__(self) -> Show:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(
        self, step: int, loss: float, lr: float, parts: Mapping[str, float] | None = None
    ) -> None:
        """A step was taken; `parts` are the losses of what was in its batch, by name."""
        if not self.enabled:
            return
        now = time.monotonic()
        rate = (step - self.start) / max(now - self._began, 1e-9)
        self._parts |= parts or {}  # a step has some of them: the last of each is shown
        own = "".join(f"  {name} {value:.4f}" for name, value in list(self._parts.items())[:SHOWN])
        text = f"loss {loss:.4f}{own}  lr {lr:.2e}  {rate:.2f} steps/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=text)
        elif step in (self.start + 1, self.total) or now - self._shown >= EVERY:
            self._shown = now
            left = clock((self.total - step) / rate)
            self.say(f"step {step}/{self.total}  {text}  {left} left")

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if not self.enabled:
            return
        if self._bar is not None:
            self.console.print(f"{self.label}: {text}", markup=False)
        else:
            # rich would wrap a long line at 80 columns where there is no terminal to fit
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as "m:ss", or "h:mm:ss" from an hour on."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
