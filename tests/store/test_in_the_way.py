"""What is in the way of a save: odd names of layers, and other things where its files go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from modgraft.core import files


class Named(nn.Module):
    """A network with layers of any names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Module()
        for name in names:
            self.layers.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.children():
            x = layer(x)
        return x


def host(*names: str) -> mg.Host:
    made = mg.Host(Named(*names))
    made.implant("a", mg.LoRA(rank=2), at=nn.Linear)
    with torch.no_grad():
        for p in made["a"].parameters():
            p.normal_(generator=torch.Generator().manual_seed(1))
    return made


@pytest.mark.parametrize(
    "name",
    [
        "c[0/2]", "c[0:1/2x2]", "c[3/2]", "[0/2]", "c[residual]", "c[0/2][residual]", "c:d", "c/d",
        "*", "{a,b}", "c d", "é", "\n", "a\0b", "_orig_mod", "weight", "\\", '"', "input", "😀",
    ],
)  # fmt: skip
def test_layers_of_any_name(name: str, tmp_path: Path) -> None:
    one = host(name, "plain")
    one.save("a", tmp_path / "a")
    other = mg.Host(Named(name, "plain"))
    other.load(tmp_path / "a")
    x = torch.randn(2, 4)
    assert torch.equal(other(x), one(x))
    assert not torch.equal(one(x), one(x, modules=None))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("c", "c[0/2]"), r"'layers\.c\[0/2\]' is two things here; call the layer otherwise"),
        (("c", "c[residual]"), "is two things here"),
        (("\ud800",), "half a character in its name"),
    ],
)
def test_names_that_no_file_can_tell_apart(
    names: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    one = host(*names)
    with pytest.raises(mg.ModgraftError, match=words):
        one.save("a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "name", ["training", "keys", "_parameters", "call_super_init", "T_destination"]
)
def test_a_module_is_called_as_no_attribute_of_all_modules(name: str) -> None:
    made = mg.Host(Named("c"))
    with pytest.raises(mg.ModgraftError, match=r"every nn\.Module has an attribute of that name"):
        made.implant(name, mg.LoRA(rank=2), at=nn.Linear)
    assert not list(made.implants)


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _link_to_a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.parent.parent)


@pytest.mark.parametrize("make", [_folder, _link_to_a_folder])
@pytest.mark.parametrize("name", ["module.json", "README.md"])
def test_a_folder_in_the_place_of_a_file(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    one = host("c")
    one.save("a", tmp_path / "a")
    before = (tmp_path / "a" / "module.safetensors").read_bytes()
    make(tmp_path / "a" / name)
    with torch.no_grad():
        for p in one["a"].parameters():
            p.add_(1)
    with pytest.raises(mg.ModgraftError, match=rf"{name} is no file.*as it was"):
        one.save("a", tmp_path / "a")
    assert (tmp_path / "a" / "module.safetensors").read_bytes() == before
    mg.Host(Named("c")).load(tmp_path / "a")


@pytest.mark.parametrize("name", ["module.json", "README.md", "module.safetensors"])
def test_a_link_that_leads_nowhere_is_replaced(name: str, tmp_path: Path) -> None:
    one = host("c")
    one.save("a", tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / name).symlink_to(tmp_path / "nowhere")
    one.save("a", tmp_path / "a")
    assert (tmp_path / "a" / name).is_file()
    assert not (tmp_path / "nowhere").exists()
    mg.Host(Named("c")).load(tmp_path / "a")


def test_a_disk_that_is_full_after_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = host("c")
    one.save("a", tmp_path / "a")
    with torch.no_grad():
        for p in one["a"].parameters():
            p.add_(1)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("modgraft.store.folder.write_text", full)
    with pytest.raises(mg.ModgraftError, match=r"is saved, and that is all .*No space left"):
        one.save("a", tmp_path / "a")
    assert files.write_text is not full
    other = mg.Host(Named("c"))
    other.load(tmp_path / "a")
    x = torch.randn(2, 4)
    assert torch.equal(other(x), one(x))


def test_a_class_of_ones_own_with_a_public_name(tmp_path: Path) -> None:
    """Its folder would be read as the library's class, or as whichever was defined last."""
    one, first = host("c"), mg.OFT  # which is defined when it is first asked for

    class OFT(mg.ParameterComposition):
        k: float = 1.0

        def build(self, site: mg.Site) -> None:
            self.d = nn.Parameter(torch.zeros(4, 4))

        def delta(self, weight: Tensor) -> Tensor:
            return self.d * self.k

    one.implant("own", OFT(k=2.0), at="layers.c")
    with pytest.raises(mg.ModgraftError, match=r"OFT is a class of your own .* call it otherwise"):
        one.save("own", tmp_path / "own")
    assert not (tmp_path / "own").exists()
    one.implant("oft", first(block=2), at="layers.c")
    one.save("oft", tmp_path / "oft")
    there = mg.Host(Named("c")).load(tmp_path / "oft")
    assert type(there.method) is first
