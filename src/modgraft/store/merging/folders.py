"""Merges saved modules from their folders, also where what trained beside them differs.

A part of the host that trained with a module, such as a head, is saved with it; no host has room
for two heads at one place. So a module is loaded, its head kept apart and taken out of the host
again. Changes of weights are merged as any; of the heads, one is taken, or their average, or none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modgraft.core.errors import ModgraftError
from modgraft.engine.implant import Implant, tensor_at
from modgraft.store.card import Card
from modgraft.store.folder import load, stored
from modgraft.store.merging.modules import merge
from modgraft.store.merging.table import SOUP
from modgraft.training.host_like import HostLike


@dataclass(frozen=True)
class Parent:
    """A module of a folder, in a host, and what trained beside it, which is not.

    Attributes:
        folder: where it is saved.
        name: what it is called in the host.
        card: what its folder says of it.
        head: the weights and buffers of the host that trained with it, by name.
    """

    folder: Path
    name: str
    card: Card
    head: Mapping[str, Tensor]


def load_apart(
    host: HostLike, folders: Sequence[Path], new: str = "", *, strict: bool = True
) -> list[Parent]:
    """Load modules, each from a folder of its own; what trained beside them stays out of the host.

    They are called as they were saved, or ``m2_<folder>`` where one is called so already, or
    ``new`` will be.

    Raises:
        ModgraftError: for a folder of several modules, or what ``host.load`` refuses. None of them
            is then in the host.
    """
    found: list[Parent] = []
    there = frozenset(host._implants)
    try:
        for number, folder in enumerate(folders, 1):
            modules = stored(folder, host.model)
            name, *others = modules.card.names
            if others:
                raise ModgraftError(
                    f"{folder} holds {', '.join(modules.card.names)}; what is merged or compared "
                    f"is a folder of one module: save each alone, host.save({name!r}, 'folder')"
                )
            if name in host or name == new:
                name = f"m{number}_" + re.sub(r"\W", "_", folder.resolve().name)
            before = set(host._implants)
            load(host, modules, name, strict=strict, active=False)
            head = {}
            for each in host._implants.keys() - before:
                head |= _taken_out(host, host._implants[each])
            found.append(Parent(folder, name, modules.card, head))
    except BaseException:
        _remove_new(host, there)
        raise
    return found


def _remove_new(host: HostLike, there: Collection[str]) -> None:
    """Remove the modules of a host that are not ``there``."""
    for name in reversed([name for name in host._implants if name not in there]):
        host.remove(name)


def _taken_out(host: HostLike, implant: Implant) -> dict[str, Tensor]:
    """Take what trained beside a module out of the host, which has its own again; return it."""
    head = {n: tensor_at(host.model, n).detach().clone() for n in sorted(implant.beside)}
    host._implants.take_back(implant, host.model)
    implant.beside, implant.replaced = frozenset(), {}
    return head


def merge_folders(
    host: HostLike,
    folders: Sequence[str | Path],
    into: str,
    method: str = "average",
    *,
    heads: str | None = None,
    strict: bool = True,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    **options: Any,
) -> Implant:
    """Merge saved modules into one new module of a host, with what trained beside them.

    Args:
        host: that which they were trained in.
        folders: of one module each.
        into: the name of the new module.
        method: see :func:`modgraft.merge`; not ``greedy_soup``.
        heads: what the new module has beside it, of weights of the host that trained with several
            of them to different values: ``"average"``, with ``weights``; ``"none"``, so that the
            host's own stay; or the name of the module whose it takes. None: they are all equal.
        strict: see ``host.load``.
        weights: one number for each module; None: 1.
        rank: the rank of the new module; None: exact.
        **options: those of the method.

    Returns:
        The new module's handle; the merged ones are not left in the host.

    Raises:
        ModgraftError: for heads that differ where ``heads`` is None, and whatever
            :func:`modgraft.merge` refuses. The host is then as it was.
    """
    if method == SOUP:
        raise ModgraftError(
            f"{SOUP} asks for scores of modules in one host: load them, and mg.merge(host, …)"
        )
    places = [Path(folder).resolve() for folder in folders]
    if twice := [f for f, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise ModgraftError(f"{twice[0]} is named twice; give it twice the weight instead")
    there = set(host._implants)
    parents = load_apart(host, [Path(folder) for folder in folders], into, strict=strict)
    try:
        names = [parent.name for parent in parents]
        new = merge(host, names, into, method, weights=weights, rank=rank, **options)
        shares = weights or [1.0] * len(parents)
        if method == "slerp":
            t = new.provenance["options"]["t"]
            shares = [1 - t, t]
        head = merged_heads(parents, heads, shares)
        host._implants.put_beside(new, host.model, head)
        if head:
            new.provenance["heads"] = heads or "equal"
        for said, parent in zip(new.provenance["parents"], parents, strict=True):
            said["tensors"] = parent.card.tensors or said["tensors"]
        there.add(into)
    finally:
        _remove_new(host, there)
    return new


def merged_heads(
    parents: Sequence[Parent], how: str | None, weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return the head that a merge of modules has; see :func:`merge_folders`.

    Raises:
        ModgraftError: for heads that differ and no choice, another choice than there is, or weights
            that an average cannot divide by.
    """
    own = {name: parent for parent in parents for name in (*parent.card.names, parent.name)}
    choices = f"average, none, or the module whose it is: {', '.join(own)}"
    if how is None:
        _check_equal(parents, choices)
        return dict(item for parent in parents for item in parent.head.items())
    if how in own:
        return dict(own[how].head)
    if how == "none":
        return {}
    if how != "average":
        raise ModgraftError(f"heads={how!r:.80}: there are {choices}")
    found: dict[str, list[tuple[float, Tensor]]] = {}
    for parent, weight in zip(parents, weights, strict=True):
        for name, tensor in parent.head.items():
            found.setdefault(name, []).append((weight, tensor))
    return {name: _average(name, several) for name, several in found.items()}


def _check_equal(parents: Sequence[Parent], choices: str) -> None:
    first: dict[str, Parent] = {}
    for parent in parents:
        for name, tensor in parent.head.items():
            other = first.setdefault(name, parent)
            if not torch.equal(tensor, other.head[name]):
                raise ModgraftError(
                    f"{other.folder} and {parent.folder} each trained a part of the host beside "
                    f"it, to other values: {name}. Say which one the merge has: heads={choices}"
                )


def _average(name: str, several: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return Σ wᵢ·θᵢ / Σ wᵢ."""
    whole = math.fsum(weight for weight, _ in several)
    if abs(whole) < 1e-8:
        raise ModgraftError(
            f"heads='average': the weights of those that have {name} sum to 0, by which an "
            f"average divides; take the head of one, or none"
        )
    total = sum(weight / whole * tensor.double() for weight, tensor in several)
    dtype, mean = several[0][1].dtype, torch.as_tensor(total)
    if name.endswith("running_var") and (mean < 0).any():
        raise ModgraftError(
            f"heads='average': with a weight below 0 the variance {name} comes out negative; take "
            f"the head of one, or none"
        )
    return (mean if dtype.is_floating_point else mean.round()).to(dtype)  # a count stays whole
