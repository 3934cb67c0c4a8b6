"""Compares two checkpoints, or two modules of a host, weight by weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from modgraft.computation.base import ParameterComposition
from modgraft.core.errors import CheckpointError
from modgraft.core.expression import module_of
from modgraft.core.precision import wide
from modgraft.store.merging.low_rank import Change, dense, svd, total
from modgraft.store.merging.modules import changes_of
from modgraft.store.merging.streamed import Progress
from modgraft.store.merging.weights import BLOCK, Checkpoint
from modgraft.training.host_like import HostLike


@dataclass(frozen=True)
class Row:
    """How one tensor differs.

    Attributes:
        name: the tensor's, or the site's label.
        shape: its shape.
        one: ‖A‖, in the Frobenius norm.
        other: ‖B‖.
        relative: ‖B − A‖ / ‖A‖; infinity where A alone is 0.
        cosine: that of the angle between A and B; None where one of them is 0.
        rank: the rank of B − A, where it was asked for and this is a matrix.
        only: ``"A"`` or ``"B"`` where the other one has no such tensor, ``"shape"`` where it has
            another shape, ``"type"`` where it holds whole numbers and they differ, ``"NaN"`` where
            one holds NaN or infinity, else ``""``.
    """

    name: str
    shape: tuple[int, ...]
    one: float
    other: float
    relative: float
    cosine: float | None
    rank: int | None = None
    only: str = ""

    @property
    def equal(self) -> bool:
        """Whether every number is the same."""
        return not self.only and self.relative == 0


def compare_checkpoints(
    one: str | Path,
    other: str | Path,
    base: str | Path | None = None,
    *,
    ranks: bool = False,
    progress: Progress | None = None,
) -> list[Row]:
    """Compare two folders of weights, reading them block by block.

    Args:
        one: A's folder.
        other: B's folder.
        base: a checkpoint that is subtracted from both first; None: the weights are compared.
        ranks: whether to find the rank of each matrix's difference, which needs it as a whole.
        progress: told how many numbers are compared, and how many there are.

    Returns:
        A row for each tensor, in A's order, then those of B alone.

    Raises:
        CheckpointError: for a folder that is no checkpoint, or a base of other tensors.
    """
    with closing(Checkpoint(Path(one))) as a, closing(Checkpoint(Path(other))) as b:
        origin = a if base is None else Checkpoint(Path(base))
        with closing(origin):
            if lacking := sorted((a.entries.keys() & b.entries.keys()) - origin.entries.keys()):
                raise CheckpointError(
                    f"{base} has no {lacking[0]}, which both have, and {len(lacking) - 1} others "
                    f"neither: it is no base of theirs"
                )
            sizes = {name: math.prod(entry.shape) for name, entry in a.entries.items()}
            rows, done, every = [], 0, sum(sizes.values())
            for name in [tensor for names in a.shards.values() for tensor in names]:
                rows.append(_tensor(a, b, None if base is None else origin, name, ranks))
                done += sizes[name]
                if progress is not None:
                    progress(done, every)
            for name in [n for n in b.entries if n not in a.entries]:
                rows.append(_alone(name, b.entries[name].shape, "B"))
    return rows


def compare_modules(host: HostLike, one: str, other: str) -> list[Row]:
    """Compare the changes Δ of two modules of a host at each weight.

    Where a module is no change of weights, such as an adapter or a prompt, the tensors of both are
    compared as they are, by site and name.

    Args:
        host: theirs.
        one: A's name.
        other: B's name.

    Returns:
        A row for each weight, or each tensor, with the rank of the difference.
    """
    methods = [host._implants.computation(name) for name in (one, other)]
    if not all(isinstance(method, ParameterComposition) for method in methods):
        tensors = [host._implants[module_of(name)].tensors() for name in (one, other)]
        return compare_tensors(*tensors)
    rows = []
    with torch.no_grad():
        for label, changes in changes_of(host, [one, other]).items():
            missing = [change is None for change in changes]
            here = next(change for change in changes if change is not None)
            if any(missing):
                rows.append(_alone(label, tuple(here.shape), "B" if missing[0] else "A"))
                continue
            a, b = (change for change in changes if change is not None)
            rows.append(_ranked(label, dense(a), dense(b), total([b, a], [1, -1])))
    return rows


def compare_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[Row]:
    """Compare tensors by name.

    Returns:
        A row for each, in A's order, then those of B alone, with the rank of the difference.
    """
    rows = []
    for name in {**one, **other}:
        a, b = one.get(name), other.get(name)
        if a is None or b is None:
            here = a if a is not None else b
            rows.append(_alone(name, tuple(torch.as_tensor(here).shape), "B" if a is None else "A"))
        elif a.shape != b.shape:
            rows.append(_alone(name, tuple(a.shape), "shape"))
        elif not (a.is_floating_point() and b.is_floating_point()):
            same = a.dtype == b.dtype and torch.equal(a, b)
            rows.append(Row(name, tuple(a.shape), 0.0, 0.0, 0.0, None, only="" if same else "type"))
        else:
            a, b = wide(a.detach()), wide(b.detach())
            rows.append(_ranked(name, a, b, b - a))
    return rows


def _ranked(name: str, a: Tensor, b: Tensor, apart: Change) -> Row:
    """Compare A and B with the rank of B − A, of a matrix."""
    row = _row(name, tuple(a.shape), lambda: [[a, b, b - a]])
    if len(a.shape) != 2 or not a.numel() or row.only:
        return row
    return replace(row, rank=_rank(apart, row))


def _tensor(a: Checkpoint, b: Checkpoint, base: Checkpoint | None, name: str, ranks: bool) -> Row:
    entry = a.entries[name]
    if name not in b.entries:
        return _alone(name, entry.shape, "A")
    others = [each.entries.get(name) for each in (b, *([] if base is None else [base]))]
    if any(other is None or other.shape != entry.shape for other in others):
        return _alone(name, entry.shape, "shape")
    size, kinds = math.prod(entry.shape), {entry.dtype, b.entries[name].dtype}
    if not all(kind.is_floating_point for kind in kinds):
        same = len(kinds) == 1 and all(
            torch.equal(a.numbers(name, i, j), b.numbers(name, i, j)) for i, j in _steps(size)
        )
        return Row(name, entry.shape, 0.0, 0.0, 0.0, None, None, "" if same else "type")

    def blocks() -> Iterable[list[Tensor]]:
        for i, j in _steps(size):
            one, other = wide(a.numbers(name, i, j)), wide(b.numbers(name, i, j))
            if base is not None:
                origin = wide(base.numbers(name, i, j))
                one, other = one - origin, other - origin
            yield [one, other, other - one]

    row = _row(name, entry.shape, blocks)
    if ranks and len(entry.shape) == 2 and size and not row.only:
        apart = torch.cat([block[2] for block in blocks()])
        kind = max((e.dtype for e in (entry, b.entries[name])), key=lambda t: torch.finfo(t).eps)
        sizes = [math.sqrt(float(d)) for d in _norms(a, b, name, size)]
        row = replace(row, rank=_rank(apart.reshape(entry.shape), row, kind, max(sizes)))
    return row


def _steps(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def _row(name: str, shape: tuple[int, ...], blocks: Callable[[], Iterable[list[Tensor]]]) -> Row:
    """Compare A and B, of which ``blocks`` gives A, B and B − A."""
    products, differ = torch.zeros(3, 3, dtype=torch.float64), False
    for block in blocks():
        flat = torch.stack([each.double().flatten() for each in block])
        products += (flat @ flat.T).cpu()
        differ = differ or bool(block[2].any())
    if not products.isfinite().all():
        return _alone(name, shape, "NaN")
    one, other, apart = products.diagonal().sqrt().tolist()
    relative = apart / one if one and apart else (math.inf if differ else 0.0)
    cosine = float(products[0, 1]) / (one * other) if one and other else None
    return Row(name, shape, one, other, relative, cosine)


def _rank(apart: Change, row: Row, kind: torch.dtype | None = None, size: float = 0.0) -> int:
    """Return the rank of B − A, of which rounding errors of what is stored are no part.

    Args:
        apart: B − A.
        row: what is known of it.
        kind: the type that A and B are stored in; None: that of ``apart``.
        size: the larger of their norms as they are stored, without a base; 0: as in ``row``.
    """
    if row.equal:
        return 0
    # an error of eps · |a| in each number is a matrix of noise, of norm about eps · ‖A‖ / √min
    noise = torch.finfo(kind or apart.dtype).eps * (size or max(row.one, row.other))
    least = 2 * noise / math.sqrt(min(row.shape))
    return int((svd(apart)[1] > max(least, row.one * 1e-12)).sum())


def _norms(a: Checkpoint, b: Checkpoint, name: str, size: int) -> list[Tensor]:
    """Return ‖A‖² and ‖B‖² of a tensor as it is stored."""
    return [
        sum(
            (each.numbers(name, i, j).double().square().sum() for i, j in _steps(size)),
            torch.zeros((), dtype=torch.float64),
        )
        for each in (a, b)
    ]


def _alone(name: str, shape: tuple[int, ...], only: str) -> Row:
    return Row(name, shape, 0.0, 0.0, math.inf, None, None, only)
