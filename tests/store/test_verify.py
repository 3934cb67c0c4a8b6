"""A folder is read to its last bit, and what is wrong with it is said."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import modgraft as mg
from common import kept
from modgraft.store.card import Card
from modgraft.store.verify import verify


def saved(folder: Path, fill: float = 1.0) -> Path:
    host = mg.Host(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    host.implant("qa", mg.LoRA(rank=2), at="0")
    with torch.no_grad():
        for parameter in host["qa"].parameters():
            parameter.fill_(fill)
    return host.save("qa", folder)


def test_a_folder_as_it_was_saved(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", 2.0)
    (one / "mine.txt").write_text("a user's own")
    found = verify(one)
    assert (found.whole, found.names, found.problems) == (True, ["qa"], [])
    assert len(found.hash) == 64
    assert verify(two).hash != found.hash
    assert kept(one)["qa:0:A"].eq(1).all()


def test_a_changed_bit_is_found_anywhere(tmp_path: Path) -> None:
    file = saved(tmp_path / "qa") / "module.safetensors"
    content = file.read_bytes()
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 4
        file.write_bytes(changed)
        found = verify(tmp_path / "qa")
        assert not found.whole, at
        assert str(tmp_path / "qa") in found.problems[0]


def test_derived_files_that_lag_behind_are_named(tmp_path: Path) -> None:
    folder, other = saved(tmp_path / "qa"), saved(tmp_path / "other", 2.0)
    for name in ("module.json", "README.md"):
        (other / name).replace(folder / name)
        found = verify(folder)
        assert found.whole
        assert f"{folder / name} is not what the card" in found.problems[-1]
    (folder / "module.json").unlink()
    os.mkfifo(folder / "module.json")  # a pipe would be waited for
    (folder / ".module.safetensors.abcdefgh.part").write_bytes(b"half")
    (folder / ".module.safetensors.part").write_bytes(b"a user's own")
    found = verify(folder)
    assert found.whole
    assert [".part" in problem for problem in found.problems] == [False, False, True]
    saved(folder)
    assert verify(folder).problems == []
    assert (folder / ".module.safetensors.part").exists()


def test_what_is_no_module(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", saved(tmp_path / "qa") / "README.md"):
        found = verify(folder)
        assert not found.whole
        assert found.names == []
        assert "no module in" in found.problems[0]


def test_a_hash_stays_when_a_later_version_has_more_to_say(tmp_path: Path) -> None:
    """A card names what was said, and not what could have been."""
    card = Card.from_text((saved(tmp_path / "qa") / "module.json").read_text(), "it")

    class Later(Card):
        audience: str | None = None

    assert Later.from_text(card.to_text(), "it").sha256 == card.sha256
