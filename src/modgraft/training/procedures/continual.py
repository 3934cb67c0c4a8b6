"""Continual learning: tasks one after the other, in one module each or all in the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modgraft.computation.base import Computation
from modgraft.core.errors import ModgraftError
from modgraft.core.sites import At
from modgraft.engine.implant import check_name, learner
from modgraft.training.forward import own_modes
from modgraft.training.history import History
from modgraft.training.host_like import HostLike
from modgraft.training.randomness import own_randomness, seed_everything
from modgraft.training.stream import Batch

#: measures a host on a task: more is better
Measure = Callable[[HostLike, str], float]


@dataclass(frozen=True)
class Continual:
    """The accuracies measured while T tasks were learned one after the other.

    R_ij is the accuracy on task j after task i has been learned, b_j that before the first.

    Attributes:
        tasks: their names, in the order in which they were learned.
        start: b ``[T]``.
        matrix: R ``[T, T]``.
        histories: the record of the training of each task.
    """

    tasks: tuple[str, ...]
    start: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    histories: Mapping[str, History]

    @property
    def accuracy(self) -> float:
        """Σ_j R_Tj / T: the mean over tasks in the end (Lopez-Paz and Ranzato 2017)."""
        return sum(self.matrix[-1]) / len(self.tasks)

    @property
    def backward_transfer(self) -> float:
        """Σ_{j<T} (R_Tj − R_jj) / (T − 1): the effect of later tasks on earlier ones.

        Lopez-Paz and Ranzato (2017, arXiv:1706.08840). NaN for a single task.
        """
        return _mean(self.matrix[-1][j] - self.matrix[j][j] for j in range(len(self.tasks) - 1))

    @property
    def forward_transfer(self) -> float:
        """Σ_{j>1} (R_(j−1)j − b_j) / (T − 1): the effect of earlier tasks on those not yet learned.

        Lopez-Paz and Ranzato (2017, arXiv:1706.08840). NaN for a single task.
        """
        later = range(1, len(self.tasks))
        return _mean(self.matrix[j - 1][j] - self.start[j] for j in later)

    @property
    def forgetting(self) -> float:
        """Σ_{j<T} (max_{i<T} R_ij − R_Tj) / (T − 1): the loss since the best accuracy before.

        Chaudhry et al. (2018, arXiv:1801.10112). NaN for a single task.
        """
        best = [max(column) for column in zip(*self.matrix[:-1], strict=True)]
        return _mean(best[j] - self.matrix[-1][j] for j in range(len(self.tasks) - 1))


def continual(
    host: HostLike,
    loaders: Mapping[str, Iterable[Batch]],
    measure: Measure,
    *,
    module: Computation | None = None,
    at: At | None = None,
    into: str | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    label: str = "continual",
    **settings: Any,
) -> Continual:
    """Learn tasks one after the other, and measure all of them after each.

    With ``module=`` every task adds a module under the task's name, and everything before it is
    frozen: the outputs for earlier tasks stay the same, bit for bit, and nothing is forgotten. With
    ``into=`` all tasks train the same module, the baseline that forgets.

    A task is measured with its module in force, or before it is learned with the composition that
    was in force at the start; with ``into=`` every task is measured with the one module.

    Args:
        host: the frozen host.
        loaders: the training batches of each task, in the order of learning.
        measure: (host, task) → the accuracy; called in eval mode, without gradients.
        module: the module that each task adds, by its hyper-parameters.
        at: its sites, as :meth:`modgraft.Host.implant` takes them.
        into: instead, the name of one module that is implanted, or ``"host"``, or ``"host.head"``.
        folder: keeps each training in a folder of the task's name. The same call resumes: the
            modules learned so far are loaded, and measured again.
        seed: of the new modules and of :func:`modgraft.training.fit.fit`.
        label: before the progress of each training.
        **settings: of ``fit``, the same for each task.

    Returns:
        The accuracies and the records of training.

    Raises:
        ModgraftError: not exactly one of ``module`` and ``into``, no task, a task's name that
            cannot name a module, or a measure that is no finite number.
    """
    if (module is None) == (into is None):
        raise ModgraftError(
            f"module={module}, into={into!r}: give one of them, what each task adds, as "
            f"module=mg.LoRA(rank=8), at='query', or what all of them train, as into='shared'"
        )
    if not loaders:
        raise ModgraftError("continual(host, {}, …): give a loader for each task")
    own = None if into is None else learner(host.model, into, host)
    if into is not None and own is None and host[into].names != [into]:
        raise ModgraftError(
            f"into={into!r} has tasks of its own, {', '.join(host[into].names)}; name one module "
            f"that all tasks train"
        )
    for task in loaders if module is not None else ():
        check_name(task)
        if task in host:
            raise ModgraftError(
                f"the task {task!r} is to add a module of its name, and there is one; continual "
                f"starts with the host as it was before all of its tasks, also to go on in a folder"
            )
    tasks, rows, histories = tuple(loaders), [], {}
    found: dict[str, Any] = dict.fromkeys(tasks, into or host.composition)
    start = _measured(host, tasks, measure, found, seed)
    for task, loader in loaders.items():
        if module is not None:
            with own_randomness():
                seed_everything(seed, "implant", task)
                host.implant(task, module, at, active=False)
            found[task] = task
        given = {**settings, "seed": seed, "label": f"{label}: {task}"}
        if folder is not None:
            given["folder"] = Path(folder) / task
        with _using(host, found[task]):
            histories[task] = host.fit(loader, train=into or task, **given)
        rows.append(_measured(host, tasks, measure, found, seed))
    return Continual(tasks, start, tuple(rows), histories)


def _using(host: HostLike, composition: Any) -> Any:
    """Put a composition in force for a block; for a part of the host, leave the one in force."""
    if isinstance(composition, str) and composition not in host:
        return nullcontext()
    return host.using(composition)


def _measured(
    host: HostLike, tasks: tuple[str, ...], measure: Measure, found: Mapping[str, Any], seed: int
) -> tuple[float, ...]:
    values = []
    with own_modes(host.modules()):
        host.eval()
        for task in tasks:
            with torch.no_grad(), own_randomness(), _using(host, found[task]):
                seed_everything(seed, "measure", task)
                value = float(measure(host, task))
            if not math.isfinite(value):
                raise ModgraftError(f"measure(host, {task!r}) gave {value}; it has to be a number")
            values.append(value)
    return tuple(values)


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every) if every else math.nan
