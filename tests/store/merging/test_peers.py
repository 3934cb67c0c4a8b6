"""Merges that other libraries' users reported as wrong, failing or lost, done here.

PEFT's issues 3004 (cross terms of ``linear``), 2796 (negative weights), 3737 (merged ranks cannot
be loaded again), 3769 (``svd`` fails at Conv1d and Conv3d); mergekit's 231 (a single model loses
numbers to the vote of signs) and 704 (``rescale`` overflows in half precision). Other vocabularies,
tied heads and positions that some have alone, its 47, 286 and 611, are in ``test_hard``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modgraft as mg
from contract.hosts import HOSTS
from modgraft.store.merging.checkpoints import merge_checkpoints

BERT = HOSTS["bert"]


def trained(bare: Any, folder: Path, count: int = 2, **config: Any) -> Any:
    """Make PEFT's model with adapters m0, m1 … that act, and save each."""
    model: Any = peft.get_peft_model(bare, peft.LoraConfig(**config), "m0")
    for number in range(1, count):
        model.add_adapter(f"m{number}", peft.LoraConfig(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


def deltas(model: Any, name: str) -> dict[str, Tensor]:
    inner = model.base_model.model
    return {
        path: layer.get_delta_weight(name).detach().double()
        for path, layer in inner.named_modules()
        if hasattr(layer, "get_delta_weight") and name in layer.lora_A
    }


def changed(host: mg.Host, name: str) -> dict[str, Tensor]:
    """Return what a merge of a composition adds to each weight."""
    before, after = host.merge(None).state_dict(), host.merge(name).state_dict()
    return {k.removesuffix(".weight"): after[k].double() - before[k].double() for k in after}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weights", [[1, -1], [0.7, -0.3], [-1, -2]])
def test_negative_weights_and_no_cross_terms(weights: list[float], tmp_path: Path) -> None:
    """Also where ranks and α differ from site to site, and read by PEFT again."""
    config: dict[str, Any] = {
        "r": 3, "lora_alpha": 5, "target_modules": ["query", "value"],
        "rank_pattern": {"layer.0.attention.self.query": 5}, "alpha_pattern": {"value": 2},
    }  # fmt: skip
    model = trained(BERT.model(), tmp_path, **config)
    host = mg.Host(BERT.model())
    for name in ("m0", "m1"):
        host.load(tmp_path / name, name, active=False)
    new = mg.merge(host, ["m0", "m1"], "sum", "arithmetic", weights=weights)
    found, one, two = changed(host, "sum"), deltas(model, "m0"), deltas(model, "m1")
    assert len(one) == len(new.paths)
    for path, delta in one.items():
        expected = weights[0] * delta + weights[1] * two[path]
        assert float((found[path] - expected).norm() / expected.norm()) < 1e-6
    folder = host.save("sum", tmp_path / "sum", format="peft")
    again = peft.PeftModel.from_pretrained(BERT.model(), folder, adapter_name="sum")
    for path, delta in deltas(again, "sum").items():
        torch.testing.assert_close(delta, found[path], rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_rank_at_convolutions_of_any_axes(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = trained(Net(kind(4, 6, 3)), tmp_path, r=2, target_modules=["conv"])
    torch.manual_seed(0)
    host = mg.Host(Net(kind(4, 6, 3)))
    for name in ("m0", "m1"):
        host.load(tmp_path / name, name, active=False)
    new = mg.merge(host, ["m0", "m1"], "near", "arithmetic", rank=3)
    whole = (deltas(model, "m0")["conv"] + deltas(model, "m1")["conv"]).flatten(1)
    u, sigma, vh = torch.linalg.svd(whole, full_matrices=False)
    nearest = (u[:, :3] * sigma[:3] @ vh[:3]).reshape(host.model.get_parameter("conv.weight").shape)
    torch.testing.assert_close(changed(host, "near")["conv"], nearest, rtol=1e-5, atol=1e-5)
    lost = float(sigma[3:].norm() / sigma.norm())
    assert new.provenance["relative_error"] == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_lengths_and_votes_in_half_precision(
    method: str, kind: torch.dtype, tmp_path: Path
) -> None:
    """Of 160,000 numbers the sum is beyond float16; and one model agrees with itself."""
    torch.manual_seed(0)
    weight = torch.cat([torch.ones(80_000), torch.full((80_000,), 0.5)])[torch.randperm(160_000)]
    for name, tensor in (("base", torch.zeros(160_000)), ("one", weight)):
        (tmp_path / name).mkdir()
        save_file({"w": tensor.to(kind)}, tmp_path / name / "model.safetensors")
    options: dict[str, Any] = {"density": 0.5, "rescale": "l1", "elect": "sum", "normalize": True}
    merge_checkpoints(
        [tmp_path / "one"],
        tmp_path / "out",
        method,
        base=tmp_path / "base",
        weights=[0.75],
        **options,
    )
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert float(found.double().sum()) == pytest.approx(120_000, rel=2e-3)
    kept = found != 0
    assert (
        torch.equal(kept, weight == 1) if method == "ties" else 0.49 < kept.double().mean() < 0.51
    )
    times = 1.5 if method == "ties" else float(weight.sum() / weight[kept].sum())
    torch.testing.assert_close(
        found[kept].double(), times * weight[kept].double(), rtol=4e-3, atol=0
    )
