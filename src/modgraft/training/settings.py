"""What decides a run's loss curve; a checkpoint is only resumed with the same."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

from modgraft.core.errors import ModgraftError
from modgraft.training.optim import SCHEDULES, warmup_steps

PRECISIONS = ("no", "bf16")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one run, checked; see `fit` for what each means.

    Raises:
        ModgraftError: a value that means nothing, with what it may be.

    """

    steps: int
    lr: float
    schedule: str
    warmup: int | float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip: float | None
    accumulate: int
    precision: str
    evaluate_every: int
    patience: int | None
    monitor: str
    mode: str
    restore_best: bool
    seed: int
    fused: bool
    weigh: str | None
    processes: int
    batches: int | None  # an epoch and process; None where the loader has no length
    first_ids: tuple[str, ...] | None  # of the first batch: other data, another run
    beside: tuple[str, ...] = ()  # the modules that train in one pass, where several do

    def __post_init__(self) -> None:
        checks = {
            "steps": (self.steps >= 1, "at least 1"),
            "lr": (self.lr > 0, "positive"),
            "schedule": (self.schedule in SCHEDULES, f"one of {sorted(SCHEDULES)}"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "clip": (self.clip is None or self.clip > 0, "positive, or None not to clip"),
            "precision": (self.precision in PRECISIONS, f"one of {list(PRECISIONS)}"),
            "evaluate_every": (self.evaluate_every >= 1, "at least 1"),
            "patience": (self.patience is None or self.patience >= 1, "at least 1, or None"),
            "mode": (self.mode in ("min", "max"), '"min" or "max"'),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ModgraftError(f"{name}={getattr(self, name)!r}: it must be {wanted}")
        warmup_steps(self.warmup, self.steps)

    def record(self) -> dict[str, Any]:
        """As JSON has them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def total_steps(
    steps: int | None, epochs: float | None, batches: int | None, accumulate: int
) -> int:
    """The length of a run in optimiser steps; an epoch is ⌈batches / accumulate⌉ of them.

    Raises:
        ModgraftError: not exactly one of `steps` and `epochs`, epochs of a loader without a
            length, or `accumulate` < 1.

    """
    if accumulate < 1:
        raise ModgraftError(f"accumulate={accumulate}: it must be at least 1")
    if (steps is None) == (epochs is None):
        raise ModgraftError(
            f"steps={steps} and epochs={epochs}: give exactly one of them, such as steps=500"
        )
    if steps is not None:
        return steps
    if batches is None:
        raise ModgraftError(f"epochs={epochs} needs a loader with a length; give steps= instead")
    return round((epochs or 0) * -(-batches // accumulate))


def chosen_precision(precision: str | None) -> str:
    """`precision`, or where it is None what `accelerate launch --mixed_precision` said, or "no"."""
    return precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
