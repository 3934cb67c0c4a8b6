"""What others have reported of PEFT and safetensors, tried here."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from store.peft_cases import CASES, batch_of, lora, model_of, output, trained

pytestmark = pytest.mark.filterwarnings("ignore")


class Called(nn.Module):
    """Layers with names that stand in PEFT's keys too."""

    NAMES = ("pair_weighted", "weight", "lora_A", "default")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Any:
        for name in self.NAMES:
            x = self.get_submodule(name)(x).tanh()
        return SimpleNamespace(logits=x)


def test_names_that_stand_in_keys(tmp_path: Path) -> None:
    """Keys were made by replacing "weight" wherever it stood (peft 2772)."""
    torch.manual_seed(0)
    model, batch = Called().double(), {"x": torch.randn(2, 4).double()}
    made = trained(lora("", list(Called.NAMES)), model, tmp_path / "theirs")
    host = mg.Host(copy.deepcopy(model)).eval()
    host.load(tmp_path / "theirs")
    torch.testing.assert_close(output(host, batch), output(made, batch), rtol=0, atol=1e-9)
    host.save("theirs", tmp_path / "ours", format="peft")
    again = mg.Host(copy.deepcopy(model)).eval()
    again.load(tmp_path / "ours")
    assert torch.equal(output(again, batch), output(host, batch))


def test_an_adapter_that_is_called_as_its_kind(tmp_path: Path) -> None:
    """Adapters called "lora" came back untrained (peft 2699)."""
    model, batch = model_of("bert"), batch_of("bert")
    made: Any = peft.get_peft_model(
        copy.deepcopy(model), CASES["lora-bert"].config(), adapter_name="lora"
    )
    with torch.no_grad():
        for parameter in made.eval().double().parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    made.save_pretrained(tmp_path)
    host = mg.Host(copy.deepcopy(model)).eval()
    host.load(tmp_path / "lora")
    torch.testing.assert_close(output(host, batch), output(made, batch), rtol=0, atol=1e-9)


def test_a_vocabulary_that_has_grown(tmp_path: Path) -> None:
    """Tables that were resized and saved met a host that was not (peft 1457, 1554)."""
    model, batch = model_of("llama"), batch_of("llama")
    grown: Any = copy.deepcopy(model)
    grown.resize_token_embeddings(45)
    grown.double()
    made = trained(lora("llama", ["q_proj"]), grown, tmp_path / "without")
    made.save_pretrained(tmp_path / "with", save_embedding_layers=True)
    with pytest.raises(mg.ModgraftError, match=r"is \[45, 16\] in the folder and is \[41, 16\]"):
        mg.Host(copy.deepcopy(model)).load(tmp_path / "with")
    for folder in ("with", "without"):
        host = mg.Host(copy.deepcopy(grown)).eval()
        host.load(tmp_path / folder)
        torch.testing.assert_close(output(host, batch), output(made, batch), rtol=0, atol=1e-9)


@pytest.mark.parametrize("how", ["turned", "one memory"])
@pytest.mark.parametrize("format", ["modgraft", "peft"])
def test_tensors_that_lie_otherwise(how: str, format: str, tmp_path: Path) -> None:
    """Strided tensors, and views of one memory, were not saved (safetensors 469, 232)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to(
        memory_format=torch.channels_last  # type: ignore[call-overload]
    )
    host = mg.Host(copy.deepcopy(model))
    host.implant("a", mg.LoRA(rank=2), at=nn.Conv2d)
    memory = torch.randn(500)
    for i, parameter in enumerate(host["a"].parameters()):
        shape = parameter.shape
        parameter.data = (
            torch.randn(*reversed(shape)).T
            if how == "turned"
            else memory[2 * i : 2 * i + shape.numel()].view(shape)
        )
    host.save("a", tmp_path / "a", format=format)
    other = mg.Host(copy.deepcopy(model))
    other.load(tmp_path / "a")
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(other(x), host(x))
    assert not torch.equal(host(x), host(x, modules=None))
