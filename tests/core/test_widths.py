"""How wide a layer's output is: what it says is so, or it is refused when a module is implanted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from transformers import SwinConfig, SwinModel

import modgraft as mg
from core.families import CASES
from modgraft.core.errors import SiteError
from modgraft.core.layers import feature_axis
from modgraft.core.sites import Site

SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip


@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
@torch.no_grad()
def test_stages_of_swin_have_widths_of_their_own(ratio: float) -> None:
    host = mg.Host(SwinModel(SwinConfig(**SWIN, mlp_ratio=ratio))).eval()
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert [site.width for site in host.sites("feedforward")] == [16, 32]
    assert [site.width for site in host.sites("block")] == [16, 32]
    host.implant("eye", mg.GatedFusion(source="image", dim=6), at="*.mlp")
    host(**images, side={"image": mg.Side(torch.randn(2, 4, 6))})
    host.use(None)
    for name in "ab":
        host.implant(name, mg.Adapter(width=3), at="*.mlp", active=False)
    host.implant("x", mg.Mixture(["a", "b"], router=mg.TopK(1, level="token")))
    bare = host(**images, modules=None)[0]
    assert torch.equal(host(**images, modules="x")[0], bare)  # born as the identity


KNOWN = (
    "swin", "wav2vec2", "llava", "blip-2", "qwen2_vl", "mobilebert", "albert", "mixtral", "phi3",
    "qwen2_moe", "detr", "gpt2", "deberta-v2",
)  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_whatever_a_layer_of_a_host_says_of_its_width_is_so(name: str) -> None:
    case, wrong = CASES[name], []
    host, batch = mg.Host(case.model()).eval(), case.batch()

    def look(site: Site, said: int, out: Any) -> None:
        y = out if isinstance(out, torch.Tensor) else next(iter(_values(out)), None)
        axis = feature_axis(site.module) if not isinstance(site.module, nn.BatchNorm2d) else 1
        if isinstance(y, torch.Tensor) and y.is_floating_point() and y.shape[axis] != said:
            wrong.append((site.label, said, list(y.shape)))

    said = 0
    for site in host.sites(lambda path, module: bool(path)):
        with suppress(SiteError):
            width = site.width
            said += 1
            site.module.register_forward_hook(lambda _, __, o, s=site, w=width: look(s, w, o))
    host(**batch)
    assert not wrong
    assert said > 20


def _values(out: Any) -> Any:
    return out.values() if isinstance(out, dict) else out


def test_what_cannot_be_told_is_refused_when_it_is_implanted() -> None:
    host = mg.Host(CASES["wav2vec2"].model())
    with pytest.raises(mg.ModgraftError, match=r"cannot tell how wide the output of .*extractor"):
        host.implant("a", mg.Adapter(width=3), at="wav2vec2.feature_extractor")
    assert not list(host.implants)
    host = mg.Host(nn.Sequential(nn.Linear(6, 6), nn.GELU()))  # nothing says what it reads
    with pytest.raises(mg.ModgraftError, match=r"cannot tell how wide the output of 1 \(GELU\)"):
        host.implant("a", mg.Adapter(width=3), at="1")
