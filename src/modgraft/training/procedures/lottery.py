"""Train sparse modules: lottery tickets by magnitude pruning, and two-phase fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from modgraft.computation.base import Computation
from modgraft.computation.sparse import SparseDelta, SparseSubnetwork
from modgraft.core.errors import ModgraftError, an
from modgraft.core.layers import weight_matrix
from modgraft.core.sites import find
from modgraft.engine.implant import moving_buffers
from modgraft.training.history import History
from modgraft.training.host_like import HostLike
from modgraft.training.stream import Batch

Method = TypeVar("Method", bound=Computation)


@dataclass(frozen=True)
class Round:
    """One training of :func:`magnitude_pruning`.

    Attributes:
        number: 0 for the dense training, then one for each pruning.
        density: the share of the weights that are left.
        history: the record of this training.
    """

    number: int
    density: float
    history: History


def magnitude_pruning(
    host: HostLike,
    name: str,
    loader: Iterable[Batch],
    *,
    rounds: int,
    share: float = 0.2,
    rewind: int = 0,
    everywhere: bool = True,
    also: Sequence[str] = (),
    folder: str | Path | None = None,
    **settings: Any,
) -> Iterator[Round]:
    """Prune by magnitude, iteratively, with rewinding (Frankle & Carbin 2019, arXiv:1803.03635).

    Train; take out the weights with the smallest |θ + φ| of those left; reset the others to their
    start; repeat. The iterator pauses after each training, so that the host can be measured, or the
    procedure ended. Only the mask is carried over from one training to the next.

    Args:
        host: where the module is implanted.
        name: a :class:`modgraft.SparseSubnetwork`; weights that its mask has taken out stay out.
        loader: as for ``host.fit``.
        rounds: prunings; there is one training more than that.
        share: the share of the weights left that each pruning takes out.
        rewind: 0 goes back to the host's weights; k > 0 to the weights after k steps of training
            (Frankle et al. 2020, arXiv:1912.05671), from which each training starts its schedule
            anew.
        everywhere: whether the smallest weights of all sites together are taken out, as in the
            paper's deep networks; False takes the same share at each site.
        also: what learns beside it, as ``train`` of ``host.fit`` names it, such as
            ``["host.head"]``, and is reset to its start as well; nothing else learns.
        folder: for ``host.fit``; each training has its own within it.
        **settings: for ``host.fit``, the same for every training. Weight decay draws φ to 0, which
            is the host's weights.

    Yields:
        One :class:`Round` a training, ``rounds + 1`` in all.

    Raises:
        ModgraftError: for a module of another kind, an argument out of range, or a training that
            did not reach the module because it is not in force.
    """
    places = _subnetworks(host, name)
    if rounds < 1 or not 0 < share < 1 or rewind < 0:
        raise ModgraftError(
            f"magnitude_pruning(rounds={rounds}, share={share}, rewind={rewind}): rounds is at "
            f"least 1, share is in (0, 1), rewind at least 0 steps"
        )

    def train(part: str, **changes: Any) -> History:
        keep = {} if folder is None else {"folder": Path(folder) / part}
        return host.fit(loader, train=[name, *also], **{**settings, **keep, **changes})

    def run() -> Iterator[Round]:
        if rewind:
            train("rewind", steps=rewind, epochs=None)
        with host.training_only([name, *also]):
            learn: list[Tensor] = [p for p in host.parameters() if p.requires_grad]
            learn += [buffer for _, buffer, learns in moving_buffers(host.model) if learns]
        began = [p.detach().clone() for p in learn]
        for number in range(rounds + 1):
            if number:
                _prune(host, places, share, everywhere)
                _put_back(learn, began)
            history = train(f"round-{number}")
            yield Round(number, _density(places.values()), history)

    return run()


def _subnetworks(host: HostLike, name: str) -> dict[str, SparseSubnetwork]:
    """Return the module at each of its sites, if each site has a mask."""
    places = _places(host, name, SparseSubnetwork)
    if len(places) < len(host[name].paths):
        raise ModgraftError(
            f"{name!r} is one mask over {len(host[name].paths)} sites of different weights, and "
            f"which of them are small is not one question; implant mg.SparseSubnetwork() itself"
        )
    return places


@torch.no_grad()
def _put_back(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _density(places: Iterable[SparseSubnetwork]) -> float:
    """Return the share of the weights that the masks have left."""
    masks = [place.get_buffer("mask") for place in places]
    return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


@torch.no_grad()
def _prune(
    host: HostLike, places: Mapping[str, SparseSubnetwork], share: float, everywhere: bool
) -> None:
    sizes: list[Tensor] = []  # |θ + φ|, infinite where a weight is already out
    for label, place in places.items():
        site = find(host.model, label)[0]
        size = (weight_matrix(site.module, site.part, site.parameter) + place.phi).abs()
        sizes.append(size.masked_fill(~place.get_buffer("mask"), torch.inf).flatten())
    groups = [torch.cat(sizes)] if everywhere else sizes
    keep = []
    for group in groups:
        there = int(group.isfinite().sum())
        count = max(0, min(max(1, round(share * there)), there - 1))  # at least one goes and stays
        smallest = group.topk(count, largest=False).indices
        keep.append(torch.ones_like(group, dtype=torch.bool).scatter(0, smallest, False))
    flat = torch.cat(keep).split([size.numel() for size in sizes])
    for place, mask in zip(places.values(), flat, strict=True):
        place.prune(mask.view_as(place.phi))


def sparse_finetuning(
    host: HostLike,
    name: str,
    loader: Iterable[Batch],
    *,
    first: Mapping[str, Any] | None = None,
    also: Sequence[str] = (),
    folder: str | Path | None = None,
    **settings: Any,
) -> tuple[History, History]:
    """Fine-tune sparsely in two phases (Ansell et al. 2022, arXiv:2110.07560).

    All of φ is trained; b becomes 1 at the ``density`` share of weights that changed most, over all
    sites together; φ is reset to 0 and trained where b is 1. The paper's L1 penalty on φ is left
    out.

    Args:
        host: where the module is implanted.
        name: a :class:`modgraft.SparseDelta`, still in its first phase.
        loader: as for ``host.fit``.
        first: settings for the first phase only.
        also: what learns beside it in both phases, as ``train`` of ``host.fit`` names it, such as
            ``["host.head"]``; the second phase goes on with what the first has made of it. Nothing
            else learns.
        folder: for ``host.fit``; each phase has its own within it.
        **settings: for ``host.fit``, of both phases.

    Returns:
        The record of each phase.

    Raises:
        ModgraftError: for a module of another kind, one whose mask has been chosen, or one that
            the training did not reach because it is not in force.
    """
    places = _places(host, name, SparseDelta)
    if any(place.get_buffer("indices").numel() for place in places.values()):
        raise ModgraftError(
            f"{name!r} has its mask already; train it on with host.fit(loader, train={name!r}), or "
            f"implant a fresh SparseDelta"
        )
    parts = ("first", "second")
    keep = [{} if folder is None else {"folder": Path(folder) / part} for part in parts]
    train = [name, *also]
    dense = host.fit(loader, train=train, **{**settings, **keep[0], **(first or {})})
    changes = torch.cat([place.values.detach().abs() for place in places.values()])
    density = next(iter(places.values())).density
    best = changes.topk(max(1, round(density * changes.numel()))).indices
    start = 0
    for place in places.values():
        size = place.values.numel()
        place.keep(best[(best >= start) & (best < start + size)].sort().values - start)
        start += size
    return dense, host.fit(loader, train=train, **{**settings, **keep[1]})


def _places(host: HostLike, name: str, kind: type[Method]) -> dict[str, Method]:
    implant = host[name]
    places = {
        label: place
        for label, place in zip(implant.paths, implant.places, strict=True)
        if isinstance(place, kind) and next(place.parameters(), None) is not None
    }  # a place without parameters uses those of another
    if not places:
        raise ModgraftError(
            f"{name!r} is {an(type(implant.method).__name__)}; this trains a {kind.__name__}: "
            f"host.implant('m', mg.{kind.__name__}(), at='query')"
        )
    return places
