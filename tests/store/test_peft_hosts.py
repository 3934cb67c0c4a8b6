"""Hosts and layers in which PEFT computes or loads otherwise, and what a folder cannot say."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modgraft as mg
from store.peft_cases import CASES, batch_of, lora, model_of, output, trained

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

IDS = torch.arange(4, 16).reshape(2, 6)
SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip


def _made(kind: str, config: str | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    of = config or f"{kind.partition('For')[0]}Config"
    model = getattr(hf, kind)(getattr(hf, of)(**more)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# --- trainable tokens, of which PEFT leaves out the bias -------------------------------------


@pytest.mark.parametrize(
    ("kind", "head"),
    [("BertForMaskedLM", "cls.predictions.decoder"), ("RobertaForMaskedLM", "lm_head.decoder")],
)
@pytest.mark.parametrize("beside", [False, True])
def test_tokens_at_a_decoder_with_a_bias(
    kind: str, head: str, beside: bool, tmp_path: Path
) -> None:
    tokens: dict[str, Any] = {"trainable_token_indices": [5, 6], "target_modules": ["query"]}
    config: Any = (
        peft.LoraConfig(**tokens) if beside else peft.TrainableTokensConfig(token_indices=[5, 6])
    )
    theirs: Any = peft.get_peft_model(_made(kind, **SMALL), config).double().eval()
    theirs.save_pretrained(tmp_path / "theirs")
    host = mg.Host(_made(kind, **SMALL))
    with pytest.raises(mg.ModgraftError, match=rf"tokens at {head}: PEFT leaves out the bias .*"):
        host.load(tmp_path / "theirs")
    assert not host.implants
    model = _made(kind, **SMALL)
    model.get_submodule(head).bias = None  # as the error advises
    as_advised = mg.Host(model)
    as_advised.load(tmp_path / "theirs")
    torch.testing.assert_close(
        output(as_advised, {"input_ids": IDS}), output(theirs, {"input_ids": IDS})
    )
    assert (output(as_advised, {"input_ids": IDS}) - output(host, {"input_ids": IDS})).any()


@pytest.mark.parametrize("bias", [False, True])
def test_tokens_at_a_linear_layer_are_written_where_it_has_no_bias(
    bias: bool, tmp_path: Path
) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=bias))

    host = mg.Host(model())
    host.implant("t", mg.TrainableTokens(ids=[1, 2]), at="1")
    nn.init.normal_(next(host["t"].parameters()))
    if bias:
        with pytest.raises(mg.ModgraftError, match="'t' is at 1: PEFT leaves out the bias"):
            host.save("t", tmp_path / "ours", format="peft")
        assert not (tmp_path / "ours").exists()
        return
    host.save("t", tmp_path / "ours", format="peft")
    theirs: Any = peft.PeftModel.from_pretrained(model(), str(tmp_path / "ours"))
    torch.testing.assert_close(theirs(torch.arange(5)), host(torch.arange(5)))


# --- tasks, whose classes do not call every host ---------------------------------------------

SPEECH: dict[str, Any] = {
    "vocab_size": 41, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
PART: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
HOSTS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]], str | None]] = {
    "whisper": (
        lambda: _made("WhisperForConditionalGeneration", **SPEECH, num_mel_bins=8,
                      max_source_positions=16),
        lambda: {"input_features": _drawn(2, 8, 32), "decoder_input_ids": IDS[:, :4]}, None,
    ),
    "speech": (
        lambda: _made("Speech2TextForConditionalGeneration", **SPEECH, input_feat_per_channel=8,
                      max_source_positions=64, conv_channels=16, num_conv_layers=1,
                      conv_kernel_sizes=[3]),
        lambda: {"input_features": _drawn(2, 32, 8), "decoder_input_ids": IDS[:, :4]}, None,
    ),
    "blip": (
        lambda: _made(
            "BlipForConditionalGeneration", projection_dim=8, image_text_hidden_size=8,
            text_config={**SMALL, "encoder_hidden_size": 16, "projection_dim": 8,
                         "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2},
            vision_config={**PART, "image_size": 16, "patch_size": 8}),
        lambda: {"input_ids": IDS, "pixel_values": _drawn(2, 3, 16, 16)}, None,
    ),
    "llava": (
        lambda: _made(
            "LlavaForConditionalGeneration", text_config=hf.LlamaConfig(**SMALL),
            vision_config=hf.CLIPVisionConfig(**PART, image_size=16, patch_size=8),
            image_token_index=49),
        lambda: {"input_ids": IDS}, "SEQ_2_SEQ_LM",
    ),
    "bart": (
        lambda: _made("BartForConditionalGeneration", **{k: v for k, v in SPEECH.items()
                      if k != "max_target_positions"}, max_position_embeddings=32),
        lambda: {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}, "SEQ_2_SEQ_LM",
    ),
    "wav2vec": (
        lambda: _made(
            "Wav2Vec2ForSequenceClassification", **PART, num_labels=3, conv_dim=(8, 8),
            conv_kernel=(4, 3), conv_stride=(3, 2), num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8,
            mask_time_prob=0.0),
        lambda: {"input_values": _drawn(2, 60)}, None,
    ),
}  # fmt: skip


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("name", HOSTS)
def test_a_folder_without_a_task_works_in_peft_after_a_round_trip(
    name: str, tmp_path: Path
) -> None:
    make, made_batch, task = HOSTS[name]
    model, batch = make(), made_batch()
    whole = ["classifier"] if name == "wav2vec" else None
    targets = [r".*text_decoder.*query", r".*(q_proj)"][name != "blip"]
    theirs = trained(lora("", targets, modules_to_save=whole), model, tmp_path / "theirs")
    host = mg.Host(copy.deepcopy(model)).eval()
    host.load(tmp_path / "theirs", name="m")
    host.save("m", tmp_path / "ours", format="peft")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["task_type"] == task
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"))
    expected = output(theirs, batch)
    torch.testing.assert_close(output(host, batch), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(output(again.eval(), batch), expected, rtol=0, atol=1e-9)


def test_a_host_that_answers_in_a_text_keeps_its_token_types(tmp_path: Path) -> None:
    model = _made("BertForQuestionAnswering", **SMALL)
    batch = {"input_ids": IDS, "token_type_ids": (IDS % 6 > 2).long()}
    with torch.no_grad():
        theirs = trained(lora("", ["query"], modules_to_save=["qa_outputs"]), model, tmp_path / "a")
        host = mg.Host(copy.deepcopy(model)).eval()
        host.load(tmp_path / "a")
        host.save("a", tmp_path / "ours", format="peft")
        again: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours")).eval()
        expected = theirs(**batch).start_logits
        torch.testing.assert_close(host(**batch).start_logits, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(again(**batch).start_logits, expected, rtol=0, atol=1e-9)


class OwnForCausalLM(nn.Module):
    """A host that is called as one of transformers, and has no method to generate with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Any:
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        return type("Out", (), {"logits": self.head(x)})


def test_a_class_of_ones_own_by_a_name_of_transformers(tmp_path: Path) -> None:
    host = mg.Host(OwnForCausalLM())
    host.implant("m", mg.LoRA(rank=2), at="head")
    nn.init.normal_(next(p for n, p in host["m"].named_parameters() if n.endswith("B")))
    host.save("m", tmp_path, format="peft")
    theirs: Any = peft.PeftModel.from_pretrained(OwnForCausalLM(), str(tmp_path))
    torch.testing.assert_close(theirs(input_ids=IDS).logits, host(input_ids=IDS).logits)


# --- layers at which PEFT loads nothing ------------------------------------------------------


@pytest.mark.parametrize("layer", ["out_proj", "conv1d", "in_proj"])
def test_lora_in_a_mamba(layer: str, tmp_path: Path) -> None:
    def model() -> Any:
        return _made("MambaForCausalLM", vocab_size=50, hidden_size=16, num_hidden_layers=1,
                     state_size=4, time_step_rank=4, pad_token_id=0)  # fmt: skip

    host = mg.Host(model()).eval()
    host.implant("m", mg.LoRA(rank=2), at=f"*.{layer}")
    nn.init.normal_(next(p for n, p in host["m"].named_parameters() if n.endswith("B")))
    if layer != "in_proj":
        with pytest.raises(mg.ModgraftError, match=rf"loads no LoRA at .*{layer} of a mamba"):
            host.save("m", tmp_path / "ours", format="peft")
        assert not (tmp_path / "ours").exists()
        return
    host.save("m", tmp_path / "ours", format="peft")
    theirs: Any = peft.PeftModel.from_pretrained(model(), str(tmp_path / "ours")).eval()
    batch = {"input_ids": IDS}
    torch.testing.assert_close(output(theirs, batch), output(host, batch))


# --- models that torch.compile has wrapped ---------------------------------------------------


@pytest.fixture
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):  # the names alone matter
        yield


def _whole(model: Any) -> Any:
    return torch.compile(model)


def _layers(model: Any) -> Any:
    stack = model.bert.encoder.layer
    for i, layer in enumerate(stack):
        stack[i] = torch.compile(layer)
    return model


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("wrap", "more"),
    [
        (_whole, {}),
        (_layers, {"rank_pattern": {"layer.1._orig_mod.attention.self.query": 2}}),
        (_layers, {"target_modules": ["bert.encoder.layer.0._orig_mod.attention.self.query"],
                   "bias": "lora_only"}),
    ],
)  # fmt: skip
def test_what_peft_saved_of_a_compiled_model(wrap: Any, more: Any, tmp_path: Path) -> None:
    model, batch = model_of("bert"), batch_of("bert")
    case = lora("bert", ["query", "value"], **{"modules_to_save": ["classifier"], **more})
    made = trained(case, wrap(copy.deepcopy(model)), tmp_path / "theirs")
    assert any("_orig_mod" in key for key in load_file(tmp_path / "theirs" / TENSORS))
    for here in (model, wrap(copy.deepcopy(model))):
        host = mg.Host(copy.deepcopy(here)).eval()
        host.load(tmp_path / "theirs")
        torch.testing.assert_close(output(host, batch), output(made, batch), rtol=0, atol=1e-9)
    host.save("theirs", tmp_path / "ours", format="peft")
    again: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours")).eval()
    torch.testing.assert_close(output(again, batch), output(made, batch), rtol=0, atol=1e-9)


TENSORS = "adapter_model.safetensors"


def test_a_tensor_that_stands_there_compiled_and_plain(tmp_path: Path) -> None:
    model = model_of("bert")
    trained(CASES["lora-bert"], model, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    key = min(tensors)
    tensors[key.replace("model.bert", "model._orig_mod.bert")] = tensors[key] + 1
    save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
    with pytest.raises(mg.ModgraftError, match="there with and without torch"):
        mg.Host(model).load(tmp_path)


# --- padding, of which a folder says nothing -------------------------------------------------


@pytest.mark.parametrize("name", ["prompt-llama", "prompt-gpt2", "prefix-llama", "prefix-gpt2"])
def test_padding_on_the_right_gives_pefts_numbers(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], model_of(CASES[name].host)
    made = trained(case, model, tmp_path)
    host = mg.Host(copy.deepcopy(model)).eval()
    host.load(tmp_path)
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    expected = output(made, {"input_ids": IDS, "attention_mask": mask})[:, -6:]
    got = output(host, {"input_ids": IDS, "attention_mask": mask})
    torch.testing.assert_close(got[mask > 0], expected[mask > 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["prompt-llama", "prefix-llama"])
def test_padding_on_the_left_changes_nothing_here(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], model_of(CASES[name].host)
    made = trained(case, model, tmp_path)
    host = mg.Host(copy.deepcopy(model)).eval()
    host.load(tmp_path)
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    alone = output(host, {"input_ids": IDS[1:, 2:]})
    padded = output(host, {"input_ids": IDS, "attention_mask": mask})[1:, 2:]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)  # angles are float32
    theirs = output(made, {"input_ids": IDS, "attention_mask": mask})[1:, -4:]
    assert (theirs - alone).abs().max() > 0.1
