"""The fingerprint of a host: a hash of its weights' shapes, and one of a sample of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import nn

SAMPLES = 256  # values read from each tensor, so that a large host takes well under a second


def shape_fingerprint(model: nn.Module) -> dict[str, str]:
    """Identify a host without reading its weights.

    Returns:
        ``architecture``, the class's name; ``shape``, a hash over names and shapes of the weights.
    """
    shape = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(remove_duplicate=True)):
        shape.update(f"{name}{list(tensor.shape)};".encode())
    return {"architecture": type(model).__name__, "shape": shape.hexdigest()[:16]}


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> dict[str, str]:
    """Identify a host by its shape and by a sample of its weights.

    Args:
        model: the host's.
        without: the names of weights whose values do not count.

    Returns:
        :func:`shape_fingerprint`, and ``weights``, a hash over evenly spaced values of each weight
        (in float32, so that it is the same on every device, but not after a change of precision).
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(remove_duplicate=True)):
        if name in without:
            continue
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        weights.update(flat[::step].to("cpu", torch.float32).contiguous().numpy().tobytes())
    return {**shape_fingerprint(model), "weights": weights.hexdigest()[:16]}
