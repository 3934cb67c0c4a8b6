"""Folders of the first format, a card beside two files of tensors, are still read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modgraft as mg
from contract.hosts import HOSTS, HostCase, tensor_of

HEAD = "cls.predictions.bias"


def formerly(model: nn.Module, without: str) -> dict[str, str]:
    """Return the first format's fingerprint: of names and shapes, and of 256 values of each."""
    shape, weights = hashlib.sha256(), hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        shape.update(f"{name}{list(p.shape)};".encode())
        if name != without:
            flat = p.detach().reshape(-1)
            weights.update(flat[:: max(1, flat.numel() // 256)].float().numpy().tobytes())
    hashes = {"shape": shape.hexdigest()[:16], "weights": weights.hexdigest()[:16]}
    return {"architecture": type(model).__name__, **hashes}


def write(host: mg.Host, case: HostCase, folder: Path, **other: Any) -> None:
    folder.mkdir()
    qa = host["qa"]
    card = {
        "format": 1, "name": "qa", "type": "LoRA", "config": qa.method.config(),
        "sites": list(qa.paths), "host": formerly(case.model(), HEAD), "beside": [HEAD],
    }  # fmt: skip
    (folder / "module.json").write_text(json.dumps(card | other))
    save_file({k: t.detach() for k, t in qa.tensors().items()}, folder / "module.safetensors")
    save_file({HEAD: host.model.get_parameter(HEAD).detach()}, folder / "host.safetensors")


def test_a_folder_of_the_first_format(tmp_path: Path) -> None:
    case = HOSTS["bert"]
    host = mg.Host(case.model()).eval()
    host.implant("qa", mg.LoRA(rank=2), at="query")
    with torch.no_grad():
        host["qa"].places[0].get_parameter("B").normal_()
        host.model.get_parameter(HEAD).normal_()
        expected = tensor_of(host(**case.batch()))
    write(host, case, tmp_path / "qa")
    fresh = mg.Host(case.model()).eval()
    before = fresh.model.get_parameter(HEAD).clone()
    assert fresh.load(tmp_path / "qa").beside == {HEAD}
    with torch.no_grad():
        assert torch.equal(tensor_of(fresh(**case.batch())), expected)
    fresh.save("qa", tmp_path / "qa")  # in the format of today, in its place
    assert not (tmp_path / "qa" / "host.safetensors").exists()
    fresh.remove("qa")
    assert torch.equal(fresh.model.get_parameter(HEAD), before)
    fresh.load(tmp_path / "qa")
    with torch.no_grad():
        assert torch.equal(tensor_of(fresh(**case.batch())), expected)
    write(host, case, tmp_path / "damaged", sites="all")
    with pytest.raises(mg.ModgraftError, match=r"is not a module's card \(sites"):
        mg.Host(case.model()).load(tmp_path / "damaged")
    write(host, case, tmp_path / "another")
    with pytest.raises(mg.ModgraftError, match=r"another host \(weights differ"):
        mg.Host(case.model(seed=5)).load(tmp_path / "another")
