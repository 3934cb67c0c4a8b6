"""What loading into another host with ``strict=False`` warns of: by name and by how much."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from common import forge
from modgraft.store.folder import native
from modgraft.store.within import SKETCHES


class Net(nn.Module):
    """A host with a tensor of any kind."""

    odd: Tensor

    def __init__(self, odd: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.scale = [1.0]
        self.register_buffer("odd", odd)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def saved(odd: Tensor, folder: Path) -> Path:
    host = mg.Host(Net(odd))
    host.implant("a", mg.LoRA(rank=1), "first")
    return Path(host.save("a", folder))


def told(host: mg.Host, folder: Path, *, lazy: bool = False) -> str:
    """Load, and return the only warning, which names this file."""
    with pytest.warns(UserWarning, match="loaded into another host") as said:
        host.load(folder, strict=False, lazy=lazy)
    assert [each.filename for each in said] == [__file__]
    return str(said[0].message)


def bits(value: int) -> Tensor:
    return torch.full((32,), value, dtype=torch.uint8).view(torch.bits8)


def sparse(*values: float) -> Tensor:
    return torch.tensor(values).to_sparse()


def quantised(scale: float) -> Tensor:
    return torch.quantize_per_tensor(torch.ones(4) * scale, scale, 0, torch.qint8)


ODD: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], str]] = {
    "doubled": (lambda: torch.ones(4), lambda: 2 * torch.ones(4), "50 %"),
    "complex": (lambda: torch.full((4,), 1j), lambda: torch.full((4,), 2j), "50 %"),
    "half complex": (
        lambda: torch.full((4,), 1j, dtype=torch.complex32),
        lambda: torch.full((4,), 2j, dtype=torch.complex32),
        "50 %",
    ),
    "conjugate": (lambda: torch.full((4,), 1j), lambda: torch.full((4,), 1j).conj(), "200 %"),
    "bytes": (lambda: torch.ones(4).to(torch.uint8), lambda: torch.ones(4).byte() * 4, "75 %"),
    "switches": (lambda: torch.ones(4).bool(), lambda: torch.zeros(4).bool(), "100 %"),
    "small floats": (
        lambda: torch.ones(4).to(torch.float8_e4m3fn),
        lambda: torch.ones(4).mul(2).to(torch.float8_e4m3fn),
        "50 %",
    ),
    "infinite": (lambda: torch.zeros(4), lambda: torch.full((4,), -torch.inf), "100 %"),
    "sparse": (lambda: sparse(0, 1, 0), lambda: sparse(0, 4, 0), "72.8 %"),
    "quantised": (lambda: quantised(1.0), lambda: quantised(3.0), "[1-9].* %"),
    "bits": (lambda: bits(0), lambda: bits(1), "an unknown amount"),
    "NaN": (lambda: torch.ones(4), lambda: torch.full((4,), torch.nan), "an unknown amount"),
    "elsewhere": (
        lambda: torch.ones(4000),
        lambda: torch.cat([torch.ones(3999), torch.zeros(1)]),
        "an unknown amount",
    ),
    "of other lengths": (
        lambda: sparse(0, 1, 0), lambda: sparse(1, 1, 0), "an unknown amount"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_of_any_kind_are_told_apart(kind: str, tmp_path: Path) -> None:
    one, other, much = ODD[kind]
    folder = saved(one(), tmp_path / "a")
    mg.Host(Net(one())).load(folder)
    with pytest.raises(mg.ModgraftError, match="buffers differ"):
        mg.Host(Net(other())).load(folder)
    said = told(mg.Host(Net(other())), folder)
    assert re.search(rf": a is loaded .*\(1 of its 3 tensors: odd by {much}; measured on", said)
    assert said.endswith("train=['a', 'host.classifier'])")
    mg.Host(Net(one())).load(folder, strict=False)


def test_all_that_differs_is_told(tmp_path: Path) -> None:
    """Six tensors by name, the largest differences first, and what layers hold."""
    nets = [Net(torch.ones(4)) for _ in range(4)]
    host = mg.Host(nn.Sequential(*nets))
    host.implant("a", mg.LoRA(rank=1), "0.first")
    host.implant("b", mg.LoRA(rank=1), "1.first")
    host.save(["a", "b"], tmp_path / "a")
    host.remove("a")
    host.remove("b")
    with torch.no_grad():
        for number, net in enumerate(nets):
            net.first.weight.mul_(2)
            net.odd.mul_(10 if number == 3 else 1.001)
    nets[2].scale[0] = 2.0
    said = told(host, tmp_path / "a")
    assert ": a, b are loaded into another host than they were trained in (8 of its 12 te" in said
    assert "tensors: 3.odd by 90 %, 0.first.weight by 50 %, 1.first.weight by 50 %" in said
    assert re.search(
        r"odd by 0\.0\d+ % and 2 more; measured on a few values of each; 2\.scale", said
    )
    assert "2.scale, which a layer holds)" in said


@pytest.mark.parametrize("lazy", [False, True])
def test_what_only_a_layer_holds_has_its_own_remedy(lazy: bool, tmp_path: Path) -> None:
    folder = saved(torch.ones(4), tmp_path / "a")
    other = Net(torch.ones(4))
    other.scale[0] = 2.0
    host = mg.Host(other)
    said = told(host, folder, lazy=lazy)
    assert said.endswith("(scale, which a layer holds). Make this host as it was there")
    host.use("a")  # at its first use a module that waited is not warned of again


@pytest.mark.parametrize("each", [None, [], 3, {"odd": 3, "first.bias": ":"}, {"odd": "0:é"}])
def test_a_card_that_lacks_the_numbers_or_was_changed(each: object, tmp_path: Path) -> None:
    folder = saved(torch.ones(4), tmp_path / "a")
    said = native(folder).card.host
    forge(folder, host={**said, SKETCHES: each})
    words = "odd by an unknown amount" if isinstance(each, dict) else "its buffers; which and by"
    assert words in told(mg.Host(Net(torch.zeros(4))), folder)
