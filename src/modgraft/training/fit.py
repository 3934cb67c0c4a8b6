"""`fit`: one training loop for any host, on the CPU, one GPU or many, resumable to the bit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from accelerate import Accelerator
from torch import nn

from modgraft.core.config import mismatch
from modgraft.core.errors import ModgraftError
from modgraft.training.checkpoint import Checkpoints
from modgraft.training.history import History
from modgraft.training.note import noted
from modgraft.training.optim import trainable
from modgraft.training.processes import accelerator_for, check_world
from modgraft.training.run import Run
from modgraft.training.settings import Settings, chosen_precision, total_steps
from modgraft.training.stream import Batch, Stream, Weigh

#: measures a host: a mapping of names to numbers
Evaluate = Callable[[Any], Mapping[str, float]]


def fit(
    host: nn.Module,
    loader: Iterable[Batch],
    *,
    steps: int | None = None,
    epochs: float | None = None,
    lr: float = 1e-3,
    schedule: str = "linear",
    warmup: int | float = 0,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip: float | None = 1.0,
    accumulate: int = 1,
    weigh: Weigh | None = None,
    precision: str | None = None,
    evaluate: Iterable[Batch] | Evaluate | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    monitor: str = "loss",
    mode: str | None = None,
    restore_best: bool | None = None,
    folder: str | Path | None = None,
    save_every: int | None = None,
    keep: int = 2,
    resume: bool = True,
    seed: int = 0,
    ignore: Sequence[str] = ("ids",),
    fused: bool = True,
    world: int | None = None,
    progress: bool = True,
    label: str = "fit",
    note: bool = True,
) -> History:
    """Train exactly the parameters of `host` that have `requires_grad`, with AdamW.

    The run is a function of (host, loader, settings, seed): the order of the data of (seed,
    epoch), dropout of (seed, step). On the CPU an interrupted run that is started again with the
    same arguments therefore continues to the same losses and weights, bit for bit. The global
    generators of torch, numpy and python are left as they were found, `host` in the modes
    (`train`/`eval`) it came in.

    Args:
        host: any module whose `forward(**batch)` returns an object with a scalar `.loss`.
        loader: a `DataLoader`, or anything that yields dicts and can be iterated again; `Side`s
            among the values move to the device like tensors. See `Stream` for the order.
        steps: optimiser steps of the whole run; or
        epochs: passes over the loader, ⌈batches / accumulate⌉ steps each.
        lr: peak learning rate; `schedule` ("linear", "cosine", "constant") and `warmup` (steps,
            or a float fraction of the run) shape it: see `optim.learning_rate`.
        weight_decay: on matrices only, see `optim.undecayed`. `betas`, `eps`, `fused`: AdamW's.
        clip: largest global gradient norm, None for no clipping.
        accumulate: batches a step; the last step of an epoch may have fewer.
        weigh: how many terms the mean loss of a batch averages over, such as `stream.label_tokens`.
            With it, accumulated batches and processes add up to the gradient of one large batch;
            without it each batch counts alike, which differs where batches hold unequal numbers.
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
        ignore: names in a batch that `forward` does not take; "ids" serve in error messages.
        world: number of processes there must be; None takes it from the launcher.
        progress: show a bar on a terminal, lines elsewhere, after `label`.
        note: write what was run and what came out into the folder's `note.md`, for the research
            log; see `docs/log.md`. Without a folder there is none.

    Raises:
        ModgraftError: nothing trains; a setting means nothing; a loss or gradient is not finite
            (nothing is written); the folder's checkpoint is damaged, or of another model, data or
            settings; processes are missing. Each names what, where and the remedy.
        KeyboardInterrupt: after saving a checkpoint; its message says how to go on.

    """
    trainable(host)
    accelerator = accelerator_for()
    check_world(accelerator.num_processes, world)
    given = {name: value for name, value in locals().items() if name in SETTINGS}
    run = planned(host, loader, accelerator, given)
    if note:
        run.noted = partial(noted, run, loader, label)
    return run.start(resume=resume, progress=progress, label=label)


def planned(
    host: nn.Module,
    loader: Iterable[Batch],
    accelerator: Accelerator,
    given: Mapping[str, Any],
    part: nn.Module | None = None,
    beside: Sequence[str] = (),
) -> Run:
    """A run that has not been started.

    Args:
        host: what runs.
        loader: its batches.
        accelerator: device and processes.
        given: a value for each of ``SETTINGS``, as `fit` takes them.
        part: what of the host trains, None for whatever requires a gradient.
        beside: names of the modules that train in one pass with it.

    Raises:
        ModgraftError: for a setting that means nothing.

    """
    g = dict(given)
    found = mismatch({name: g[name] for name in PLAIN}, get_type_hints(fit))
    if found is not None:
        raise ModgraftError(f"fit({found[0]}): {found[1]}")
    stream = Stream(
        loader, seed=g["seed"], rank=accelerator.process_index, world=accelerator.num_processes
    )
    total = total_steps(g["steps"], g["epochs"], stream.length, g["accumulate"])
    if g["evaluate"] is None and (g["patience"] is not None or g["restore_best"]):
        raise ModgraftError("early stopping needs something to go by: give evaluate=")
    folder, weigh, monitor, best = g["folder"], g["weigh"], g["monitor"], g["restore_best"]
    ids = stream.first_ids(g["ignore"]) if folder is not None else None
    every = max(1, -(-(stream.length or total) // g["accumulate"]))
    settings = Settings(
        **{name: g[name] for name in AS_GIVEN},
        steps=total,
        precision=chosen_precision(g["precision"]),
        evaluate_every=g["evaluate_every"] or every,
        mode=g["mode"] or ("min" if "loss" in monitor else "max"),
        restore_best=g["patience"] is not None if best is None else best,
        weigh=None if weigh is None else getattr(weigh, "__qualname__", type(weigh).__name__),
        processes=accelerator.num_processes,
        batches=stream.length,
        first_ids=None if ids is None else tuple(ids),
        beside=tuple(beside),
    )
    run = Run(host, stream, settings, accelerator, part)
    run.evaluate, run.weigh, run.ignore = g["evaluate"], weigh, frozenset(g["ignore"])
    run.save_every = g["save_every"] or max(1, total // 10)
    if folder is not None:
        run.store = Checkpoints(Path(folder), keep=g["keep"])
    return run


#: the settings of `fit` and what they are if nothing is said: its signature is the configuration
SETTINGS = {
    name: parameter.default
    for name, parameter in inspect.signature(fit).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}
#: those of them that are recorded as they are given
AS_GIVEN = (
    "lr", "schedule", "warmup", "weight_decay", "betas", "eps", "clip", "accumulate", "patience",
    "monitor", "seed", "fused",
)  # fmt: skip
#: those that are numbers, words and choices
PLAIN = (
    *AS_GIVEN, "steps", "epochs", "precision", "evaluate_every", "mode", "restore_best",
    "save_every", "keep",
)  # fmt: skip
