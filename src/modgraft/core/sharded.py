"""Weights that lie in parts on several devices or processes, as ``fully_shard`` spreads them.

PyTorch's FSDP2 (``torch.distributed.fsdp.fully_shard``) leaves each process a part of a block's
weights, as a ``DTensor``, and gives the block whole ones while it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from modgraft.core.errors import ModgraftError

_ROOM = "torch.distributed.fsdp"


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor lies in parts on several devices, as a ``DTensor`` does."""
    return type(tensor) not in (Tensor, nn.Parameter) and bool(getattr(tensor, "device_mesh", None))


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its numbers; for a sharded one every process has to call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a model that ``fully_shard`` has spread over processes, by path; just now
    they may have their whole weights."""
    fsdp: Any = sys.modules.get(_ROOM)  # it takes long to import
    if fsdp is None:
        return
    for path, part in model.named_modules():
        if issubclass(type(part), fsdp.FSDPModule):  # a host says that it is its model
            yield path, part


def before_sharding(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of which ``fully_shard`` has made another, else the class itself."""
    return next(k for k in kind.__mro__ if not k.__module__.startswith(_ROOM))


def check_whole(weight: Tensor, where: str) -> None:
    """Refuse a weight that is sharded.

    Args:
        weight: of a layer.
        where: the layer, for the error.

    Raises:
        ModgraftError: with what holds instead.
    """
    if is_sharded(weight):
        raise ModgraftError(
            f"the weight of {where} is a {type(weight).__name__}, spread over devices, and no "
            f"whole matrix that a module could change: implant and load modules first, and call "
            f"fully_shard for the blocks of host.model then. A tensor-parallel plan takes none; "
            f"DistributedDataParallel(host) does"
        )
