"""Folders of the real PEFT, read and written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import modgraft as mg
from store.peft_cases import CASES, batch_of, model_of, output, trained

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


SAME = {
    "r", "lora_dropout", "use_rslora", "use_dora", "lora_bias", "bias", "peft_type",
    "save_projection", "projection_prng_key", "d_initial", "oft_block_size", "block_share",
    "use_cayley_neumann",
    "num_cayley_neumann_terms", "token_indices", "num_virtual_tokens", "token_dim",
    "fan_in_fan_out",
}  # fmt: skip
"""The options that our save of a folder repeats; others say the same in other words."""


def _options(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def _loaded(model: Any, folder: Path) -> mg.Host:
    host = mg.Host(copy.deepcopy(model)).eval()
    host.load(folder)
    return host


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saved_computes_the_same_here(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], model_of(CASES[name].host)
    batch = batch_of(case.host)
    made = trained(case, model, tmp_path / "theirs")
    host = _loaded(model, tmp_path / "theirs")
    assert [type(host[n].method).__name__ for n in host.implants] == list(case.types)
    expected, bare = output(made, batch), output(model, batch)
    got = output(host, batch)
    if "prompt" in name and case.host in ("gpt2", "llama"):
        expected = expected[:, -got.shape[1] :]
    assert (expected - bare).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_here_computes_the_same_in_peft(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], model_of(CASES[name].host)
    batch = batch_of(case.host)
    trained(case, model, tmp_path / "theirs")
    host = _loaded(model, tmp_path / "theirs")
    host.save(list(host.implants), tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    got = output(host, batch)
    expected = output(theirs, batch)
    if "prompt" in name and case.host in ("gpt2", "llama"):
        expected = expected[:, -got.shape[1] :]
    rounded = name == "prefix-mixtral"  # PEFT keeps what the MLP computed in float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if rounded else 1e-9)
    before, after = (
        load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours")
    )
    if "prompt-t5" in name:
        before["prompt_embeddings"] = before["prompt_embeddings"][:3]  # PEFT reads no more
    for key in [k for k in before if ".modules_to_save." in k or ".original_module." in k]:
        del before[key]  # bias="all" writes a bias of a saved layer three times
    assert before.keys() == after.keys()
    for key in before:
        if "magnitude" in key:  # kept as a difference from the host's
            torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-15)
        else:
            assert torch.equal(before[key], after[key]), key
    first, second = (_options(tmp_path / d) for d in ("theirs", "ours"))
    assert {k: first[k] for k in SAME & first.keys()} == {k: second[k] for k in SAME & first.keys()}
    assert second["task_type"] == first["task_type"] or first["task_type"] is None


@pytest.mark.parametrize("name", ["lora-gpt2", "dora-t5", "ia3-bert", "oft-llama", "vera-gpt2"])
def test_in_single_precision(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], model_of(CASES[name].host, torch.float32)
    batch = batch_of(case.host, torch.float32)
    made = trained(case, model, tmp_path)
    got = output(_loaded(model, tmp_path), batch)
    torch.testing.assert_close(got, output(made, batch), rtol=0, atol=1e-5)


class Grouped(torch.nn.Module):
    """Convolutions, one of them of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = torch.nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.head = torch.nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.grouped(self.stem(x).tanh()).tanh().mean((2, 3))
        return SimpleNamespace(logits=self.head(y))


OURS: dict[str, tuple[str, mg.Computation, Any]] = {
    "parts": ("gpt2", mg.LoRA(rank=3, alpha=2.0), ["query", "value"]),
    "one_part": ("gpt2", mg.LoRA(rank=3, rslora=True), "value"),
    "dora_parts": ("gpt2", mg.LoRA(rank=3, dora=True), ["query", "value"]),
    "bias_parts": ("gpt2", mg.LoRA(rank=3, alpha=5.0, bias=True), ["query", "key"]),
    "other_scales": (
        "gpt2", mg.LoRA(rank=3, alpha_pattern={"*.1.*[0/3]": 7.0}), ["query", "value"]
    ),
    "scaled_parts": ("gpt2", mg.Rescale(), ["key", "value"]),
    "scaled_inputs": ("bert", mg.Rescale(where="input"), "down"),
    "ranks": ("llama", mg.LoRA(rank=2, rank_pattern={"*.1.*q_proj": 3}), ["query", "down"]),
    "grouped": ("grouped", mg.LoRA(rank=3, alpha=4.0), ["stem", "grouped", "head"]),
    "grouped_rs": ("grouped", mg.LoRA(rank=4, alpha=4.0, rslora=True), ["grouped"]),
    "experts": ("mixtral", mg.LoRA(rank=2), ["*.experts.gate_up_proj", "*.experts.down_proj"]),
    "tokens": ("llama", mg.TrainableTokens(ids=(7, 12)), "embedding"),
    "prompt": ("t5", mg.SoftPrompt(length=3), None),
    "vera": ("t5", mg.VeRA(rank=4, seed=5), ["query", "down"]),
    "oft": ("t5", mg.OFT(block=4), ["query", "down"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_what_was_made_here_goes_to_peft_and_back(name: str, tmp_path: Path) -> None:
    kind, method, at = OURS[name]
    if kind == "grouped":
        torch.manual_seed(0)
        model, batch = Grouped().double(), {"x": torch.randn(2, 3, 9, 9).double()}
    else:
        model, batch = model_of(kind), batch_of(kind)
    host = mg.Host(copy.deepcopy(model)).eval()
    host.implant("m", method, at=at)
    with torch.no_grad():
        for parameter in host["m"].parameters():
            drawn = 0.3 * torch.randn(parameter.shape)
            parameter.copy_((parameter + drawn).float())  # PEFT keeps prompts in float32
    host.save("m", tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    got = output(host, batch)
    torch.testing.assert_close(output(theirs, batch), got, rtol=0, atol=1e-9)
    again = output(_loaded(model, tmp_path / "ours"), batch)
    torch.testing.assert_close(again, got, rtol=0, atol=1e-9)
    assert (got - output(model, batch)).abs().max() > 1e-3
