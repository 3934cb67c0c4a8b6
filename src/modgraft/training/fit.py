"""`fit`: one training loop for any host, on the CPU, one GPU or many, resumable to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from inspect import signature
from typing import Any

from accelerate import Accelerator
from torch import nn

from modgraft.core.errors import ModgraftError, warn
from modgraft.training.history import History
from modgraft.training.note import noted
from modgraft.training.optim import trainable
from modgraft.training.processes import accelerator_for, alone, check_world
from modgraft.training.run import Run
from modgraft.training.settings import Settings
from modgraft.training.stream import Batch, Stream, digest, ids_of


def fit(host: nn.Module, loader: Iterable[Batch], **settings: Any) -> History:
    """Train exactly the parameters of `host` that have `requires_grad`, with AdamW.

    The run is a function of (host, loader, settings, seed): the order of the data of (seed,
    epoch), dropout of (seed, step). On the CPU an interrupted run that is started again with the
    same arguments therefore continues to the same losses and weights, bit for bit. The global
    generators of torch, numpy and python are left as they were found, `host` in the modes
    (`train`/`eval`) it came in. Fits in several threads, each of another host, take their steps in
    turn, since all draw from those generators.

    Args:
        host: any module whose `forward(**batch)` returns an object with a scalar `.loss`.
        loader: a `DataLoader`, or anything that yields dicts and can be iterated again; `Side`s
            among the values move to the device like tensors. See `Stream` for the order.
        **settings: of :class:`modgraft.training.settings.Settings`: `steps` or `epochs`, `lr`,
            `schedule`, `evaluate`, `folder`, … with their defaults.

    Raises:
        ModgraftError: nothing trains; a setting means nothing; a loss or gradient is not finite
            (nothing is written); the folder's checkpoint is damaged, or of another model,
            composition, data or settings; processes are missing, or differ in these; another
            thread trains the same host. Each names what, where and the remedy.
        KeyboardInterrupt: for Ctrl-C or SIGTERM, after saving a checkpoint; its message says how to
            go on.
    """
    if unknown := settings.keys() - {f.name for f in fields(Settings)}:
        raise _no_setting(min(unknown))
    given = Settings(**settings)
    trainable(host)
    accelerator = accelerator_for()
    check_world(accelerator.num_processes, given.world)
    with alone(host):
        run = planned(host, loader, accelerator, given)
        if given.note:
            run.noted = partial(noted, run, loader, given.label)
        return run.start()


def _no_setting(name: str) -> ModgraftError:
    """Say that there is no such setting, and which there are."""
    known = [f.name for f in fields(Settings)]
    near = get_close_matches(name, [*known, "train", "modules"], n=1)
    if "loss" in name.split("_"):
        why = "the loss is what the model returns as .loss; compute it in the model's forward"
    elif near:
        why = f"did you mean {near[0]}=?"
    else:
        why = f"there are {', '.join(known)}"
    return ModgraftError(f"fit({name}=…) is no setting; {why}")


# so that help(), an editor and a notebook show every setting with its default
_given, _settings = list(signature(fit).parameters.values())[:-1], signature(Settings).parameters
fit.__signature__ = signature(fit).replace(parameters=[*_given, *_settings.values()])  # type: ignore[attr-defined]


def planned(
    host: nn.Module,
    loader: Iterable[Batch],
    accelerator: Accelerator,
    given: Settings,
    part: nn.Module | None = None,
    beside: Sequence[str] = (),
) -> Run:
    """Prepare a run without starting it.

    Args:
        host: what runs.
        loader: its batches.
        accelerator: device and processes.
        given: the settings.
        part: what of the host trains, None for whatever requires a gradient.
        beside: names of the modules that train in one pass with it.

    Raises:
        ModgraftError: for a setting that means nothing.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    stream = Stream(loader, seed=given.seed, rank=rank, world=world)
    first = {} if given.folder is None and world == 1 else stream.first()
    key = digest(first)
    if given.folder is not None and (why := stream.unrepeatable(key)):
        warn(
            f"fit(folder={str(given.folder)!r}): {why}; a run that is resumed may not be the "
            f"uninterrupted one to the bit. Random numbers have to come from torch, random or "
            f"numpy, or from a generator of theirs that the loader holds",
        )
    settings = given.decided(
        batches=stream.length,
        first_ids=ids_of(first, given.ignore) if stream.indexed else None,
        processes=world,
        beside=beside,
    )
    return Run(host, stream, settings, accelerator, part, key)
