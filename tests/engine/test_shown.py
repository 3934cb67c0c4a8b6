"""Widths that a host is seen to have, where neither classes nor layers tell them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from core.families import CASES
from modgraft.engine.shown import Shown

SEEN = {
    "llama": ("", 41),  # it puts out logits
    "bert": ("bert.encoder.layer.0.intermediate.intermediate_act_fn", None),
    "mobilebert": ("mobilebert.encoder.layer.0.bottleneck", None),
    "swin": ("swin.encoder.layers.0", None),
    "wav2vec2": ("wav2vec2.encoder.pos_conv_embed", 16),
}


def first(out: Any) -> Tensor:
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if hasattr(out, "values") else out[0]
    return out


@pytest.mark.parametrize("name", SEEN)
@torch.no_grad()
def test_an_adapter_is_made_for_what_the_part_puts_out(name: str) -> None:
    case, (path, width) = CASES[name], SEEN[name]
    host, batch = mg.Host(case.model()).eval(), case.batch()
    before = {key: value.clone() for key, value in host.model.state_dict().items()}
    random = torch.get_rng_state()
    shown: list[Tensor] = []
    layer = host.model.get_submodule(path)
    handle = layer.register_forward_hook(lambda _, __, out: shown.append(first(out)))
    found = host.sites(lambda at, _: at == path)[0].width
    assert not shown  # a copy has run
    assert torch.equal(torch.get_rng_state(), random)
    host(**batch)
    assert found == shown[0].shape[-1]
    assert width in (None, found)
    handle.remove()
    implant = host.implant("a", mg.Adapter(width=3), at=lambda at, _: at == path)
    bare = first(host(**batch, modules=None))
    assert torch.equal(first(host(**batch)), bare)
    for p in implant.parameters():
        p.normal_(0, 0.3)
    assert not torch.equal(first(host(**batch)), bare)
    assert all(torch.equal(host.model.state_dict()[k], v) for k, v in before.items())


def test_an_output_that_grows_along_its_last_axis_has_no_width() -> None:
    shown = Shown(CASES["wav2vec2"].model())
    assert shown.width("wav2vec2.feature_extractor") is None
    assert Shown(nn.Linear(4, 4)).width("") is None  # nothing says what it reads


def test_a_host_that_says_its_widths_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import modgraft.engine.shown as module

    def refuse(*_: Any) -> None:
        raise AssertionError("it was run")

    monkeypatch.setattr(module, "twin_of", refuse)
    host = mg.Host(CASES["llama"].model())
    host.implant("a", mg.Adapter(width=3), at=["block", "attention", "down", "query"])
    print(host)


def test_a_module_of_a_width_that_was_seen_is_saved_and_loaded(tmp_path: Any) -> None:
    host = mg.Host(CASES["mobilebert"].model()).eval()
    implant = host.implant("a", mg.Adapter(width=3), at="*.bottleneck")
    with torch.no_grad():
        for p in implant.parameters():
            p.normal_(0, 0.3)
    batch = CASES["mobilebert"].batch()
    other = mg.Host(CASES["mobilebert"].model()).eval()
    other.load(host.save("a", tmp_path / "a"), strict=False)
    torch.testing.assert_close(first(other(**batch)), first(host(**batch)))
