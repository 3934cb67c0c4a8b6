"""Show the progress of a run: a bar on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from transformers.utils.notebook import NotebookProgressBar

#: seconds between two plain lines
EVERY = 5.0
#: how many parts' losses are shown; all of them are in metrics.jsonl
SHOWN = 6


class Show:
    """Show loss, learning rate, steps a second and time left during a run.

    On a terminal and in a notebook it is a bar; in a pipe or a log file, a line at the start, at
    the end and every `EVERY` seconds. Bar and lines go to standard error, apart from the program's
    output; a notebook has its bar below the cell.

    Args:
        label: stands first on the line.
        total: the number of steps of the whole run.
        start: the number of steps taken before the run was resumed.
        enabled: False shows nothing.
    """

    def __init__(self, label: str, total: int, *, start: int = 0, enabled: bool = True) -> None:
        self.label, self.total, self.start, self.enabled = label, total, start, enabled
        self.console = Console(stderr=True, highlight=False)
        self._began = self._shown = time.monotonic()
        self._parts: dict[str, float] = {}
        self._bar: Progress | None = None
        self._notebook: NotebookProgressBar | None = None
        if enabled and self.console.is_jupyter:
            # HTML alone: rich and tqdm need ipywidgets, and their bars are lost with the kernel.
            from transformers.utils.notebook import NotebookProgressBar

            self._notebook = NotebookProgressBar(total, prefix=escape(label))
            self._notebook.update(start)
        elif enabled and self.console.is_terminal:
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

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(
        self, step: int, loss: float, lr: float, parts: Mapping[str, float] | None = None
    ) -> None:
        """Show a step; `parts` are the losses of its batch's parts, by name."""
        if not self.enabled:
            return
        now = time.monotonic()
        rate = (step - self.start) / max(now - self._began, 1e-9)
        self._parts |= parts or {}  # not every step has every part: show the last loss of each
        of_parts = "".join(
            f"  {name} {value:.4f}" for name, value in list(self._parts.items())[:SHOWN]
        )
        text = f"loss {loss:.4f}{of_parts}  lr {lr:.2e}"
        if self._notebook is not None:
            self._notebook.update(step, comment=escape(text))
            return
        text += f"  {rate:.2f} steps/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=text)
        elif step in (self.start + 1, self.total) or now - self._shown >= EVERY:
            self._shown = now
            left = clock((self.total - step) / rate)
            self.say(f"step {step}/{self.total}  {text}  {left} left")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self.enabled:
            return
        if self._bar is not None:
            self.console.print(f"{self.label}: {text}", markup=False)
        elif self._notebook is not None:
            print(f"{self.label}: {text}")  # a notebook shows standard error as if it were one
        else:
            # rich would wrap a long line at 80 columns where there is no terminal to fit
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Format seconds as "m:ss", or "h:mm:ss" from an hour on."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
