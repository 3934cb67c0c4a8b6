"""Fusions of adapters with names of all sorts, and of adapters that leave layers out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapterhub_format import FOLDER, computed, model, output_of

import modgraft as mg
from modgraft.core.errors import CheckpointError

FUSION = "model_adapter_fusion.safetensors"


def fusion(tmp_path: Path, *names: str) -> Path:
    """Return the fusion of two bottlenecks in a GPT-2, the adapters called otherwise."""
    folder = Path(shutil.copytree(FOLDER / "saved" / "fusion" / "gpt2", tmp_path / "folder"))
    path = folder / "adapter_fusion_config.json"
    said = json.loads(path.read_text("utf-8"))
    said |= {"adapter_names": list(names), "name": ",".join(names)}
    path.write_text(json.dumps(said), encoding="utf-8")
    rename(folder / FUSION, r"_layer\.m,n\.", f"_layer.{said['name']}.")
    for old, new in zip("mn", names, strict=True):
        (folder / old).rename(folder / f"{new} ")
        (folder / f"{new} ").rename(folder / new)
        rename(folder / new / "adapter.safetensors", rf"adapters\.{old}\.", f"adapters.{new}.")
        config = folder / new / "adapter_config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text("utf-8")) | {"name": new}), encoding="utf-8"
        )
    return folder


def rename(file: Path, old: str, new: str) -> None:
    save_file({re.sub(old, new, key): t for key, t in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("names", "here"),
    [
        (("sts-b", "my task"), ["sts_b", "my_task", "sts_b_my_task"]),
        (("a-b", "a_b"), ["a_b", "a_b_1", "a_b_a_b_1"]),
        (("0", "1"), ["adapter", "adapter_1", "adapter_adapter_1"]),
    ],
)
def test_adapters_of_any_name_are_fused(
    names: tuple[str, str], here: list[str], tmp_path: Path
) -> None:
    folder, host = fusion(tmp_path, *names), mg.Host(model("gpt2"))
    host.load(folder)
    assert [*host.implants] == here
    torch.testing.assert_close(
        computed(host, "gpt2"), output_of("fusion", "gpt2"), rtol=0, atol=1e-9
    )
    again = mg.Host(model("gpt2"))
    again.load(folder, name="z")
    assert [*again.implants] == [*here[:2], "z"]
    assert torch.equal(computed(again, "gpt2"), computed(host, "gpt2"))


@pytest.mark.parametrize("name", ["../m", "", ".."])
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = fusion(tmp_path, "m", "n")
    path = folder / "adapter_fusion_config.json"
    said = json.loads(path.read_text("utf-8")) | {"adapter_names": [name, "n"]}
    path.write_text(json.dumps(said | {"name": f"{name},n"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is no folder's name"):
        mg.Host(model("gpt2")).load(folder)


def test_fusion_layers_where_all_adapters_are_left_out_are_not_read(tmp_path: Path) -> None:
    """adapters makes one at each place that a configuration names, and runs those with adapters."""
    folder = fusion(tmp_path, "m", "n")
    for name in "mn":
        path = folder / name / "adapter_config.json"
        said = json.loads(path.read_text("utf-8"))
        said["config"]["leave_out"] = [0]
        path.write_text(json.dumps(said), encoding="utf-8")
        file = folder / name / "adapter.safetensors"
        save_file({k: t for k, t in load_file(file).items() if ".h.0." not in k}, file)
    host = mg.Host(model("gpt2"))
    host.load(folder)
    assert all(path.startswith("transformer.h.1") for path in host["m_n"].paths)

    whole = load_file(folder / FUSION)
    save_file({k: t for k, t in whole.items() if ".h.0." not in k}, folder / FUSION)
    assert len(load_file(folder / FUSION)) < len(whole)
    without = mg.Host(model("gpt2"))
    without.load(folder)
    assert torch.equal(computed(host, "gpt2"), computed(without, "gpt2"))

    key = min(whole)
    other = key.replace("output_adapters", "others")
    save_file(whole | {other: whole[key].clone()}, folder / FUSION)
    with pytest.raises(CheckpointError, match="others"):
        mg.Host(model("gpt2")).load(folder)
