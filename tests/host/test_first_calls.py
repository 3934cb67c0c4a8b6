"""What a newcomer writes first: wrong hosts, batches and selections have errors that say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LevitConfig,
    LevitForImageClassification,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
)

import modgraft as mg

SIZE: dict[str, Any] = {
    "vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip


@pytest.mark.parametrize("model", [None, "bert-base-uncased", nn.Linear], ids=repr)
def test_a_host_is_a_model(model: Any) -> None:
    with pytest.raises(mg.ModgraftError, match=r"a host is a model, an nn\.Module"):
        mg.Host(model)


@pytest.mark.parametrize("at", [[], nn.Linear(2, 2)], ids=["nothing", "a layer"])
def test_a_selection_selects(at: Any) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(mg.ModgraftError, match=r"at=\[\] selects nothing|a selection is a role"):
        host.implant("a", mg.LoRA(rank=1), at=at)
    assert not host.implants


def test_what_the_trainer_leaves_out_is_said() -> None:
    host = mg.Host(BertForMaskedLM(BertConfig(**SIZE)))
    with pytest.raises(mg.ModgraftError, match="remove_unused_columns=False"):
        host(labels=torch.zeros(2, 3, dtype=torch.long))


def test_an_error_of_our_own_keeps_its_words() -> None:
    host = mg.Host(BertForMaskedLM(BertConfig(**SIZE)))
    host.implant("eye", mg.GatedFusion(source="image", dim=4), at="block")
    with pytest.raises(mg.ModgraftError, match="needs the side input 'image'"):
        host(labels=torch.zeros(2, 3, dtype=torch.long))


def test_a_head_is_as_wide_as_its_vocabulary() -> None:
    host = mg.Host(BertForMaskedLM(BertConfig(**SIZE))).eval()
    host.implant("a", mg.Adapter(width=2), at="cls.predictions")
    ids = torch.randint(3, 41, (2, 5))
    torch.testing.assert_close(host(ids).logits, host(ids, modules=None).logits)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_layer_is_run_as_it_is() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 2))
    host = mg.Host(model)
    host.implant("a", mg.LoRA(rank=1), at="1")
    assert host.train()(torch.randn(3, 4)).shape == (3, 2)


DECODERS = {
    "bart": (BartForConditionalGeneration, BartConfig, {}),
    "nllb-moe": (NllbMoeForConditionalGeneration, NllbMoeConfig, {"num_experts": 2}),
}


@pytest.mark.parametrize(("kind", "config", "more"), DECODERS.values(), ids=DECODERS)
def test_no_convolution_over_the_tokens_of_a_decoder(kind: Any, config: Any, more: Any) -> None:
    model = kind(
        config(
            vocab_size=41, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
            decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
            **more,
        )
    )  # fmt: skip
    host = mg.Host(model)
    with pytest.raises(mg.ModgraftError, match="may not see later"):
        host.implant("a", mg.ConvAdapter(kernel=3), at="*.decoder.layers.0.self_attn")
    host.implant("a", mg.ConvAdapter(kernel=3), at="*.encoder.layers.0.self_attn")


@torch.no_grad()
def test_what_a_layer_keeps_of_its_weights_follows_them() -> None:
    config = LevitConfig(
        image_size=32, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1], key_dim=[8, 8, 8], patch_size=16,
    )  # fmt: skip
    model = LevitForImageClassification(config)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    host = mg.Host(model).eval()
    x = torch.randn(2, 3, 32, 32)
    bare = host(x).logits  # in evaluation its attention keeps the biases that it has read
    host.implant("a", mg.LoRA(rank=1), at="*.stages.0.layers.2.attention_biases", active=False)
    for parameter in host["a"].parameters():
        parameter.normal_()
    changed = host(x, modules="a").logits
    assert not torch.allclose(changed, bare)
    torch.testing.assert_close(host.merge("a")(x).logits, changed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(host(x).logits, bare)


def _compiled(how: str, model: nn.Module) -> Any:
    return torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.randn(2, 6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_what_torchscript_has_compiled_has_no_sites(how: str, tmp_path: Path) -> None:
    inner = _compiled(how, nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    host = mg.Host(nn.Sequential(inner, nn.Linear(6, 4)).double()).eval()
    assert "1 " in str(host)
    assert "0.0" not in str(host)
    for at in (
        "0",
        "0.0",
        "0.*",
        "0.0.weight",
        "0.0[residual]",
        "query",
        lambda path, _: "0" in path,
    ):
        with pytest.raises(
            mg.ModgraftError, match=r"; 0: compiled by TorchScript .* before torch\.jit"
        ):
            host.implant("a", mg.LoRA(rank=2), at=at)
    with pytest.raises(mg.ModgraftError, match=r"no Conv2d .*; 0: compiled by TorchScript"):
        host.sites(nn.Conv2d)
    host.implant("a", mg.LoRA(rank=2), at=nn.Linear)
    assert list(host["a"].paths) == ["1"]
    with torch.no_grad():
        for p in host["a"].parameters():
            p.normal_(0, 0.5)
    x = torch.randn(3, 6, dtype=torch.float64)
    (place,), (layer,) = host["a"].places, [host.model.get_submodule("1")]
    theta = layer._parameters
    wanted = nn.functional.linear(inner(x), theta["weight"] + place.B @ place.A, theta["bias"])
    torch.testing.assert_close(host(x), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(host.merge("a")(x), host(x), rtol=1e-5, atol=1e-6)
    host.save("a", tmp_path / "a")
    host.remove("a")
    host.load(tmp_path / "a")
    torch.testing.assert_close(host(x), wanted, rtol=1e-5, atol=1e-6)
    assert not host.probe({"input": x}).faults


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_model_that_torchscript_has_compiled_is_no_host(how: str) -> None:
    with pytest.raises(mg.ModgraftError, match=r"compiled by TorchScript .* before torch\.jit"):
        mg.Host(_compiled(how, nn.Sequential(nn.Linear(6, 6))))


def test_a_layer_without_a_shape_has_to_run_first() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    with pytest.raises(mg.ModgraftError, match=r"0\.weight has no shape .* run the model once"):
        mg.Host(model)
    model(torch.randn(3, 6))
    host = mg.Host(model).eval()
    host.implant("a", mg.LoRA(rank=2), at="0")
    assert host(torch.randn(3, 6)).shape == (3, 4)
