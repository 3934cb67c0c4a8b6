"""Running statistics of a part of the host that trained with a module go where its weights go."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import modgraft as mg
from common import forge, kept
from modgraft.core.errors import ModgraftError
from modgraft.host.as_model import OF_HOST
from modgraft.store.fingerprint import fingerprint, rounded_fingerprints
from modgraft.store.folder import native
from modgraft.store.merging.folders import merge_folders
from modgraft.training.procedures.lottery import magnitude_pruning

STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


class Loader:
    """Begins anew whenever it is read."""

    def __init__(self, read: Callable[[], Iterator[dict[str, Tensor]]]) -> None:
        self.read = read

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.read()


class Net(nn.Module):
    """A convolution, and normalisations with weights of their own and without."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.bn.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))

    def forward(self, x: Tensor) -> SimpleNamespace:
        o = self.head(self.bn(self.c(x)).relu().mean((2, 3)))
        return SimpleNamespace(logits=o, loss=(o - 1).square().mean())


def fresh(moved: float = 0.0) -> mg.Host:
    """Make a host whose statistics have moved before."""
    torch.manual_seed(0)
    net = Net()
    net.bn.get_buffer("running_mean").add_(moved)
    return mg.Host(net).eval()


def inputs(shift: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 3, 6, 6, generator=generator) * 3 + shift


def trained(name: str = "a", *, shift: float = 1.0, part: str = "host.bn") -> mg.Host:
    host = fresh()
    host.implant(name, mg.LoRA(rank=1), at="c")
    host.fit([{"x": inputs(shift)}], train=[name, part], steps=20, lr=3e-2, progress=False)
    return host.eval()


def out(host: nn.Module) -> Tensor:
    with torch.no_grad():
        return host(inputs()).logits


def state(host: mg.Host) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in host.model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("part", ["bn", "head"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("to", ["modgraft", "peft"])
def test_statistics_come_back_with_their_module(
    tmp_path: Path, part: str, strict: bool, to: str
) -> None:
    host = trained(part=f"host.{part}")
    host.save("a", tmp_path / "a", format=to)
    other = fresh(moved=0.5 if part == "bn" else 0.0)  # of what trained, nothing is compared
    before = state(other)
    other.load(tmp_path / "a", "a", strict=strict)
    assert torch.equal(out(other), out(host))
    assert same(state(other), state(host))
    assert torch.equal(out(other.merge()), out(host.merge()))
    other.save("a", tmp_path / "again")  # they still belong to the module
    at = {"bn": ":bn", "head": ":head.1"}[part]
    assert kept(tmp_path / "again").keys() > {f"{at}.{name}" for name in STATISTICS}
    other.remove("a")
    assert same(state(other), before)


@pytest.mark.parametrize("here", [True, False])
def test_peft_has_them_too(tmp_path: Path, here: bool) -> None:
    if here:
        host = trained()
        host.save("a", tmp_path / "a", format="peft")
        other: nn.Module = peft.PeftModel.from_pretrained(fresh().model, tmp_path / "a").eval()  # type: ignore[arg-type]
        torch.testing.assert_close(out(other), out(host))
        return
    options = peft.LoraConfig(r=1, target_modules=["c"], modules_to_save=["bn"])
    theirs = peft.get_peft_model(fresh().model, options).train()  # type: ignore[arg-type]
    theirs.get_submodule("base_model.model.head").eval()  # whose statistics PEFT would not save
    theirs(inputs())  # moves the others
    theirs.eval().save_pretrained(str(tmp_path / "b"))
    host, before = fresh(), state(fresh())
    host.load(tmp_path / "b", "b")
    torch.testing.assert_close(out(host), out(theirs))
    assert host.model.get_buffer("bn.num_batches_tracked") == 1
    host.remove("b")
    assert same(state(host), before)


def test_a_spectral_norm_comes_along(tmp_path: Path) -> None:
    def made() -> mg.Host:
        host = fresh()
        torch.manual_seed(1)
        host.model.head = spectral_norm(nn.Linear(4, 4))
        return mg.Host(host.model)

    host = made()
    host.implant("a", mg.LoRA(rank=1), at="c")
    host.fit([{"x": inputs()}], train=["a", "host.head"], steps=5, progress=False)
    host.eval().save("a", tmp_path / "a")
    other = made().eval()
    before = state(other)
    other.load(tmp_path / "a")
    assert torch.equal(out(other), out(host))
    other.remove("a")
    assert same(state(other), before)


def test_the_count_of_batches_is_a_whole_number(tmp_path: Path) -> None:
    trained().save("a", tmp_path / "a")
    count = kept(tmp_path / "a")[":bn.num_batches_tracked"]
    assert count.dtype is torch.int64
    assert count.item() == 20
    forge(tmp_path / "a", kept(tmp_path / "a") | {":bn.num_batches_tracked": torch.tensor(20.0)})
    with pytest.raises(ModgraftError, match="num_batches_tracked holds float32 where int64"):
        fresh().load(tmp_path / "a")


def test_statistics_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    trained().save("a", tmp_path / "a")
    bad = kept(tmp_path / "a") | {":bn.running_var": torch.full((4,), torch.inf)}
    forge(tmp_path / "a", bad)  # where a mask of the host is infinite too, its own may be
    with pytest.raises(ModgraftError, match=r"bn\.running_var holds NaN or infinity"):
        fresh().load(tmp_path / "a")


def test_statistics_of_two_modules_are_refused(tmp_path: Path) -> None:
    def one(name: str, mean: float) -> None:
        host = fresh()
        host.implant(name, mg.LoRA(rank=1), at="c")
        host.model.get_submodule("bn").requires_grad_(True)
        host.model.get_buffer("bn.running_mean").fill_(mean)  # and the weights are the same
        host.save(name, tmp_path / name)

    one("a", 0.1)
    one("b", 0.2)
    host = fresh()
    host.load(tmp_path / "a")
    before = state(host)
    with pytest.raises(ModgraftError, match=r"host's bn\.running_mean, and so was 'a' here"):
        host.load(tmp_path / "b")
    assert list(host.implants) == ["a"]
    assert same(state(host), before)


def test_two_modules_with_the_same_statistics_share_them(tmp_path: Path) -> None:
    trained().save("a", tmp_path / "a")
    host = fresh()
    before = state(host)
    host.load(tmp_path / "a")
    moved = state(host)
    host.load(tmp_path / "a", "b")
    host.remove("a")
    assert same(state(host), moved)
    host.remove("b")
    assert same(state(host), before)


def test_a_frozen_normalisation_stays(tmp_path: Path) -> None:
    host = trained(part="host.c")
    fit = {k: v for k, v in state(fresh()).items() if k.startswith(("bn.", "head."))}
    assert same({k: v for k, v in state(host).items() if k in fit}, fit)
    host.save("a", tmp_path / "a")
    assert {k for k in kept(tmp_path / "a") if k[0] == ":"} == {":c.weight", ":c.bias"}
    with pytest.raises(ModgraftError, match="buffers differ"):  # they did not train with it
        fresh(moved=0.5).load(tmp_path / "a")
    other = fresh()
    other.load(tmp_path / "a")
    other.implant("b", mg.LoRA(rank=1), at="c")
    before = state(other)
    other.fit([{"x": inputs()}], train="b", steps=2, progress=False)
    assert same(state(other), before)


def test_a_file_without_statistics_is_read_as_before(tmp_path: Path) -> None:
    """Former versions left them out, and compared them with the host's."""
    host = trained()
    host.save("a", tmp_path / "a")
    weights = ["bn.bias", "bn.weight"]
    card = native(tmp_path / "a").card.model_dump()
    saved = [{**one, "beside": weights} for one in card["modules"]]
    former = {**fingerprint(host.model, weights), **rounded_fingerprints(host.model, weights)}
    lacking = {f":bn.{name}" for name in (*STATISTICS, "mask")}
    tensors = {k: t for k, t in kept(tmp_path / "a").items() if k not in lacking}
    forge(tmp_path / "a", tensors, beside=weights, modules=saved, host=former)
    other = fresh()
    with pytest.raises(ModgraftError, match="buffers differ"):
        other.load(tmp_path / "a")
    with pytest.warns(UserWarning, match="its buffers; which and by how much was not saved"):
        other.load(tmp_path / "a", strict=False)
    assert not torch.equal(out(other), out(host))
    other.remove("a")
    other.model.load_state_dict(host.model.state_dict())
    other.load(tmp_path / "a")
    assert torch.equal(out(other), out(host))


@pytest.mark.parametrize(
    ("heads", "mean"),
    [("a", lambda a, b: a), ("average", lambda a, b: (a + b) / 2), ("none", lambda a, b: None)],
)
def test_statistics_are_merged_as_heads(
    tmp_path: Path, heads: str, mean: Callable[[Tensor, Tensor], Tensor | None]
) -> None:
    hosts = [trained("a"), trained("b", shift=3.0)]
    folders = [one.save(n, tmp_path / n) for n, one in zip("ab", hosts, strict=True)]
    host = fresh()
    before = state(host)
    with pytest.raises(ModgraftError, match="each trained a part"):
        merge_folders(host, folders, "ab")
    assert same(state(host), before)
    merge_folders(host, folders, "ab", heads=heads)
    for name in ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"):
        found = mean(*(one.model.get_buffer(name).double() for one in hosts))
        expected = before[name] if found is None else found.to(before[name].dtype)
        torch.testing.assert_close(host.model.get_buffer(name), expected)
    host.save("ab", tmp_path / "ab")
    other = fresh()
    other.load(tmp_path / "ab")
    host.use("ab")
    assert torch.equal(out(other), out(host))
    host.remove("ab")
    assert same(state(host), before)


def test_no_variance_is_negative(tmp_path: Path) -> None:
    folders = []
    for name, variance in (("a", 1.0), ("b", 3.0)):
        host = fresh()
        host.implant(name, mg.LoRA(rank=1), at="c")
        host.model.get_submodule("bn").requires_grad_(True)
        host.model.get_buffer("bn.running_var").fill_(variance)
        folders.append(host.save(name, tmp_path / name))
    host, before = fresh(), state(fresh())
    with pytest.raises(ModgraftError, match=r"the variance bn\.running_var comes out negative"):
        merge_folders(host, folders, "ab", "arithmetic", heads="average", weights=[2, -1])
    assert same(state(host), before)
    assert not host.implants


def test_a_run_that_is_resumed_has_them(tmp_path: Path) -> None:
    def run(folder: Path, stop: int) -> mg.Host:
        def batches() -> Iterator[dict[str, Tensor]]:
            for number in range(6):
                if number == stop:
                    raise OSError("the disk is gone")
                yield {"x": inputs(float(number))}

        host = fresh()
        host.implant("a", mg.LoRA(rank=1), at="c")
        host.fit(
            Loader(batches), train=["a", "host.bn"], steps=6, folder=folder, save_every=3,
            progress=False,
        )  # fmt: skip
        return host.eval()

    whole = run(tmp_path / "whole", stop=9)
    with pytest.raises(OSError, match="disk is gone"):
        run(tmp_path / "parts", stop=4)
    assert same(state(run(tmp_path / "parts", stop=9)), state(whole))


def test_what_learns_is_saved_whole(tmp_path: Path) -> None:
    host = trained()
    host.save_pretrained(tmp_path)
    other = fresh()
    other.implant("a", mg.LoRA(rank=1), at="c")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(out(other), out(host))
    stored = load_file(tmp_path / "model.safetensors")
    said = json.dumps(fingerprint(host.model, {"bn.weight", "bn.bias"}))  # as former versions did
    stored[OF_HOST] = torch.tensor(list(said.encode()), dtype=torch.uint8)
    with pytest.raises(ModgraftError, match="buffers differ"):
        fresh().load_state_dict(stored, strict=False)
    other.load_state_dict(stored, strict=False)
    assert torch.equal(out(other), out(host))


def test_a_rewound_part_has_its_first_statistics() -> None:
    host = fresh()
    host.implant("a", mg.SparseSubnetwork(), at="c")
    rounds = magnitude_pruning(
        host, "a", [{"x": inputs()}], rounds=1, share=0.2, also=["host.bn"], steps=5, progress=False
    )
    counts = [host.model.get_buffer("bn.num_batches_tracked").item() for _ in rounds]
    assert counts == [5, 5]
