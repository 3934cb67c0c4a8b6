"""Joint multi-task training: batches of several tasks, each example with its task's modules."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, final

import torch

from modgraft.core.errors import ModgraftError
from modgraft.training.parts import together
from modgraft.training.randomness import fold
from modgraft.training.stream import Batch, Stream

TEMPERATURES = {"proportional": 1.0, "equal": math.inf}


@final
class Tasks:
    """Draw batches of several tasks: p_t ∝ n_t^(1/τ), n_t the number of batches of task t.

    ``host.fit(mg.Tasks({"fr": french, "de": german}), train=["fr", "de"])`` trains the modules of
    all tasks jointly. A batch holds the examples of ``mix`` draws, each with the composition of its
    task. The loss is balanced: it is the mean over the draws of the mean over each draw's examples,
    however long they are, so that a task counts as often as it is drawn. Each task's loss stands
    under ``"parts"`` in metrics.jsonl, in ``history.parts`` and in the progress. The gradient is
    that of accumulating ``mix`` batches of one task each. Given as ``evaluate=``, every batch of
    each loader is read once, and "loss.fr" is measured beside "loss", the mean over the tasks.

    The draws are a function of torch's seed alone, which `fit` sets by (seed, epoch) so that it can
    resume in the middle of an epoch. A task whose loader ends starts anew, in another order.

    Args:
        loaders: the batches of each task, by its name.
        sampling: "proportional" (τ = 1), "equal" (τ = ∞), or a number, the temperature τ
            (Arivazhagan et al. 2019, arXiv:1907.05019; Raffel et al. 2020, arXiv:1910.10683).
        mix: how many draws make a batch.
        modules: the composition of each task; left out, the module of its name. A composition that
            a batch carries goes first.
        length: batches an epoch; None: ⌈Σ n_t / mix⌉.
        padding: the id that pads shorter texts.

    Raises:
        ModgraftError: for no task, an invalid sampling or number, a loader without a
            length where one is needed, or modules of other tasks.
    """

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Batch]],
        *,
        sampling: str | float = "proportional",
        mix: int = 4,
        modules: Mapping[str, Any] | None = None,
        length: int | None = None,
        padding: int = 0,
    ) -> None:
        if not loaders:
            raise ModgraftError("Tasks({}): give a loader for each task's name")
        tau = _temperature(sampling)
        if mix < 1 or (length is not None and length < 1):
            raise ModgraftError(f"mix={mix}, length={length}: both are at least 1")
        if modules is not None and modules.keys() != loaders.keys():
            raise ModgraftError(
                f"modules= has {', '.join(modules) or 'nothing'}, and the tasks are "
                f"{', '.join(loaders)}; give each of them its composition"
            )
        self.loaders, self.mix, self.padding = dict(loaders), mix, padding
        self.modules = {task: task for task in loaders} if modules is None else dict(modules)
        sizes = _sizes(loaders, needed=length is None or tau != math.inf)
        self._length = length or -(-sum(sizes.values()) // mix)
        weights = {task: float(size or 1) ** (1 / tau) for task, size in sizes.items()}
        total = sum(weights.values())
        self.shares = {task: weight / total for task, weight in weights.items()}

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        seed = int(torch.randint(1 << 62, ()))  # the only draw from torch's generator
        draws = random.Random(seed)
        names, shares = list(self.shares), list(self.shares.values())
        read = {task: self._read(task, fold(seed, task)) for task in names}
        for _ in range(self._length):
            tasks = draws.choices(names, shares, k=self.mix)
            yield together([next(read[task]) for task in tasks], tasks, self.padding)

    def each(self) -> dict[str, Iterable[Batch]]:
        """Return the loaders by task, every batch with its composition; nothing is drawn."""
        return {task: _Tagged(loader, self.modules[task]) for task, loader in self.loaders.items()}

    def _read(self, task: str, seed: int) -> Iterator[Batch]:
        """Yield the batches of one task without end, each with its composition."""
        stream = Stream(self.loaders[task], seed=seed)
        for epoch in count():
            for batch in stream.read(epoch):
                yield {"modules": self.modules[task], **batch}


def _temperature(sampling: str | float) -> float:
    tau = TEMPERATURES.get(sampling, sampling) if isinstance(sampling, str) else sampling
    if isinstance(tau, str) or not tau > 0:
        raise ModgraftError(
            f"sampling={sampling!r}: it is 'proportional', 'equal', or a temperature above 0"
        )
    return tau


def _sizes(loaders: Mapping[str, Iterable[Batch]], needed: bool) -> dict[str, int]:
    """Return the number of batches of each loader; 0 where it is unknown and not needed."""
    sizes = {task: Stream(loader).length for task, loader in loaders.items()}
    unknown = [task for task, size in sizes.items() if size is None]
    if unknown and needed:
        raise ModgraftError(
            f"the loader of {unknown[0]!r} has no length; write Tasks(…, sampling='equal', "
            f"length=…), with the batches of an epoch"
        )
    return {task: size or 0 for task, size in sizes.items()}


@dataclass(frozen=True)
class _Tagged:
    """A loader whose batches carry a composition."""

    loader: Iterable[Batch]
    modules: Any

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield {"modules": self.modules, **batch}


def mean_of_tasks(loader: Any, mean: Callable[[Any], float]) -> dict[str, float]:
    """Return the ``mean`` loss over a loader; for ``Tasks`` also that of each task, all counting
    alike."""
    if not isinstance(loader, Tasks):
        return {"loss": mean(loader)}
    losses = {f"loss.{task}": mean(batches) for task, batches in loader.each().items()}
    return {"loss": sum(losses.values()) / len(losses), **losses}
