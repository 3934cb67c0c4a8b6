"""Weights that lie in parts on several devices are refused, with what holds instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import modgraft as mg

X = torch.randn(3, 6)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def host_of(model: nn.Module) -> mg.Host:
    host = mg.Host(model)
    host.implant("a", mg.LoRA(rank=2), at="0")
    with torch.no_grad():
        host["a"].places[0].B.normal_()
    return host


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


def test_what_is_spread_over_devices(mesh: DeviceMesh) -> None:
    host = host_of(model())
    before = host(X)
    with pytest.raises(mg.ModgraftError, match=r"as fully_shard does.*FullyShardedDataParallel"):
        fully_shard(host, mesh=mesh)
    split = model()
    split[0].weight = nn.Parameter(distribute_tensor(split[0].weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(mg.ModgraftError, match=r"the weight of 0 is a DTensor.*DistributedDataPar"):
        host_of(split)
    sharded = host_of(model())
    sharded(X)
    fully_shard(sharded.model, mesh=mesh)
    with pytest.raises(mg.ModgraftError, match="the weight of 0 is a DTensor"):
        sharded(X)
    assert before.isfinite().all()


@pytest.mark.filterwarnings("ignore")  # torch's own, of one process
def test_the_wrapper_that_leaves_a_layer_its_weight(mesh: DeviceMesh) -> None:
    host = host_of(model())
    before = host(X)
    wrapped = FullyShardedDataParallel(host, use_orig_params=True, device_id=torch.device("cpu"))
    torch.testing.assert_close(wrapped(X), before)
