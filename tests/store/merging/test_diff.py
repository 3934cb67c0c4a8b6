"""What differs between two modules, and between two checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import modgraft as mg
from modgraft.core.errors import CheckpointError
from modgraft.store.merging.checkpoints import merge_checkpoints
from modgraft.store.merging.diff import compare_checkpoints, compare_modules


def checkpoint(folder: Path, **tensors: Tensor) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def two_modules(bias: bool) -> mg.Host:
    torch.manual_seed(0)
    host = mg.Host(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8)))
    for name in ("a", "b"):
        host.implant(name, mg.LoRA(rank=3, bias=bias), nn.Linear, active=False)
    with torch.no_grad():
        for parameter in host["a"].parameters():
            parameter.normal_()
        for own, other in zip(host["b"].parameters(), host["a"].parameters(), strict=True):
            own.copy_(other)
    return host


def test_equal_modules_differ_in_nothing() -> None:
    rows = compare_modules(two_modules(False), "a", "b")
    assert [(row.equal, row.rank) for row in rows] == [(True, 0), (True, 0)]


def test_a_bias_that_differs_is_seen() -> None:
    host = two_modules(True)
    with torch.no_grad():
        host["b"].places[1].get_parameter("b").add_(1)
    rows = {row.name: row for row in compare_modules(host, "a", "b")}
    assert [name for name, row in rows.items() if not row.equal] == ["1:bias"]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rank_is_that_of_what_was_added(tmp_path: Path, kind: torch.dtype) -> None:
    """Rounding to what is stored is no part of it."""
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    added = weight + torch.randn(64, 4) @ torch.randn(4, 96)
    paths = [
        checkpoint(tmp_path / name, w=tensor.to(kind), same=weight.to(kind).clone())
        for name, tensor in (("a", weight), ("b", added))
    ]
    ranks = {row.name: row.rank for row in compare_checkpoints(*paths, ranks=True)}
    assert ranks == {"w": 4, "same": 0}


def test_odd_tensors(tmp_path: Path) -> None:
    one = {
        "nan": torch.tensor([[math.nan]]),
        "none": torch.empty(0, 4),
        "tiny": torch.tensor(1e-200),
    }
    one["tiny"] = one["tiny"].double().fill_(1e-200)
    other = {**one, "tiny": one["tiny"] * 2}
    paths = [checkpoint(tmp_path / name, **t) for name, t in (("a", one), ("b", other))]
    rows = {row.name: row for row in compare_checkpoints(*paths, ranks=True)}
    assert rows["nan"].only == "NaN"
    assert rows["none"].equal
    assert not rows["tiny"].equal


def test_a_base_of_other_tensors(tmp_path: Path) -> None:
    a = checkpoint(tmp_path / "a", w=torch.ones(2), v=torch.ones(2))
    b = checkpoint(tmp_path / "b", w=torch.ones(2), v=torch.ones(2))
    base = checkpoint(tmp_path / "base", w=torch.ones(2))
    with pytest.raises(CheckpointError, match="has no v, which both have"):
        compare_checkpoints(a, b, base)


def test_weights_that_cancel_do_not_divide(tmp_path: Path) -> None:
    """0.3, −0.1 and −0.2 of one sign add up to nothing: no division, as mergekit has it."""
    host = mg.Host(nn.Sequential(nn.Linear(3, 3)))
    delta = torch.ones(3, 3)
    for name, sign in (("a", 1.0), ("b", -1.0), ("c", -1.0)):
        host.implant(name, mg.DenseDelta(), "0", active=False)
        with torch.no_grad():
            host[name].places[0].get_parameter("values").copy_(sign * delta)
    new = mg.merge(
        host, ["a", "b", "c"], "m", "ties", weights=[0.3, -0.1, -0.2], density=1.0
    )  # fmt: skip
    found = new.places[0].delta(host.model.get_parameter("0.weight"))  # type: ignore[operator]
    torch.testing.assert_close(found, 0.6 * delta)


def test_what_all_have_alike_stays(tmp_path: Path) -> None:
    """A mask of −∞ is merged as it is, and of counts of batches the largest is kept."""
    mask = torch.full((2, 2), -math.inf).triu(1)
    paths = [
        checkpoint(
            tmp_path / name, mask=mask, w=torch.full((2,), value),
            **{"norm.num_batches_tracked": torch.tensor(int(value))},
        )
        for name, value in (("a", 1.0), ("b", 3.0))
    ]  # fmt: skip
    (paths[0] / "extra").mkdir()
    (paths[0] / "extra" / "chat.json").write_text("{}")
    out = merge_checkpoints(paths, tmp_path / "out")
    rows = {row.name: row for row in compare_checkpoints(paths[1], out)}
    assert rows["norm.num_batches_tracked"].equal
    assert torch.equal(mg_tensor(out, "mask"), mask)
    assert mg_tensor(out, "w").tolist() == [2.0, 2.0]
    assert (out / "extra" / "chat.json").is_file()


def mg_tensor(folder: Path, name: str) -> Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")[name]


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "a", w=torch.ones(2).to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match="'w' holds F8_E4M3, which is not read"):
        compare_checkpoints(one, one)


def test_arguments_of_another_kind(tmp_path: Path) -> None:
    host = two_modules(False)
    with pytest.raises(mg.ModgraftError, match="a list, of one number for each"):
        mg.merge(host, ["a", "b"], "m", weights=1.0)  # type: ignore[arg-type]
    with pytest.raises(mg.ModgraftError, match="give a list of modules"):
        mg.merge(host, "a", "m")
    with pytest.raises(mg.ModgraftError, match="not a Sequential"):
        mg.merge(host.model, ["a"], "m")  # type: ignore[arg-type]
    with pytest.raises(mg.ModgraftError, match="give a list of folders"):
        merge_checkpoints("a/b", tmp_path / "out")  # type: ignore[arg-type]
