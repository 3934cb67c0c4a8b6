"""Weights that accelerate has offloaded: its hooks keep them, and lend them to a layer that runs.

Between calls such a layer has tensors without data, on the meta device. What is read of it then,
for a hash or a merge, is what its hook keeps, in memory or on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from math import prod
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn

from modgraft.core.patterns import joined

P = ParamSpec("P")
R = TypeVar("R")

REMEDY = (
    "load the model without offload, or call accelerate.hooks.remove_hook_from_module(model, "
    "recurse=True), which brings back what cpu_offload and dispatch_model took away"
)


def hooks_of(layer: nn.Module) -> list[tuple[AlignDevicesHook, Mapping[str, Tensor]]]:
    """Return the hooks that keep weights of ``layer``, or of what is in it, and what they keep."""
    hook = layer.__dict__.get("_hf_hook")
    several = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [
        (each, each.weights_map)
        for each in several
        if isinstance(each, AlignDevicesHook) and each.offload and each.weights_map is not None
    ]


def is_offloaded(model: nn.Module) -> bool:
    """Return whether weights of ``model`` are offloaded."""
    return any("_hf_hook" in layer.__dict__ and hooks_of(layer) for layer in model.modules())


def brought(layer: nn.Module, name: str, own: Tensor) -> Tensor:
    """Return what ``layer`` computes with for its tensor ``own``, on the device where it runs.

    It is ``own`` itself where that has data, or where no hook of the layer keeps them.
    """
    if own.is_meta:
        for hook, kept in hooks_of(layer):
            if name in kept:
                return _read(kept, name).to(hook.execution_device, own.dtype)
    return own


class _Away(NamedTuple):
    """A tensor that is offloaded.

    Attributes:
        path: its name in the model.
        tensors: the layer's dictionary that holds it, of its parameters or of its buffers.
        name: its name in that dictionary.
        own: the tensor in that dictionary, which has no data.
        kept: the tensors with data that the layer's hook keeps.
        key: its name among these.
    """

    path: str
    tensors: dict[str, Any]
    name: str
    own: Tensor
    kept: Mapping[str, Tensor]
    key: str


def _away(model: nn.Module) -> Iterator[_Away]:
    for path, module in model.named_modules():
        for hook, kept in hooks_of(module):
            for at, layer in module.named_modules() if hook.place_submodules else [("", module)]:
                every: list[dict[str, Any]] = [layer._parameters, layer._buffers]
                for tensors, name in [(some, name) for some in every for name in some]:
                    own, key = tensors[name], joined(at, name)
                    if own is not None and own.is_meta and key in kept:
                        yield _Away(joined(path, key), tensors, name, own, kept, key)


@contextmanager
def present(model: nn.Module) -> Iterator[None]:
    """Give offloaded layers their tensors in a ``with`` block, in which they are read, or written.

    Tied ones are one again. What lies on the disk is mapped, and takes no memory until it is
    written to; it is kept in memory then.
    """
    lent: list[tuple[_Away, Tensor, int]] = []
    known: dict[Any, Tensor] = {}
    sources = _sources(model)
    try:
        for each in _away(model):
            value = _read(each.kept, each.key).to(dtype=each.own.dtype)
            if isinstance(each.own, nn.Parameter):
                value = nn.Parameter(value, requires_grad=each.own.requires_grad)
            place = (value.data_ptr(), value.shape) if value.numel() else each.path
            value = known.setdefault(sources.get(each.path, place), value)
            each.tensors[each.name] = value
            lent.append((each, value, value._version))
        yield
    finally:
        for each, value, version in lent:
            if value._version != version:
                _write(each.kept, each.key, value.detach())
            if each.tensors.get(each.name) is value:
                each.tensors[each.name] = each.own


def reads_offloaded(
    function: Callable[Concatenate[nn.Module, P], R],
) -> Callable[Concatenate[nn.Module, P], R]:
    """Let a function of a model read offloaded weights, as :func:`present` gives them."""

    @wraps(function)
    def reading(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> R:
        if not is_offloaded(model):
            return function(model, *args, **kwargs)
        with present(model):
            return function(model, *args, **kwargs)

    return reading


def _sources(model: nn.Module) -> dict[str, str]:
    """Return one name for all names of a weight that transformers has tied."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        tied = module.__dict__.get("all_tied_weights_keys")
        for name, source in (tied or {}).items():
            found[joined(path, name)] = found[joined(path, source)] = joined(path, source)
    return found


def _read(kept: Mapping[str, Tensor], name: str) -> Tensor:
    """Read a tensor from what a hook keeps; that of a file of accelerate's is mapped."""
    if isinstance(kept, PrefixedDataset):
        return _read(kept.dataset, kept.prefix + name)
    if isinstance(kept, OffloadedWeightsLoader) and name not in kept.state_dict:
        said = kept.index[name]
        if said.get("safetensors_file") is None:
            file, shape = Path(kept.save_folder or "") / f"{name}.dat", said["shape"]
            dtype = getattr(torch, said["dtype"])
            flat = torch.from_file(str(file), shared=False, size=prod(shape), dtype=dtype)
            return flat.view(shape)
    return kept[name]


def _write(kept: Any, name: str, value: Tensor) -> None:
    """Let a hook keep another tensor, in memory."""
    if isinstance(kept, PrefixedDataset):
        _write(kept.dataset, kept.prefix + name, value)
    else:
        (kept.state_dict if isinstance(kept, OffloadedWeightsLoader) else kept)[name] = value
