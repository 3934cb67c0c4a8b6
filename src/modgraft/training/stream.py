"""Batches in an order that is a function of (seed, epoch), so that any position can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from hashlib import sha256
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from modgraft.core.errors import ModgraftError, an
from modgraft.core.side import Side
from modgraft.training.randomness import (
    fold,
    generators_in,
    next_numbers,
    own_randomness,
    seed_everything,
    set_states,
    states,
)

#: what a loader yields: named tensors, `modgraft.Side`s, a list of ids
Batch = Mapping[str, Any]


class Repeated(dict[str, Any]):
    """A batch that another process has, and that this one reads to have as many; it counts
    nothing."""


OWNERS = ("batch_sampler", "sampler", "dataset")
"""Parts of a loader that may have a `set_epoch`, as `DistributedSampler` has."""


def _set_epoch(loader: object, epoch: int, owners: Sequence[str] = OWNERS) -> None:
    """Call `set_epoch` of the samplers and the data set that have it."""
    for name in owners:
        owner = getattr(loader, name, None)
        if callable(method := getattr(owner, "set_epoch", None)):
            method(epoch)
        if owner is not None and name == "batch_sampler":
            _set_epoch(owner, epoch)


class Stream:
    """Read a loader from any (epoch, batch) position, with the same batches after an interruption.

    A `DataLoader` over a map-style dataset keeps its dataset, sampler, collate function, workers
    and pinning; its order is drawn once an epoch with every generator seeded from (seed, epoch),
    and what is random in fetching batch b from (seed, epoch, b). Any other iterable (an
    `IterableDataset`, a list of batches) is re-read from its start each epoch with the generators
    seeded from (seed, epoch), and batches before the position are read and dropped. The generators
    are those of the process and those that the loader holds (`randomness.generators_in`). With
    worker processes what is random *inside* a worker is not replayed; the order is.

    With `world` processes, process `rank` takes every `world`-th batch; where the number of
    batches does not divide, some read the last one too, as `Repeated`, so that every process takes
    as many steps, and none moves what the step does not: a table's rows, by sparse gradients.

    Args:
        loader: a `DataLoader` or another iterable that can be iterated more than once.
        seed: seed of the order.
        rank: this process.
        world: number of processes.

    Raises:
        ModgraftError: a loader that is an iterator (it can be read only once), or is empty.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if isinstance(loader, Iterator):
            raise ModgraftError(
                f"the loader is {an(type(loader).__name__)}, which can be read only once; give a "
                "DataLoader, a list of batches or an object whose __iter__ starts anew"
            )
        self.loader, self.seed, self.rank, self.world = loader, seed, rank, world
        self.indexed = (
            isinstance(loader, DataLoader)
            and not isinstance(loader.dataset, IterableDataset)
            and loader.batch_sampler is not None
        )
        self.own = generators_in(loader)
        self._order: tuple[int, list[list[int]]] | None = None
        self.length = self._length()  # batches an epoch and process; None = known after an epoch

    def _length(self) -> int | None:
        if self.indexed:
            count = len(self.order(0))
        else:
            try:
                count = len(cast(Sized, self.loader))
            except TypeError:
                return None
        if count == 0:
            raise ModgraftError("the loader has no batches: its dataset is empty, or drop_last")
        return -(-count // self.world)

    def order(self, epoch: int) -> list[list[int]]:
        """Return the dataset indices of every batch of an epoch (map-style loaders only)."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._drawn_order(epoch)
        return self._order[1]

    def _drawn_order(self, epoch: int) -> list[list[int]]:
        with own_randomness(self.own):
            seed_everything(self.seed, "order", epoch, own=self.own)
            _set_epoch(self.loader, epoch)
            return [list(b) for b in cast(DataLoader, self.loader).batch_sampler or ()]

    def read(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this process's batches of an epoch from its `start`-th on."""
        batches = self._indexed(epoch, start) if self.indexed else self._iterated(epoch, start)
        for i, batch in enumerate(batches, start):
            if not isinstance(batch, Mapping):
                raise ModgraftError(
                    f"batch {i} of epoch {epoch} is {an(type(batch).__name__)}; fit needs a dict "
                    "of forward's arguments, such as modgraft's collate returns"
                )
            yield batch

    def first(self) -> Batch:
        """Read the first batch of all, by which the data are recognised."""
        if self.indexed or isinstance(self.loader, Sequence):
            return self.reread(0, 0)
        return self._isolated(0).next() or {}

    @property
    def made_by(self) -> Mapping[str, str]:
        """What the data set says of how its rows were made, such as its tokenizer."""
        return getattr(getattr(self.loader, "dataset", None), "made_by", {})

    @property
    def rereads(self) -> bool:
        """Whether a batch can be read again by itself, as it was."""
        replayed = isinstance(self.loader, DataLoader) and self.loader.num_workers == 0
        return isinstance(self.loader, Sequence) or (self.indexed and replayed)

    def reread(self, epoch: int, batch: int) -> Batch:
        """Read the first process's batch at a position, where batches have positions."""
        if isinstance(self.loader, Sequence):
            return self.loader[batch * self.world % len(self.loader)]
        with own_randomness(self.own):
            seed_everything(self.seed, "batch", epoch, batch, 0, own=self.own)
            rows = self._rows(epoch, batch)
            return cast(Batch, cast(DataLoader, self.loader).collate_fn(rows))

    def _rows(self, epoch: int, batch: int) -> Any:
        """Read the rows of a batch as a `DataLoader` does, which asks for all of them at once where
        the data set lets it."""
        order = self.order(epoch)
        _set_epoch(self.loader, epoch, ["dataset"])
        places = order[batch * self.world % len(order)]
        data = cast(DataLoader, self.loader).dataset
        at_once = getattr(data, "__getitems__", None)
        return [data[i] for i in places] if at_once is None else at_once(places)

    def unrepeatable(self, first: str) -> str:
        """Say what keeps a resumed run from reading what an uninterrupted one reads, "" if nothing.

        A sampler and a data set are asked twice; what both times is the same is a function of the
        generators that were found.

        Args:
            first: the digest of the first batch.
        """
        if self.indexed and self._drawn_order(0) != self.order(0):
            sampler = cast(DataLoader, self.loader).batch_sampler
            inner = getattr(sampler, "sampler", sampler)
            return f"the order of {type(inner).__name__} is another one at every reading"
        if digest(self.first()) != first:
            if self.indexed and self._digest_of_rows() == self._digest_of_rows():
                return "the loader's collate_fn makes other batches of the same rows"
            data = getattr(self.loader, "dataset", self.loader)
            return f"{an(type(data).__name__)} gives other rows at every reading"
        workers = getattr(self.loader, "num_workers", 0) if self.indexed else 0
        if workers:
            with own_randomness(self.own):
                seed_everything(self.seed, own=self.own)
                before = next_numbers(self.own)
                seed_everything(self.seed, own=self.own)
                cast(DataLoader, self.loader).collate_fn(self._rows(0, 0))
                if next_numbers(self.own) != before:
                    return (
                        f"rows are drawn at random in {workers} worker processes, which begin anew "
                        f"(num_workers=0 does not)"
                    )
        return ""

    def _digest_of_rows(self) -> str:
        with own_randomness(self.own):
            seed_everything(self.seed, own=self.own)
            return digest({"rows": self._rows(0, 0)})

    def _indexed(self, epoch: int, start: int) -> Iterator[Batch]:
        loader, order = cast(DataLoader, self.loader), self.order(epoch)
        places = range(self.rank, (self.length or 0) * self.world, self.world)
        mine = [order[min(i, len(order) - 1)] for i in places]
        batches: Iterator[Batch] = iter(
            DataLoader(
                loader.dataset,
                batch_sampler=mine[start:],
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
                prefetch_factor=loader.prefetch_factor,
                generator=torch.Generator().manual_seed(fold(self.seed, "workers", epoch, start)),
            )
        )
        for i in range(start, len(mine)):
            with own_randomness(self.own):
                _set_epoch(loader, epoch, ["dataset"])  # which an evaluation may read meanwhile
                seed_everything(self.seed, "batch", epoch, i, self.rank, own=self.own)
                batch = next(batches)
            yield batch if places[i] < len(order) else _repeated(batch)

    def _isolated(self, epoch: int) -> _Isolated:
        return _Isolated(self.loader, self.own, (self.seed, "order", epoch))

    def _iterated(self, epoch: int, start: int) -> Iterator[Batch]:
        read = self._isolated(epoch)
        position = 0
        while group := [b for _ in range(self.world) if (b := read.next()) is not None]:
            group += [_repeated(group[-1])] * (self.world - len(group))
            if position >= start:
                yield group[self.rank]
            position += 1
        if position == 0:
            raise ModgraftError("the loader has no batches")


def _repeated(batch: Batch) -> Batch:
    return Repeated(batch) if isinstance(batch, Mapping) else batch


class _Isolated:
    """Iterate with random generators apart from the caller's, so that neither affects the other.

    Their states are kept here between reads, so that the batches are a function of `position`
    alone, whatever the training step draws in between.
    """

    def __init__(
        self, source: Iterable[Batch], own: Sequence[Any], position: tuple[int | str, ...]
    ) -> None:
        self._own = own
        with own_randomness(own):
            seed_everything(*position, own=own)
            _set_epoch(source, int(position[-1]))
            self._iterator = iter(source)
            self._states = states(own)

    def next(self) -> Batch | None:
        """Return the next batch, None at the end."""
        with own_randomness(self._own):
            set_states(self._states, self._own)
            batch = next(self._iterator, None)
            self._states = states(self._own)
        return batch


def ids_of(batch: Batch, ignore: Sequence[str] = ("ids",)) -> list[str] | None:
    """Return the ids in a batch, for messages: its "ids", or else the first ignored list in it."""
    for name in ("ids", *ignore):
        if isinstance(batch.get(name), list | tuple):
            return [str(i) for i in batch[name]]
    return None


def digest(batch: Batch) -> str:
    """Return a hash of a batch's content."""
    return sha256(b"".join(_bytes_of(batch))).hexdigest()[:16]


def _bytes_of(value: Any) -> Iterator[bytes]:
    """Yield what tells ``value`` from another; of an unknown object, its type."""
    if isinstance(value, Side):
        value = (value.tensor, value.mask)
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor) and value.layout == torch.strided:
        yield f"{value.dtype}{list(value.shape)}".encode()
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    elif isinstance(value, Mapping):
        for key in value:
            yield repr(key).encode()
            yield from _bytes_of(value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _bytes_of(each)
    else:
        plain = isinstance(value, str | bytes | int | float | bool | None)
        yield (repr(value) if plain else type(value).__name__).encode()


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor in `value`, and every object with a `to` (a `Side`), to `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(to_device(v, device) for v in value)
    move = getattr(value, "to", None)
    return move(device) if callable(move) else value


def label_tokens(batch: Batch) -> float:
    """Return the number of targets of an encoder-decoder's loss: labels other than −100."""
    return float((batch["labels"] != -100).sum())


def next_tokens(batch: Batch) -> float:
    """Return the number of targets of a causal decoder's loss: labels other than −100, without
    those at the first position of each sequence, which nothing predicts."""
    return float((batch["labels"][..., 1:] != -100).sum())


#: how many terms a batch's mean loss averages over
Weigh = Callable[[Batch], float]
