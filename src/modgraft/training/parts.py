"""Join batches into one, and let the host compute a loss for each of them in one forward.

A host returns one loss, a mean over the batch, which it computes by one of PyTorch's functions.
Within :class:`Apart` these functions take the mean over each part's rows instead, so that the
host's ``loss`` is a vector with one entry a part, whatever the host does with its logits before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from modgraft.core.errors import ModgraftError
from modgraft.core.side import Side
from modgraft.training.stream import Batch

PARTS = "parts"  # the key of `Parts` in a batch
LENGTHENED = {"attention_mask": 0, "decoder_attention_mask": 0, "token_type_ids": 0, "labels": -100}
IDS = ("input_ids", "decoder_input_ids")  # padded with the host's id


@dataclass(frozen=True)
class Parts:
    """The parts of a batch, one after the other.

    Attributes:
        names: the name of each part; several parts may have the same.
        rows: the number of examples of each part.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]


class Apart(TorchFunctionMode):
    """A mode in which a mean loss ``[]`` over a batch becomes the means ``[N]`` of its parts.

    Args:
        rows: the number of examples of each part; each example has equally many terms of the loss.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__()
        self.rows = list(rows)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in LOSSES and given.get("reduction", "mean") == "mean":
            return self._means(func, args, given)
        return func(*args, **given)

    def _means(self, func: Callable[..., Tensor], args: tuple, given: dict[str, Any]) -> Tensor:
        if given.get("weight") is not None:
            raise ModgraftError(
                f"the host's {func.__name__} has weights of classes, by which parts of a batch "
                f"would count for one another; train them one after the other, by host.fit"
            )
        terms = func(*args, **{**given, "reduction": "none"})
        target = args[1] if len(args) > 1 else given["target"]
        counted = torch.ones_like(terms)
        if func in COUNTS and not target.is_floating_point():
            counted = (target != given.get("ignore_index", -100)).to(terms.dtype)
        total = sum(self.rows)
        if terms.shape[0] % total:
            raise ModgraftError(
                f"the host's {func.__name__} has {terms.shape[0]} terms for {total} examples, "
                f"which cannot be told apart; train them one after the other, by host.fit"
            )
        sums, counts = (
            torch.stack([part.sum() for part in value.reshape(total, -1).split(self.rows)])
            for value in (terms, counted)
        )
        return sums / counts  # NaN for a part without targets, as PyTorch gives for such a batch


COUNTS = frozenset({F.cross_entropy, F.nll_loss})  # losses that may ignore targets
LOSSES = COUNTS | {
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits,
}  # fmt: skip


def together(batches: Sequence[Batch], names: Sequence[str], padding: int = 0) -> Batch:
    """Join batches into one, whose ``"parts"`` says which examples are of which.

    Texts of unequal length are padded on the right, and the padding is masked. ``"modules"``
    becomes a list with a composition for each example.

    Args:
        batches: dicts of tensors ``[B_i, …]``, of ``Side``s, and of values equal in all.
        names: the name of each batch.
        padding: the id that pads texts.

    Raises:
        ModgraftError: for batches of different arguments, or shapes that cannot be padded.
    """
    rows = tuple(examples(batch, name) for batch, name in zip(batches, names, strict=True))
    made: dict[str, Any] = {PARTS: Parts(tuple(names), rows)}
    every = [dict(batch) for batch in batches]
    if len({b["input_ids"].shape[1:] for b in every if isinstance(b.get("input_ids"), Tensor)}) > 1:
        for batch in every:  # a batch without a mask has no padding yet
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    for name, batch in zip(names, every, strict=True):
        if batch.keys() != every[0].keys():
            odd = sorted(batch.keys() ^ every[0].keys())
            raise ModgraftError(
                f"the batches of {names[0]!r} and {name!r} are for one forward, and only one of "
                f"them has {', '.join(odd)}; give both the same arguments"
            )
    for key in every[0]:
        values = [batch[key] for batch in every]
        if key == "modules":
            made[key] = [c for v, n in zip(values, rows, strict=True) for c in _each(v, n)]
        elif key == "ids":
            made[key] = [each for value in values for each in value]
        else:
            values = [_for_each(value, n) for value, n in zip(values, rows, strict=True)]
            made[key] = _joined(key, values, names, padding)
    return made


def _for_each(value: Any, rows: int) -> Any:
    """Return a row that is for all examples of a batch, as positions, for each of them."""
    one = isinstance(value, Tensor) and value.dim() and value.shape[0] == 1 < rows
    return value.expand(rows, *value.shape[1:]) if one else value


def examples(batch: Batch, name: str) -> int:
    """Return the number of examples of a batch.

    Raises:
        ModgraftError: if it has no tensor.
    """
    first = next((v for v in batch.values() if isinstance(v, Tensor) and v.dim()), None)
    if first is None:
        raise ModgraftError(f"a batch of {name!r} has no tensor [batch, …]: {', '.join(batch)}")
    return first.shape[0]


def _each(modules: Any, rows: int) -> list[Any]:
    return list(modules) if isinstance(modules, list | tuple) else [modules] * rows


def _joined(key: str, values: list[Any], names: Sequence[str], padding: int) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise ModgraftError(
                f"{key!r} holds {', '.join(str(list(v)) for v in values)} in the batches of "
                f"{', '.join(names)}; one forward takes the same of each"
            )
        return {k: _joined(f"{key}[{k!r}]", [v[k] for v in values], names, padding) for k in first}
    if isinstance(first, Side):
        return _joined_sides(values)
    if isinstance(first, Tensor) and first.dim():
        return _joined_tensors(key, values, names, padding)
    if any(not _equal(value, first) for value in values):
        raise ModgraftError(
            f"{key!r} is one for a forward, and the batches of {', '.join(names)} say "
            f"{', '.join(map(repr, values))[:200]}; leave it out, or give one value"
        )
    return first


def _joined_sides(sides: Sequence[Side]) -> Side:
    most = max(side.tensor.shape[1] for side in sides)
    tensors = [_longer(side.tensor, most, 0.0) for side in sides]
    masks = [_longer(side.seen(), most, False) for side in sides]
    return Side(torch.cat(tensors), torch.cat(masks))


def _joined_tensors(
    key: str, values: Sequence[Tensor], names: Sequence[str], padding: int
) -> Tensor:
    """Join tensors ``[B_i, …]``; texts of unequal length are padded."""
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) == 1:
        return torch.cat(list(values))
    fills = LENGTHENED | dict.fromkeys(IDS, padding)
    if key not in fills or len({shape[1:] for shape in shapes}) > 1:
        raise ModgraftError(
            f"{key!r} is {', '.join(str(list(v.shape)) for v in values)} in the batches of "
            f"{', '.join(names)}; {', '.join(fills)} are filled up, others have one shape"
        )
    most = max(shape[0] for shape in shapes)
    return torch.cat([_longer(value, most, fills[key]) for value in values])


def _longer(value: Tensor, most: int, fill: float) -> Tensor:
    """Pad ``value`` ``[B, n, …]`` with ``fill`` to ``[B, most, …]``."""
    shape = (value.shape[0], most - value.shape[1], *value.shape[2:])
    return torch.cat([value, value.new_full(shape, fill)], dim=1)


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
