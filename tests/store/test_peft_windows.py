"""A prefix of PEFT in hosts that attend within a window, out of which it falls in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

import modgraft as mg
from modgraft.core.errors import CheckpointError
from store.peft_cases import Case, trained

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
PREFIX = Case("", lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))  # type: ignore[call-arg]


def _model(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    of = "Llama4Text" if kind == "Llama4" else kind
    config = getattr(hf, f"{of}Config")(**SMALL, **more)
    return getattr(hf, f"{kind}ForCausalLM")(config).double().eval()


WINDOWED: list[tuple[str, dict[str, Any], str]] = [
    ("Mistral", {"sliding_window": 8}, "sliding_window=8"),
    ("Phi3", {"sliding_window": 8}, "sliding_window=8"),
    ("Gemma2", {"sliding_window": 8, "head_dim": 8}, "sliding_window=8"),
    (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "layers.1.*sliding_window=8",
    ),
    (
        "Llama4",
        {"attention_chunk_size": 8, "head_dim": 8, "intermediate_size_mlp": 32,
         "num_local_experts": 2},
        "attention_chunk_size=8",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "more", "words"), WINDOWED)
def test_a_window_is_named_in_both_directions(
    kind: str, more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = _model(kind, **more)
    if kind != "Llama4":  # PEFT cannot make one there
        trained(PREFIX, model, tmp_path / "theirs")
        with pytest.raises(CheckpointError, match=f"{words}.*out of which PEFT's prefix falls"):
            mg.Host(model).load(tmp_path / "theirs")
    host = mg.Host(model).eval()
    assert not list(host.implants)
    host.implant("p", mg.Prefix(length=2, counted=True))
    with pytest.raises(mg.ModgraftError, match=f"{words}.*save it without format='peft'"):
        host.save("p", tmp_path / "ours", format="peft")
    assert not (tmp_path / "ours").exists()


WHOLE: list[tuple[str, dict[str, Any]]] = [
    ("Mistral", {"sliding_window": None}),
    ("Qwen2", {"use_sliding_window": False, "sliding_window": 8}),
    ("Phi3", {"sliding_window": 64, "max_position_embeddings": 64}),
]


@pytest.mark.parametrize(("kind", "more"), WHOLE)
def test_hosts_without_a_window_read_what_peft_computes(
    kind: str, more: dict[str, Any], tmp_path: Path
) -> None:
    model = _model(kind, **more)
    theirs = trained(PREFIX, model, tmp_path / "pfx")
    host = mg.Host(model).eval()
    host.load(tmp_path / "pfx")
    x = torch.randint(3, 50, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(host(x).logits, theirs(x).logits)
    host.save("pfx", tmp_path / "ours", format="peft")


def test_every_token_sees_a_prefix_of_ours_in_a_window() -> None:
    model = _model("Mistral", sliding_window=8, attn_implementation="eager")
    host = mg.Host(model).eval()
    host.implant("p", mg.Prefix(length=2))
    with torch.no_grad():
        seen = host(torch.randint(3, 50, (1, 20)), output_attentions=True).attentions[0]
    assert (seen[..., :2] > 0).all()  # [1, h, 20, 2 + 20]
    assert (seen[0, 0, 19, 2:14] == 0).all()
