"""Hosts and layers in which PEFT computes or loads otherwise, and what a folder cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import modgraft as mg
from store.peft_cases import output

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
