"""Every role of every family finds its sites on a real model of the family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modgraft as mg
from core.families import MODELS
from modgraft.core.architectures import FAMILIES, family_of

ONCE = ("embedding", "encoder.output", "decoder.output")


@pytest.mark.parametrize("name", MODELS)
def test_every_role_finds_its_sites(name: str) -> None:
    model = MODELS[name]()
    family = family_of(model)
    assert family is not None
    host = mg.Host(model)
    for role in family.roles:
        if name == "t5 encoder" and role in ("cross_attention", "decoder.output"):
            with pytest.raises(mg.ModgraftError, match="matches no site"):
                host.sites(role)
            continue
        sites = host.sites(role)
        layers = len(sites)
        if role in ONCE:
            assert layers == (2 if role == "embedding" and name in ("t5", "gated t5") else 1)
        else:
            assert layers % 2 == 0  # two layers
        for site in sites:
            assert site.width in (8, 16, 24, 64)
            if role in ("query", "key", "value", "output", "up", "down"):
                host.implant("m", mg.LoRA(rank=2), at=site.label, expect=1)
                host.remove("m")


def test_families_do_not_overlap() -> None:
    kinds = [kind for family in FAMILIES for kind in family.types]
    assert len(kinds) == len(set(kinds))
    assert family_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", ["qwen2", "roberta"])
@torch.no_grad()
def test_a_module_acts_where_the_role_says(name: str) -> None:
    model = MODELS[name]().eval()
    host, batch = mg.Host(model).eval(), {"input_ids": torch.randint(3, 41, (2, 6))}
    bare = host(**batch).logits
    host.implant("m", mg.LoRA(rank=2), at=["query", "value"], expect=4)
    assert torch.equal(host(**batch).logits, bare)
    for place in host["m"].places:
        place.B.normal_()
    changed = host(**batch).logits
    assert not torch.allclose(changed, bare)
    torch.testing.assert_close(host.merge("m")(**batch).logits, changed, rtol=1e-4, atol=1e-5)
