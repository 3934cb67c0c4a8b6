"""A host's loss on a batch: one for the whole batch, or one for each of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.core.errors import ModgraftError
from modgraft.core.plain import plain
from modgraft.training.parts import PARTS, Apart, Parts
from modgraft.training.stream import Batch, Repeated, Stream, Weigh, to_device


@dataclass(frozen=True)
class Forward:
    """Compute the loss of a host.

    Attributes:
        host: the host.
        ignore: names in a batch that ``forward`` does not take.
        device: where batches are moved to.
        precision: "no", or "bf16" autocast.
    """

    host: nn.Module
    ignore: frozenset[str]
    device: torch.device
    precision: str

    def training_loss(
        self, of: Callable[[Batch], Tensor], batch: Batch, learners: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss ``[]`` to minimise, and the losses of the batch's parts by name.

        A part's loss is the mean over its examples; the loss is the mean over the parts.

        Args:
            of: :meth:`losses`, or a wrapper of it.
            batch: the batch.
            learners: what trains, by name.

        Raises:
            ModgraftError: as :meth:`losses`, or if the loss depends on none of ``learners``.
        """
        losses = of(batch)
        if torch.is_grad_enabled() and not losses.requires_grad:
            raise ModgraftError(
                "the loss depends on none of the parameters that train: "
                f"{', '.join(list(learners)[:4])} …; a module learns where it is in force "
                f"(host.use(…), or modules in the batch) and its sites' outputs reach the loss"
            )
        if PARTS not in batch:
            return losses, {}
        return losses.mean(), _by_name(batch[PARTS].names, losses.detach().tolist())

    def losses(self, batch: Batch) -> Tensor:
        """Return the ``loss`` that ``forward`` returns: a scalar, or ``[N]`` for a batch of N
        parts.

        Raises:
            ModgraftError: if there is none, or not one for each part.
        """
        return self.with_losses(batch)[1]

    def with_losses(self, batch: Batch) -> tuple[Any, Tensor]:
        """Return what ``forward`` returns, and its loss as :meth:`losses` does."""
        parts: Parts | None = batch.get(PARTS)
        given = {k: v for k, v in batch.items() if k not in self.ignore and k != PARTS}
        with self._autocast(), nullcontext() if parts is None else Apart(parts.rows):
            try:
                output = self.host(**to_device(given, self.device))
            except TypeError as error:
                self._check_taken(given, error)
                raise
        of_dict = isinstance(output, Mapping)
        loss = output.get("loss") if of_dict else getattr(output, "loss", None)
        name = type(self.host).__name__
        if not isinstance(loss, Tensor) or (parts is None and loss.ndim != 0):
            raise ModgraftError(
                f"{name}.forward({', '.join(given)}) returned no scalar .loss "
                f"(it is {'absent' if loss is None else loss}); does the batch hold labels?"
            )
        if parts is not None and loss.shape != (len(parts.rows),):
            raise ModgraftError(
                f"{name}.forward({', '.join(given)}) returned a loss {list(loss.shape)} where the "
                f"batch has {len(parts.rows)} parts ({', '.join(parts.names)}): it is not one of "
                f"PyTorch's means, such as F.cross_entropy's, that can be taken for each part; "
                f"train them one after the other, by host.fit"
            )
        return output, loss

    def _check_taken(self, given: Iterable[str], error: TypeError) -> None:
        """Raise a ModgraftError where the batch has what the model's ``forward`` does not take."""
        model = plain(getattr(self.host, "model", self.host))
        takes = signature(model.forward).parameters
        if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            return
        own = signature(self.host.forward).parameters.keys()  # such as a host's side=
        if unknown := sorted({*given} - takes.keys() - own):
            raise ModgraftError(
                f"the batch has {', '.join(unknown)}, which {type(model).__name__}.forward("
                f"{', '.join(takes)}) does not take; leave it out of the batch, or say "
                f"ignore={[*sorted(self.ignore), *unknown]}"
            ) from error

    def _autocast(self) -> Any:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def _by_name(names: Sequence[str], losses: Sequence[float]) -> dict[str, float]:
    """Return the mean loss of each name."""
    found: dict[str, list[float]] = {}
    for name, loss in zip(names, losses, strict=True):
        found.setdefault(name, []).append(loss)
    return {name: sum(values) / len(values) for name, values in found.items()}


def mean_parts(several: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each part's losses over the batches of one step."""
    pairs = [pair for parts in several for pair in parts.items()]
    return _by_name([name for name, _ in pairs], [loss for _, loss in pairs])


def mean_loss(
    forward: Forward,
    loader: Iterable[Batch],
    weigh: Weigh | None,
    add: Callable[[list[float]], list[float]],
    rank: int,
    world: int,
) -> float:
    """Return the mean loss over ``loader``, weighted by ``weigh`` or by examples.

    Args:
        forward: computes the loss.
        loader: is read once.
        weigh: how many terms the mean loss of a batch averages over.
        add: sums numbers over all processes.
        rank: this process.
        world: the number of processes, which share the batches.
    """
    sums = [0.0, 0.0]
    for batch in Stream(loader, seed=0, rank=rank, world=world).read(0):
        loss = forward.losses(batch).mean().item()  # all processes run the host as often
        if not isinstance(batch, Repeated):
            weight = float(_examples(batch)) if weigh is None else weigh(batch)
            sums[0] += weight * loss
            sums[1] += weight
    total, count = add(sums)
    if count == 0:
        raise ModgraftError("the evaluation loader holds nothing to average over")
    return total / count


def _examples(batch: Batch) -> int:
    """Count the rows of the first tensor in a batch; 1 for a batch without any."""
    return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)


@contextmanager
def own_modes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Leave the modes (training or not) of modules as they were found."""
    modes = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
