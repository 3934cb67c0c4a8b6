"""A host whose weights lie in parts on several devices: what holds in it, and what is refused."""

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
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.store.fingerprint import fingerprint

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


def gpt(mesh: DeviceMesh | None, method: mg.Computation, at: str | list[str] | None) -> mg.Host:
    """A host with a module, whose blocks and rest are sharded where there is a mesh."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    host = mg.Host(GPT(GPTConfig(vocab_size=20, **sizes, tie_word_embeddings=False)))
    torch.manual_seed(1)
    host.implant("m", method, **({} if at is None else {"at": at}))
    with torch.no_grad():
        for p in host["m"].parameters():
            p.add_(0.1 * torch.randn(p.shape))
    if mesh is not None:
        for block in host.model.blocks:
            fully_shard(block, mesh=mesh)
        if at is not None:  # a prompt acts at the model itself
            fully_shard(host.model, mesh=mesh)
    return host


METHODS: list[tuple[mg.Computation, str | list[str] | None]] = [
    (mg.LoRA(rank=2), ["query", "value"]),
    (mg.LoRA(rank=2), "embedding"),
    (mg.LoRA(rank=2), "head"),
    (mg.Adapter(width=4), "down"),
    (mg.Prefix(length=3), "attention"),
    (mg.OFT(block=4), "query"),
    (mg.VeRA(rank=4), ["query", "value"]),
    (mg.SparseDelta(density=0.1), "up"),
    (mg.DenseDelta(), "up"),
    (mg.Rescale(), "key"),
    (mg.SoftPrompt(length=3), None),
]


@pytest.mark.parametrize(("method", "at"), METHODS, ids=lambda each: str(each)[:24])
def test_modules_act_in_a_sharded_host_as_in_a_whole_one(
    mesh: DeviceMesh, method: mg.Computation, at: str | list[str] | None
) -> None:
    ids = torch.randint(20, (2, 9))
    found = []
    for host in (gpt(None, method, at), gpt(mesh, method, at)):
        for _ in range(2):  # layers are read anew after a backward
            host.zero_grad()
            loss = host(input_ids=ids, labels=ids).loss
            loss.backward()
        grads = [p.grad for p in host["m"].parameters()]
        with torch.no_grad():
            found.append([loss.detach(), host(input_ids=ids).logits, *grads])
    assert all(map(torch.equal, *found))


def test_a_sharded_host_is_the_whole_one_to_its_modules(mesh: DeviceMesh, tmp_path: Path) -> None:
    host = gpt(mesh, *METHODS[0])
    whole = gpt(None, *METHODS[0])
    assert fingerprint(host.model) == fingerprint(whole.model)
    host.save("m", tmp_path / "m")
    whole.remove("m")
    whole.load(tmp_path / "m")
    ids = torch.randint(20, (2, 9))
    torch.testing.assert_close(whole(input_ids=ids).logits, host(input_ids=ids).logits)
    host.remove("m")
    assert not any("lora" in name for name in host.state_dict())
    host(input_ids=ids)


def test_a_side_input_is_asked_about_before(mesh: DeviceMesh) -> None:
    ids, side = torch.randint(20, (2, 9)), {"image": mg.Side(torch.randn(2, 4, 8))}
    want = gpt(None, mg.GatedFusion(dim=8), "down")(input_ids=ids, side=side).logits
    host = gpt(mesh, mg.GatedFusion(dim=8), "down")
    with pytest.raises(mg.ModgraftError, match=r"once with such a batch before fully_shard"):
        host(input_ids=ids, side=side)
    host = gpt(None, mg.GatedFusion(dim=8), "down")
    host(input_ids=ids, side=side)
    for block in host.model.blocks:
        fully_shard(block, mesh=mesh)
    assert torch.equal(host(input_ids=ids, side=side).logits, want)


def test_what_needs_whole_weights_is_refused(mesh: DeviceMesh) -> None:
    with pytest.raises(mg.ModgraftError, match=r"as fully_shard does.*blocks of host\.model"):
        fully_shard(host_of(model()), mesh=mesh)
    split = model()
    split[0].weight = nn.Parameter(distribute_tensor(split[0].weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(mg.ModgraftError, match=r"the weight of 0 is a DTensor.*implant and load"):
        host_of(split)
    host = gpt(mesh, *METHODS[0])
    with pytest.raises(mg.ModgraftError, match=r"Merge modules in one process"):
        host.merge("m")
    ids = torch.randint(20, (2, 9))
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(mg.ModgraftError, match=r"blocks\.0.*would train in parts.*train='qa'"):
        host.fit([batch], train=["m", "host"], steps=1, progress=False)
    host = gpt(None, mg.Adapter(width=4), "blocks.0")
    fully_shard(host.model.blocks[0], mesh=mesh)
    with pytest.raises(mg.ModgraftError, match=r"as a parametrisation or fully_shard makes it"):
        host(**batch)


@pytest.mark.filterwarnings("ignore")  # torch's own, of one process
def test_the_wrapper_that_leaves_a_layer_its_weight(mesh: DeviceMesh) -> None:
    host = host_of(model())
    before = host(X)
    wrapped = FullyShardedDataParallel(host, use_orig_params=True, device_id=torch.device("cpu"))
    torch.testing.assert_close(wrapped(X), before)
