"""Find the tensor among a layer's arguments and in its output, and replace it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from modgraft.core.errors import ModgraftError


def first_tensor(args: tuple, kwargs: dict) -> Tensor | None:
    """Return the first of a layer's arguments that is a tensor."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None


def tensor_input(x: Tensor | None, path: str) -> Tensor:
    """Return ``x``, the input of the site at ``path``.

    Raises:
        ModgraftError: if it is None.
    """
    if x is None:
        raise ModgraftError(f"{path or 'the host'} was called without a tensor")
    return x


def tensor_of(out: Any) -> Tensor:
    """Return the tensor of an output: itself, or the first of a tuple or of a ``ModelOutput``.

    Raises:
        ModgraftError: if that is no tensor, a ``PackedSequence`` for instance.
    """
    value = out if isinstance(out, Tensor) else out[0]
    if isinstance(value, PackedSequence):
        raise ModgraftError(
            "this RNN returns a PackedSequence, whose rows are steps of several examples, and a "
            "function of activations acts on [B, n, d]: call the RNN with a padded tensor, or "
            "implant a parameter module at one of its weights, at='rnn.weight_ih_l0'"
        )
    if not isinstance(value, Tensor):
        raise ModgraftError(
            f"a module acts on a tensor, and this site returns a {type(out).__name__}; "
            f"choose a site inside it"
        )
    return value


def with_tensor(out: Any, value: Tensor) -> Any:
    """Replace :func:`tensor_of` of ``out`` by ``value``."""
    if isinstance(out, Tensor):
        return value
    if isinstance(out, list):
        return [value, *out[1:]]
    if isinstance(out, tuple):
        rest = (value, *out[1:])
        return rest if type(out) is tuple else type(out)(*rest)  # a named tuple
    first = next(iter(out.keys()))  # a ModelOutput: its first key that is not None
    return replace(out, **{first: value})


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has numbers of its own, one after another, and is no sparse one."""
    return tensor.layout is torch.strided and not tensor.is_meta


def check_whole(weight: Tensor, where: str) -> None:
    """Refuse a weight that lies in parts on several devices, as a ``DTensor`` does.

    Args:
        weight: of a layer.
        where: the layer, for the error.

    Raises:
        ModgraftError: with what holds instead.
    """
    if type(weight) not in (Tensor, nn.Parameter) and getattr(weight, "device_mesh", None):
        raise ModgraftError(
            f"the weight of {where} is a {type(weight).__name__}, spread over devices by "
            f"fully_shard or a tensor-parallel plan, and no whole matrix that a module could "
            f"change; wrap the host in FullyShardedDataParallel(host, use_orig_params=True) or "
            f"DistributedDataParallel(host), which leave a layer its weight while it runs"
        )


def device_of(model: nn.Module) -> torch.device:
    """Return the device that ``model`` runs on: that of its parameters, the CPU if it has none.

    Parameters that accelerate has offloaded lie on no device between calls; its hooks say where the
    layers run.
    """
    devices = [parameter.device for parameter in model.parameters()]
    if all(device.type == "meta" for device in devices):
        for module in model.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    here = [device for device in devices if device.type != "meta"] or devices
    return here[0] if here else torch.device("cpu")
