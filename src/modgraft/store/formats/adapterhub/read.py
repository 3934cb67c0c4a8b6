"""AdapterHub's folders: recognised, and read as one adapter or as a fusion of several."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from modgraft.store.formats.adapterhub import adapter, fusion
from modgraft.store.formats.adapterhub.layout import (
    CONFIG,
    FUSION,
    FUSION_TENSORS,
    HEAD,
    OTHERS,
    TENSORS,
)
from modgraft.store.stored import Stored


def holds(folder: Path) -> bool:
    """Return whether a folder looks like one of ``adapters``, or what is left of one."""
    if any((folder / name).is_file() for name in (HEAD, FUSION, *OTHERS, TENSORS, FUSION_TENSORS)):
        return True
    path = folder / CONFIG  # PEFT's has a file of that name
    return (
        path.is_file() and path.stat().st_size < 2**20 and b'"peft_type"' not in path.read_bytes()
    )


def read(folder: Path, model: nn.Module) -> Stored:
    """Read the modules in a folder; see :class:`modgraft.store.formats.base.Format`."""
    if (folder / FUSION).exists() or (folder / FUSION_TENSORS).exists():
        return fusion.read(folder, model)
    return adapter.read(folder, model)
