"""Files of other tools, of hosts that torch has wrapped: they are the plain model's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import modgraft as mg
from modgraft.core.plain import full_name, plain, plain_name
from store.peft_cases import model_of

pytestmark = pytest.mark.filterwarnings("ignore")


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def _layers(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], nn.Module]:
    def each(model: Any) -> nn.Module:
        layers = model.bert.encoder.layer
        for i, layer in enumerate(layers):
            layers[i] = wrap(layer)
        return model

    return each


WRAPS: dict[str, Callable[[Any], nn.Module]] = {
    "compiled": _compiled,
    "parallel": nn.DataParallel,
    "both": lambda model: _compiled(nn.DataParallel(model)),
    "compiled layers": _layers(_compiled),
    "checkpointed layers": _layers(checkpoint_wrapper),
}
BATCH = {"input_ids": torch.tensor([[2, 5, 7, 3], [2, 9, 4, 3]])}


def _drawn(host: mg.Host) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.normal_(std=0.3)


@pytest.mark.parametrize("wrap", WRAPS)
def test_peft_reads_and_writes_what_a_wrapped_host_does(wrap: str, tmp_path: Path) -> None:
    base = model_of("bert").eval()
    host = mg.Host(WRAPS[wrap](copy.deepcopy(base))).eval()
    host.implant("a", mg.LoRA(rank=2), at=["query", "*.output.dense"])
    head = next(n for n, _ in host.model.named_parameters() if n.endswith("classifier.weight"))
    _drawn(host)
    with torch.no_grad():
        host.model.get_parameter(head).add_(0.5)
    host["a"].beside = frozenset({head, head.replace("weight", "bias")})
    host.save("a", tmp_path / "a", format="peft")
    keys = list(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert not any(".module." in key or "wrapped" in key or "_orig" in key for key in keys)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
        ours, bare = host(**BATCH).logits, base(**BATCH).logits
        torch.testing.assert_close(theirs(**BATCH).logits, ours)
        assert not torch.allclose(ours, bare)
        for model in (WRAPS[wrap](copy.deepcopy(base)), copy.deepcopy(base)):
            other = mg.Host(model).eval()
            other.load(tmp_path / "a")
            torch.testing.assert_close(other(**BATCH).logits, ours)
            other.remove("a")
            torch.testing.assert_close(other(**BATCH).logits, bare)


@pytest.mark.parametrize("wrap", WRAPS)
def test_adapterhub_reads_and_writes_what_a_wrapped_host_does(wrap: str, tmp_path: Path) -> None:
    base = model_of("bert").eval()
    host, whole = mg.Host(WRAPS[wrap](copy.deepcopy(base))).eval(), mg.Host(base).eval()
    for one in (host, whole):
        one.implant("a", mg.LoRA(rank=2), at=["query", "value"])
        _drawn(one)
        one.save("a", tmp_path / f"{one is host}" / "a", format="adapterhub")
    kept, same = (load_file(tmp_path / f"{k}" / "a" / "adapter.safetensors") for k in (True, False))
    assert kept.keys() == same.keys()
    assert all(torch.equal(kept[k], same[k]) for k in kept)
    host.remove("a")
    host.load(tmp_path / "False" / "a")
    with torch.no_grad():
        torch.testing.assert_close(host(**BATCH).logits, whole(**BATCH).logits)


def test_names_without_wrappers_and_with_them() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential())
    model = nn.DataParallel(nn.Sequential(_compiled(inner), nn.Linear(2, 2)))
    bare = plain(model)
    assert [n for n, _ in bare.named_parameters()] == [
        "0.0.weight", "0.0.bias", "1.weight", "1.bias",
    ]  # fmt: skip
    assert bare.get_parameter("0.0.weight") is inner[0].weight
    assert plain(bare) is bare
    assert bare is not model.module
    for name, parameter in model.named_parameters():
        own = plain_name(model, name)
        assert bare.get_parameter(own) is parameter
        assert full_name(model, own) == name
    assert full_name(model, "0") == "module.0._orig_mod"
    assert full_name(model, "") == ""
    assert plain_name(model, "module.0._orig_mod") == "0"


def test_a_prompt_before_a_part_that_is_compiled_is_refused() -> None:
    host = mg.Host(_compiled(model_of("gpt2")))
    with pytest.raises(
        mg.ModgraftError, match=r"SoftPrompt at _orig_mod: .* torch.compile\(host\)"
    ):
        host.implant("p", mg.SoftPrompt(length=2))
    assert not host.implants


@pytest.mark.parametrize("there", ["plain", "compiled", "compiled layers"])
@pytest.mark.parametrize("here", ["plain", *WRAPS])
def test_a_head_that_trained_in_one_is_loaded_into_another(
    there: str, here: str, tmp_path: Path
) -> None:
    wraps = {**WRAPS, "plain": lambda model: model}
    base = model_of("bert").eval()
    host = mg.Host(wraps[there](copy.deepcopy(base))).eval()
    host.implant("a", mg.LoRA(rank=2), at=["query"])
    _drawn(host)
    head = next(n for n, _ in host.model.named_parameters() if n.endswith("classifier.weight"))
    part = host.model.get_submodule(head.removesuffix(".weight"))
    host._implants["a"].beside = frozenset({head, head.replace("weight", "bias")})
    with torch.no_grad():
        part.weight.add_(0.1)
    host.save("a", tmp_path / "a")
    other = mg.Host(wraps[here](copy.deepcopy(base))).eval()
    other.load(tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(other(**BATCH).logits, host(**BATCH).logits)
    other.remove("a")
    with torch.no_grad():
        torch.testing.assert_close(other(**BATCH).logits, base(**BATCH).logits)
