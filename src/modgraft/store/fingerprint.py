"""The fingerprint of a host: a hash of its weights' shapes, and one of a sample of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import nn

SAMPLES = 256  # values read from each tensor, so that a large host takes well under a second
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


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
    return {**shape_fingerprint(model), "weights": _weights(model, without)}


def half_fingerprints(model: nn.Module, without: Collection[str] = ()) -> dict[str, str]:
    """Return the hash of the weights as they would be in each half precision, by its name."""
    return {name: _weights(model, without, dtype) for name, dtype in HALVES.items()}


def is_in_another_precision(
    model: nn.Module, there: Mapping[str, str], without: Collection[str] = ()
) -> bool:
    """Return whether a host is ``model`` in another precision, one of both a half precision.

    Args:
        model: a host's model.
        there: the other's :func:`fingerprint` and :func:`half_fingerprints`.
        without: the names of weights whose values do not count.
    """
    halves = [there.get(name) for name in HALVES]
    ours = half_fingerprints(model, without)
    return _weights(model, without) in halves or there.get("weights") in ours.values()


def _weights(model: nn.Module, without: Collection[str], dtype: torch.dtype = torch.float32) -> str:
    """Hash a sample of the weights, rounded to ``dtype``."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(remove_duplicate=True)):
        if name in without:
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)].to("cpu", dtype).float()
        weights.update(sample.contiguous().numpy().tobytes())
    return weights.hexdigest()[:16]
