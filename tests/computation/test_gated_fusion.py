"""GatedFusion beyond the contract: it has as many parameters as the released code."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config

import modgraft as mg


def test_released_fusion_adds_what_the_released_code_added() -> None:
    """T5-base (width 768) with features 256 wide: 3,740,160 parameters."""
    config = T5Config(vocab_size=11, d_model=768, num_layers=1, num_heads=12, d_ff=8)
    with torch.device("meta"):
        from transformers import T5ForConditionalGeneration

        model = T5ForConditionalGeneration(config)
        host = mg.Host(model)
        host.implant("fusion", mg.GatedFusion(dim=256, form="released"), at="encoder.output")
    assert host["fusion"].size == 3_740_160


def test_what_a_fusion_cannot_act_on() -> None:
    host = mg.Host(torch.nn.Linear(5, 16))
    host.implant("m", mg.GatedFusion(dim=6), "")
    with pytest.raises(mg.ModgraftError, match=r"acts on tokens \[B, n, d\], and this site puts"):
        host(torch.randn(3, 5), side={"image": mg.Side(torch.randn(3, 2, 6))})
    host.implant("a", mg.Adapter(width=2), "", active=False)
    with pytest.raises(mg.ModgraftError, match="call the host with a batch"):
        host(torch.randn(5), modules="a")
