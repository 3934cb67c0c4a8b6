"""The settings of `fit`: as they are given, and with every default decided for one run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from modgraft.core.config import mismatch
from modgraft.core.errors import ModgraftError
from modgraft.training.optim import SCHEDULES, warmup_steps
from modgraft.training.optimizers import BETAS, OPTIMIZERS
from modgraft.training.stream import Batch, Weigh

#: measures a host: a mapping of names to numbers
Evaluate = Callable[[Any], Mapping[str, float]]

PRECISIONS = ("no", "bf16")
#: settings whose type is not checked, since objects of many types will do
_ANY_TYPE = (
    "evaluate", "folder", "ignore", "label", "note", "progress", "resume", "weigh", "world",
)  # fmt: skip
#: settings that do not change the loss curve: a run may be resumed with others
_NOT_RECORDED = (
    "epochs", "evaluate", "folder", "ignore", "keep", "label", "note", "progress", "resume",
    "save_every", "until", "world",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `fit`.

    Args:
        steps: optimiser steps of the whole run; or
        epochs: passes over the loader, ⌈batches / accumulate⌉ steps each.
        until: a step after which this call ends, though the run has more: the same call with a
            later one, or without, goes on to the same bit (with `folder`). None: the last step.
        lr: peak learning rate; `schedule` ("linear", "cosine", "constant") and `warmup` (steps,
            or a float fraction of the run) shape it: see `optim.learning_rate`.
        optimizer: "adamw", "lion", or "muon", which is Muon for matrices and AdamW for embeddings,
            heads and the rest; see `optimizers`. What is moved by what is said at the start.
        weight_decay: on matrices only, see `optim.undecayed`.
        betas: the decay rates of AdamW's or Lion's moments; None: (0.9, 0.999) or (0.9, 0.99).
        eps, fused: AdamW's.
        clip: largest global gradient norm, None for no clipping.
        accumulate: batches a step; the last step of an epoch may have fewer.
        precision: "no" or "bf16" autocast; None is what `accelerate launch` said, or "no".
        evaluate: a loader, whose mean "loss" is measured (of `Tasks` that of each task too, as
            "loss.fr"), or a function host → {name: number} (called in eval mode without
            gradients, on every process; the first one's counts).
        evaluate_every: in steps; default once an epoch. There is one at the end in any case.
        patience: stop after so many evaluations without a better `monitor`.
        monitor: the measured value that decides what is best; `mode` "min" or "max", by default
            "min" if "loss" is in its name.
        restore_best: end with the weights of the best evaluation; default with `patience`.
        folder: keeps metrics.jsonl and checkpoints/ (see `checkpoint`); None keeps nothing.
        save_every: in steps; default a tenth of the run. The latest `keep` and the best stay.
        resume: go on from the folder's last checkpoint, or return the record of a finished run
            (with its weights loaded); False deletes the run in the folder.
        seed: of the order of the data, and of dropout.
        ignore: names in a batch that `forward` does not take; "ids" serve in error messages.
        weigh: how many terms the mean loss of a batch averages over: `stream.label_tokens` for an
            encoder-decoder, `stream.next_tokens` for a causal decoder. With it, accumulated batches
            and processes add up to the gradient of one large batch; without it each batch counts
            alike, which differs where batches hold unequal numbers.
        world: number of processes there must be; None takes it from the launcher.
        progress: show a bar on a terminal, lines elsewhere, after `label`.
        note: write what was run and what came out into the folder's `note.md`, for the research
            log; see `docs/log.md`. Without a folder there is none.

    Raises:
        ModgraftError: for a value of the wrong type.
    """

    steps: int | None = None
    epochs: float | None = None
    until: int | None = None
    lr: float = 1e-3
    schedule: str = "linear"
    warmup: int | float = 0
    weight_decay: float = 0.01
    optimizer: str = "adamw"
    betas: tuple[float, float] | None = None
    eps: float = 1e-8
    clip: float | None = 1.0
    accumulate: int = 1
    precision: str | None = None
    evaluate: Iterable[Batch] | Evaluate | None = None
    evaluate_every: int | None = None
    patience: int | None = None
    monitor: str = "loss"
    mode: str | None = None
    restore_best: bool | None = None
    folder: str | Path | None = None
    save_every: int | None = None
    keep: int = 2
    resume: bool = True
    seed: int = 0
    ignore: Sequence[str] = ("ids",)
    fused: bool = True
    weigh: Weigh | None = None
    world: int | None = None
    progress: bool = True
    label: str = "fit"
    note: bool = True

    def __post_init__(self) -> None:
        types = get_type_hints(Settings)
        found = mismatch({k: v for k, v in vars(self).items() if k not in _ANY_TYPE}, types)
        if found is not None:
            raise ModgraftError(f"fit({found[0]}): {found[1]}")

    def _total(self, batches: int | None) -> int:
        """Return the steps of the run; an epoch has ⌈batches / accumulate⌉ of them."""
        if self.accumulate < 1:
            raise ModgraftError(f"accumulate={self.accumulate}: it must be at least 1")
        if (self.steps is None) == (self.epochs is None):
            raise ModgraftError(
                f"steps={self.steps} and epochs={self.epochs}: give exactly one of them, such as "
                f"steps=500"
            )
        if self.steps is not None:
            return self.steps
        if batches is None:
            raise ModgraftError(
                f"epochs={self.epochs} needs a loader with a length; give steps= instead"
            )
        return round((self.epochs or 0) * -(-batches // self.accumulate))

    def decided(
        self,
        *,
        batches: int | None,
        first_ids: Sequence[str] | None,
        processes: int,
        beside: Sequence[str],
    ) -> Decided:
        """Return the same with every default decided for a run; see `Decided` for the arguments."""
        total = self._total(batches)
        if self.evaluate is None and (self.patience is not None or self.restore_best):
            raise ModgraftError("early stopping needs something to go by: give evaluate=")
        best, epoch = self.restore_best, max(1, -(-(batches or total) // self.accumulate))
        return Decided(
            **vars(self)
            | {
                "steps": total,
                "precision": self.precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
                "evaluate_every": self.evaluate_every or epoch,
                "betas": self.betas or BETAS.get(self.optimizer),
                "mode": self.mode or ("min" if "loss" in self.monitor else "max"),
                "restore_best": self.patience is not None if best is None else best,
                "save_every": self.save_every or max(1, total // 10),
                "processes": processes,
                "batches": batches,
                "first_ids": None if first_ids is None else tuple(first_ids),
                "beside": tuple(beside),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Decided(Settings):
    """The settings of one run, with every default decided and every value checked.

    Args:
        processes: how many there are.
        batches: of an epoch and process; None where the loader has no length.
        first_ids: the ids in the first batch, so that a run is not resumed with other data.
        beside: the names of the modules that train in one pass, where several do.

    Raises:
        ModgraftError: for a value that means nothing, with what it may be.
    """

    steps: int = 0  # `decided` gives a value for each of these
    precision: str = ""
    evaluate_every: int = 0
    mode: str = ""
    restore_best: bool = False
    save_every: int = 0
    processes: int
    batches: int | None
    first_ids: tuple[str, ...] | None
    beside: tuple[str, ...]

    def __post_init__(self) -> None:
        checks = {
            "steps": (self.steps >= 1, "at least 1"),
            "until": (self.until is None or self.until >= 1, "at least 1, or None"),
            "lr": (self.lr > 0, "positive"),
            "schedule": (self.schedule in SCHEDULES, f"one of {sorted(SCHEDULES)}"),
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {sorted(OPTIMIZERS)}"),
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
        """Return what decides the loss curve, as JSON: a checkpoint is only resumed with the
        same."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.weigh is not None:
            values["weigh"] = getattr(self.weigh, "__qualname__", type(self.weigh).__name__)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name not in _NOT_RECORDED
        }
