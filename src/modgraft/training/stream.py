"""Batches in an order that is a function of (seed, epoch), so that any position can be replayed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from modgraft.core.context import Side
from modgraft.core.errors import ModgraftError, an

#: what a loader yields: named tensors, `modgraft.Side`s, a list of ids
Batch = Mapping[str, Any]


def fold(*numbers: int | str) -> int:
    """Return a 63-bit seed that depends on all of `numbers` and nothing else, equal on every
    machine."""
    return int.from_bytes(sha256(repr(numbers).encode()).digest()[:8], "little") >> 1


def seed_everything(*position: int | str) -> None:
    """Seed torch (every device), numpy and python from a position, such as (seed, "step", 12)."""
    seed = fold(*position)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


#: held by whoever seeds the generators of the process, so that two threads do not share a seed
_SEEDED = threading.RLock()


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leave the caller's torch, numpy and python generators as they were found.

    No other thread is in such a block at the same time: all of them draw from one generator.
    """
    with _SEEDED:
        state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.set_rng_state(state[2])
            if cuda:
                torch.cuda.set_rng_state_all(cuda)


def _generators(loader: object) -> list[torch.Generator]:
    """Return the generators of a loader and of its samplers, each once."""
    found: dict[int, torch.Generator] = {}
    queue: list[object] = [loader]
    while queue:
        owner = queue.pop()
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
        owned = [getattr(owner, name, None) for name in ("sampler", "batch_sampler")]
        queue += [x for x in owned if x is not None]
    return list(found.values())


def _seed_loader(loader: object, *position: int | str) -> None:
    """Seed every generator that orders a loader from a position that ends in the epoch."""
    seed_everything(*position)
    for i, generator in enumerate(_generators(loader)):
        generator.manual_seed(fold(*position, i))
    _set_epoch(loader, int(position[-1]))


def _set_epoch(loader: object, epoch: int) -> None:
    """Call `set_epoch` of the samplers and the data set that have it (`DistributedSampler`)."""
    for name in ("batch_sampler", "sampler", "dataset"):
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
    seeded from (seed, epoch), and batches before the position are read and dropped. With worker
    processes what is random *inside* a worker is not replayed; the order is.

    With `world` processes, process `rank` takes every `world`-th batch; where the number of
    batches does not divide, a few from the start of the epoch are read twice, so that every
    process takes as many steps.

    Args:
        loader: a `DataLoader` or another iterable that can be iterated more than once.
        seed: seed of the order.
        rank: this process.
        world: number of processes.
        pad: whether to read batches twice, as above; False leaves some processes a batch short.

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
        pad: bool = True,
    ) -> None:
        if isinstance(loader, Iterator):
            raise ModgraftError(
                f"the loader is {an(type(loader).__name__)}, which can be read only once; give a "
                "DataLoader, a list of batches or an object whose __iter__ starts anew"
            )
        self.loader, self.seed, self.rank, self.world, self.pad = loader, seed, rank, world, pad
        self.indexed = (
            isinstance(loader, DataLoader)
            and not isinstance(loader.dataset, IterableDataset)
            and loader.batch_sampler is not None
        )
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
            generators = _generators(self.loader)
            before = [g.get_state() for g in generators]
            with own_randomness():
                _seed_loader(self.loader, self.seed, "order", epoch)
                batches = [list(b) for b in cast(DataLoader, self.loader).batch_sampler or ()]
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)
            self._order = epoch, batches
        return self._order[1]

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
        return _Isolated(self.loader, (self.seed, "order", 0)).next() or {}

    @property
    def rereads(self) -> bool:
        """Whether a batch can be read again by itself, as it was."""
        replayed = isinstance(self.loader, DataLoader) and self.loader.num_workers == 0
        return isinstance(self.loader, Sequence) or (self.indexed and replayed)

    def reread(self, epoch: int, batch: int) -> Batch:
        """Read the first process's batch at a position, where batches have positions."""
        if isinstance(self.loader, Sequence):
            return self.loader[batch * self.world % len(self.loader)]
        loader, order = cast(DataLoader, self.loader), self.order(epoch)
        with own_randomness():
            seed_everything(self.seed, "batch", epoch, batch, 0)
            rows = [loader.dataset[i] for i in order[batch * self.world % len(order)]]
            return cast(Batch, loader.collate_fn(rows))

    def _indexed(self, epoch: int, start: int) -> Iterator[Batch]:
        loader, order = cast(DataLoader, self.loader), self.order(epoch)
        places = range(self.rank, (self.length or 0) * self.world, self.world)
        mine = [order[i % len(order)] for i in places if self.pad or i < len(order)]
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
            with own_randomness():
                seed_everything(self.seed, "batch", epoch, i, self.rank)
                batch = next(batches)
            yield batch

    def _iterated(self, epoch: int, start: int) -> Iterator[Batch]:
        read = _Isolated(self.loader, (self.seed, "order", epoch))
        position = 0
        first: list[Batch] = []
        while group := [b for _ in range(self.world) if (b := read.next()) is not None]:
            # a short last group is filled from the start of the epoch, as in `_indexed`
            first += group[: self.world - len(first)]
            if self.pad:
                group += first[: self.world - len(group)]
                group = [group[i % len(group)] for i in range(self.world)]
            if position >= start and self.rank < len(group):
                yield group[self.rank]
            position += 1
        if position == 0:
            raise ModgraftError("the loader has no batches")


class _Isolated:
    """Iterate with random generators apart from the caller's, so that neither affects the other.

    Their states are kept here between reads, so that the batches are a function of `position`
    alone, whatever the training step draws in between.
    """

    def __init__(self, source: Iterable[Batch], position: tuple[int | str, ...]) -> None:
        with own_randomness():
            _seed_loader(source, *position)
            self._iterator = iter(source)
            self._keep_states()

    def _keep_states(self) -> None:
        self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def next(self) -> Batch | None:
        """Return the next batch, None at the end."""
        with own_randomness():
            random.setstate(self._states[0])
            np.random.set_state(self._states[1])
            torch.set_rng_state(self._states[2])
            batch = next(self._iterator, None)
            self._keep_states()
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
