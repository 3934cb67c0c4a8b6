"""The record of a training run: `History` in memory, `metrics.jsonl` on disk."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from modgraft.core.errors import ModgraftError
from modgraft.core.tables import Page, Table, table

#: the metrics file's name within a run's folder
METRICS = "metrics.jsonl"
#: how many evaluations ``print(history)`` shows; all of them are in `History.evaluations`
SHOWN = 8


@dataclass(slots=True, repr=False)
class History:
    """The record of one run of `fit`, resumed parts included.

    Attributes:
        steps: the steps whose loss was recorded, 1 … T.
        losses: the training loss at each of `steps`, before that step's update.
        evaluations: for each evaluation a dict with "step", "seconds" and the measured values.
        best: the evaluation with the best monitored value, None without `evaluate`.
        monitor: the name of the monitored value.
        seconds: wall time, added up over interruptions.
        resumed_from: the step this call continued from, None if it started at the beginning.
        parts: at each of `steps` the losses by name, for batches that have parts (`mg.Tasks`).
        stopped: why it ended: "steps" (all were taken), "until" (those that this call was to take),
            "patience" (early stopping) or, of modules that train side by side, "diverged"; None
            while it runs.
        error: why it diverged.
        untouched: trainable tensors that no step gave a gradient; usually a module that the
            forward pass never reached.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    monitor: str = "loss"
    seconds: float = 0.0
    resumed_from: int | None = None
    stopped: str | None = None
    error: str | None = None
    untouched: list[str] = field(default_factory=list)

    @property
    def last(self) -> float:
        """The last recorded training loss.

        Raises:
            ModgraftError: nothing was recorded.
        """
        if not self.losses:
            raise ModgraftError("this history holds no step: fit was asked for none")
        return self.losses[-1]

    def __repr__(self) -> str:
        return self._summary()

    def __str__(self) -> str:
        return self._page()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return self._page()._repr_html_()

    def _summary(self) -> str:
        """Tell the run in one line."""
        if not self.steps:
            return "History: no step was taken"
        said = [f"{self.steps[-1]:,} steps in {self.seconds:.1f} s"]
        said += [f"loss {self.losses[0]:.4g} at first, {self.losses[-1]:.4g} at last"]
        if self.best is not None:
            value, step = self.best[self.monitor], self.best["step"]
            said.append(f"best {self.monitor} {value:.4g} at step {step:,}")
        if self.resumed_from is not None:
            said.append(f"resumed from step {self.resumed_from:,}")
        if self.untouched:
            said.append(f"{len(self.untouched)} tensors never had a gradient")
        if self.stopped not in (None, "steps"):
            said.append(f"stopped: {self.stopped}" + (f" ({self.error})" if self.error else ""))
        return f"History: {'; '.join(said)}"

    def _page(self) -> Page:
        """Return the summary, and a table of the last evaluations."""
        parts: list[str | Table] = [self._summary()]
        last = self.evaluations[-SHOWN:]
        if len(self.evaluations) > len(last):
            parts.append(f"The last {len(last)} of {len(self.evaluations)} evaluations:")
        if last:
            names = list(dict.fromkeys(name for each in last for name in each))
            cells = [[_number(each.get(name)) for name in names] for each in last]
            parts.append(table(names, cells, right=names))
        return Page(*parts)

    def add(self, line: dict[str, Any]) -> None:
        """Add one line of `metrics.jsonl`."""
        if line["split"] == "train":
            self.steps.append(line["step"])
            self.losses.append(line["loss"])
            self.parts.append(line.get("parts", {}))
        else:
            self.evaluations.append({k: v for k, v in line.items() if k != "split"})


def _number(value: float | None) -> str:
    """Format a figure of an evaluation; – where it was not measured, or is not finite."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def numbers(measured: Any) -> dict[str, float | None]:
    """Convert what an evaluation returned to plain numbers, None where it is not finite.

    Raises:
        ModgraftError: it is no mapping of names to numbers.
    """
    try:
        values = {str(k): float(v) for k, v in measured.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ModgraftError(
            f"evaluate returned {measured!r:.200}: it must be a dict of numbers such as "
            "{'loss': 0.5}"
        ) from error
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


def check_monitor(values: dict[str, float | None], monitor: str, step: int) -> float:
    """Return the monitored value of an evaluation.

    Raises:
        ModgraftError: the monitored value is absent or not finite.
    """
    value = values.get(monitor)
    if value is None:
        has = "is not finite" if monitor in values else f"is not among {list(values)}"
        raise ModgraftError(
            f"evaluation at step {step}: the monitored value {monitor!r} {has}; choose with "
            "monitor= what evaluate measures"
        )
    return value


class Metrics:
    """`metrics.jsonl`: one JSON object a line, appended as it happens.

    Lines have "step", "split" ("train" or "eval"), "seconds" since the run began, and for "train"
    "loss", "lr", "grad_norm" (before clipping), "epoch", and "parts" where batches have parts; for
    "eval" the measured values.

    Args:
        folder: the run's folder, or None to keep nothing on disk.
        write: False only reads, as processes other than the main one do.
    """

    def __init__(self, folder: Path | None, *, write: bool = True) -> None:
        self.path = None if folder is None else folder / METRICS
        self._write = write
        self._file: IO[bytes] | None = None

    def start(self, size: int) -> list[dict[str, Any]]:
        """Cut the file to its first `size` bytes, where a checkpoint was made; return its lines.

        Raises:
            ModgraftError: the file is shorter than that, or holds something else.
        """
        if self.path is None:
            return []
        lines: list[dict[str, Any]] = []
        if size:
            found = self.path.stat().st_size if self.path.exists() else 0
            if found < size:
                raise ModgraftError(
                    f"{self.path} holds {found} bytes, and its run's checkpoint was made after "
                    f"{size}: the file was cut or replaced. Put it back, or start over with "
                    "resume=False"
                )
            with self.path.open("rb") as file:
                lines = self._parse(file.read(size))
        if self._write:
            self._file = self.path.open("ab")
            self._file.truncate(size)
        return lines

    def _parse(self, content: bytes) -> list[dict[str, Any]]:
        lines = []
        for number, text in enumerate(content.splitlines(), 1):
            try:
                line = json.loads(text)
                if line["split"] not in ("train", "eval") or not isinstance(line["step"], int):
                    raise ValueError("not a line of metrics")
            except (ValueError, KeyError, TypeError) as error:
                raise ModgraftError(
                    f"{self.path}, line {number}: {error}. The file was changed since its run's "
                    "checkpoint was made; put it back, or start over with resume=False"
                ) from error
            lines.append(line)
        return lines

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; a reader sees it at once."""
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()

    def size(self) -> int:
        """Return the file's length in bytes once everything written is safely on disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file; more than once does no harm."""
        if self._file is not None:
            self._file.close()
            self._file = None
