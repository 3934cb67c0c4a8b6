"""GatedFusion beyond the contract: it has as many parameters as the released code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import modgraft as mg
from modgraft.core.errors import SideError


def test_released_fusion_adds_what_the_released_code_added() -> None:
    """T5-base (width 768) with features 256 wide: 3,740,160 parameters."""
    config = T5Config(vocab_size=11, d_model=768, num_layers=1, num_heads=12, d_ff=8)
    with torch.device("meta"):
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


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}]
)
@torch.no_grad()
def test_only_beams_and_sequences_of_one_text_share_its_picture(how: dict[str, Any]) -> None:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    host = mg.Host(T5ForConditionalGeneration(config)).eval()
    host.implant("see", mg.GatedFusion(source="image", dim=6), at="encoder.output")
    for parameter in host.implants.parameters():
        parameter.normal_(0, 1)
    ids, picture = torch.randint(3, 40, (4, 5)), torch.randn(4, 2, 6)
    how = {**how, "max_new_tokens": 6, "min_new_tokens": 6}
    for count in (1, 2, 3, 8, 12):
        side = {"image": mg.Side(picture[:1].expand(count, 2, 6))}
        for given in ({"input_ids": ids}, {"inputs_embeds": host.model.shared(ids)}):
            with pytest.raises(SideError, match=f"has {count} examples for a batch of 4"):
                host.generate(**given, side=side, **how)
        with pytest.raises(SideError, match=f"has {count} examples for a batch of 4"):
            host.generate(ids, side=side, **how)
        host.generate(ids, side=side, modules=None, **how)  # nobody reads it
    if how.get("do_sample"):
        return
    together = host.generate(ids, side={"image": mg.Side(picture)}, **how)
    for i in range(4):
        alone = host.generate(ids[i : i + 1], side={"image": mg.Side(picture[i : i + 1])}, **how)
        assert torch.equal(together[i : i + 1], alone)
