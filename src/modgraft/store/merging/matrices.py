"""Which tensors of a checkpoint are matrices, stacks of them, or kernels of convolutions.

Two axes are a matrix. What has more is told by the model itself, made from the configuration
without its weights: the kernel of a convolution is the matrix ``[out, in · k…]``, and a parameter
of three axes of any other layer, as of one with experts, a stack of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from modgraft.store.merging.weights import Checkpoint


@dataclass(frozen=True)
class Matrices:
    """How the numbers of a tensor lie: ``count`` matrices of ``rows`` × ``columns``."""

    count: int
    rows: int
    columns: int


def matrices(checkpoint: Checkpoint) -> dict[str, Matrices | None]:
    """Return what the tensors are that have two axes or more; None: it cannot be told."""
    shapes = {
        name: entry.shape
        for name, entry in checkpoint.entries.items()
        if len(entry.shape) > 1 and math.prod(entry.shape) and entry.dtype.is_floating_point
    }
    model = _bare(checkpoint.folder) if any(len(s) > 2 for s in shapes.values()) else None
    layers = {} if model is None else dict(model.named_modules())
    return {name: _as_matrices(name, shape, layers) for name, shape in shapes.items()}


def _as_matrices(
    name: str, shape: tuple[int, ...], layers: Mapping[str, nn.Module]
) -> Matrices | None:
    if len(shape) == 2:
        return Matrices(1, *shape)
    path, _, own = name.rpartition(".")
    layer = layers.get(path)
    if layer is None or own not in layer._parameters:
        return None
    if isinstance(layer, _ConvNd):
        return Matrices(1, shape[0], math.prod(shape[1:]))
    return Matrices(*shape) if len(shape) == 3 and shape[0] > 1 else None


def _bare(folder: Path) -> nn.Module | None:
    """Make the model of a folder without its weights; None where transformers has none such."""
    import transformers
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            return None if kind is None else kind(config)
    except (OSError, ValueError):  # a class that is not transformers' own
        return None
