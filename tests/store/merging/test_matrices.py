"""Stacks of matrices and kernels of convolutions in checkpoints, and what neither is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)
from typer.testing import CliRunner

from modgraft.cli.app import app
from modgraft.store.merging.checkpoints import merge_checkpoints
from modgraft.store.merging.streamed import RECORD
from store.merging.test_methods import merged

EXPERTS = GptOssConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
    num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
)  # fmt: skip
IMAGES = ViTConfig(
    image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=24,
)  # fmt: skip
SPEECH = WhisperConfig(
    vocab_size=40, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
    encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
    max_source_positions=8, max_target_positions=8,
)  # fmt: skip


def three(folder: Path, kind: Any, config: Any) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Save three models of other weights; return their folders, and their tensors in float64."""
    paths = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model.save_pretrained(folder / f"m{seed}")
        paths.append(folder / f"m{seed}")
    return paths, [tensors(path) for path in paths]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: t.double() for k, t in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("method", ["isotropic", "tsv", "knots"])
@pytest.mark.parametrize(
    ("kind", "config", "stacks", "kernels", "averaged"),
    [
        (GptOssForCausalLM, EXPERTS, ["experts.gate_up_proj", "experts.down_proj"], [], []),
        (ViTModel, IMAGES, [], ["projection.weight"], ["cls_token", "position_embeddings"]),
        (WhisperModel, SPEECH, [], ["conv1.weight", "conv2.weight"], []),
    ],
)
def test_methods_of_matrices_take_each_matrix(
    kind: Any,
    config: Any,
    stacks: list[str],
    kernels: list[str],
    averaged: list[str],
    method: str,
    tmp_path: Path,
) -> None:
    """That of each expert, a kernel as [out, in · k…]; what is neither is averaged and named."""
    (base, *models), (origin, *several) = three(tmp_path, kind, config)
    out = merge_checkpoints(models, tmp_path / "out", method, base=base)
    found, said = tensors(out), json.loads((out / RECORD).read_text())["averaged"]
    assert len(said) == len(averaged)
    seen = []
    for name, tensor in found.items():
        deltas = [each[name] - origin[name] for each in several]
        which = [end for end in (*stacks, *kernels, *averaged) if name.endswith(end)]
        seen += which
        if name in said:
            change = sum(deltas) / 2
            assert which[0] in averaged
        elif which and which[0] in stacks:
            one_by_one = [merged(method, [d[i] for d in deltas]) for i in range(len(tensor))]
            change = torch.stack(one_by_one)
        else:
            flat = [d.flatten(1) if d.dim() > 1 else d for d in deltas]
            change = merged(method, flat).reshape(tensor.shape)
        expected = origin[name] + change
        assert float((tensor - expected).norm() / expected.norm()) < 1e-5, name
    assert sorted(seen) == sorted([*stacks, *kernels, *averaged])


def test_without_a_configuration_three_axes_are_averaged_and_named(tmp_path: Path) -> None:
    (base, *models), (_, *several) = three(tmp_path, WhisperModel, SPEECH)
    for path in (base, *models):
        (path / "config.json").unlink()
    out = merge_checkpoints(models, tmp_path / "out", "tsv", base=base)
    said = json.loads((out / RECORD).read_text())["averaged"]
    assert said == ["encoder.conv1.weight", "encoder.conv2.weight"]
    args = ["merge", *map(str, models), "--base", str(base), "--method", "tsv", "--out"]
    shown = CliRunner().invoke(app, [*args, str(tmp_path / "shown")]).stdout
    assert f"nothing says that they are matrices: {', '.join(said)}" in shown
    expected = (several[0][said[0]] + several[1][said[0]]) / 2
    torch.testing.assert_close(tensors(out)[said[0]], expected, rtol=1e-5, atol=1e-5)
    for path in (base, *models):
        (path / "config.json").write_text('{"architectures": ["Mine"], "model_type": "mine"}')
    again = merge_checkpoints(models, tmp_path / "again", "tsv", base=base)
    assert json.loads((again / RECORD).read_text())["averaged"] == said


@pytest.mark.parametrize("method", ["average", "ties", "dare", "isotropic", "tsv", "knots"])
def test_shards_change_nothing(method: str, tmp_path: Path) -> None:
    """The same models, each in one file and in several, of other sizes in each."""
    options: dict[str, Any] = {"inner": "dare"} if method == "knots" else {}
    (paths, _), cut = three(tmp_path, GptOssForCausalLM, EXPERTS), []
    for size, path in zip(("6KB", "9KB", "4KB"), paths, strict=True):
        cut.append(tmp_path / f"cut_{path.name}")
        GptOssForCausalLM.from_pretrained(path).save_pretrained(cut[-1], max_shard_size=size)
        assert len(list(cut[-1].glob("*.safetensors"))) >= 3
    found = []
    for name, (base, *models) in (("one", paths), ("many", cut)):
        out = merge_checkpoints(models, tmp_path / name, method, base=base, **options)
        files = sorted(out.glob("*.safetensors"))
        found.append({k: t for file in files for k, t in load_file(file).items()})
    one, many = found
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, many[name]), name
