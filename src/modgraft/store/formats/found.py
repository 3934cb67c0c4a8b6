"""What is found in another tool's folder, and the card that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modgraft.computation.base import Computation
from modgraft.store.card import Card, Saved, to_json
from modgraft.store.file import Entry
from modgraft.store.stored import Stored

Waiting = Mapping[str, tuple[Entry, Callable[[], Tensor]]]
"""Tensors by name: what they are, and what reads them."""


@dataclass(frozen=True)
class Found:
    """What becomes one module of ours.

    Attributes:
        name: its name.
        method: the computation.
        sites: the labels of its sites.
        tensors: its tensors, ``<site>:<name>``.
    """

    name: str
    method: Computation
    sites: Sequence[str]
    tensors: Waiting


def stored(
    folder: Path,
    modules: Sequence[Found],
    beside: Waiting,
    verify: Sequence[Callable[[], None]] = (),
    stem: str = "",
    **said: Any,
) -> Stored:
    """Return modules that were found as :class:`Stored` has them.

    Args:
        folder: where.
        modules: each after those that it needs.
        beside: the host's weights that come with them.
        verify: what raises a CheckpointError where the tensors contradict each other.
        stem: see :class:`Stored`.
        said: what else the card says; its ``names`` are those of all modules, if they are left out.
    """
    every = {f"{one.name}:{key}": t for one in modules for key, t in one.tensors.items()}
    every |= {f":{name}": t for name, t in beside.items()}

    def read() -> Mapping[str, Tensor]:
        for check in verify:
            check()
        return {key: make().contiguous() for key, (_, make) in every.items()}

    card = Card(
        modules=[
            Saved(name=one.name, **to_json(one.method), sites=list(one.sites)) for one in modules
        ],
        beside=sorted(beside),
        made="",
        **{"names": [one.name for one in modules], **said},
    )
    entries = {key: entry for key, (entry, _) in every.items()}
    return Stored(folder, card, lambda: entries, read, stem)
