"""GatedFusion beyond the contract: it has as many parameters as the released code."""

from __future__ import annotations

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
