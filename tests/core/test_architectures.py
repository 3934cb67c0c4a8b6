"""Every role of every known architecture finds what it names, on a real model of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import modgraft as mg
from core.families import CASES, Batch, first_output
from modgraft.core.architectures import FAMILIES
from modgraft.core.roles import family_of, known_models, roles_of
from modgraft.core.sites import Site, one_input
from modgraft.core.tensors import tensor_of

WEIGHTS = ("query", "key", "value", "output", "up", "down", "router", "experts.up", "experts.down")
STATE_SPACE = ("mamba", "mamba2", "falcon_mamba")


def weighted_roles(host: mg.Host) -> list[str]:
    found = roles_of(host.model).patterns
    return [r for r in found if r.endswith(WEIGHTS) and not r.endswith("coder.output")]


@pytest.mark.parametrize("name", CASES)
def test_roles_are_what_they_say(name: str) -> None:
    case = CASES[name]
    host, batch = mg.Host(case.model()).eval(), case.batch()
    _check_sites(name, host, batch)
    _check_lora(host, batch)


def _check_sites(name: str, host: mg.Host, batch: Batch) -> None:
    """Every role finds its sites, and these are as wide as they say."""
    roles, widths = roles_of(host.model), {}
    assert not roles.guessed
    wanted = {"up", "down", "block"}
    if name not in STATE_SPACE:
        wanted |= {"query", "key", "value", "output", "attention", "self_attention", "feedforward"}
    hooks = []
    for role in roles.patterns:
        if (role == "decoder.output" and name == "t5 encoder") or (
            role.endswith("cross_attention") and not _attends_across(host.model)
        ):
            with pytest.raises(mg.ModgraftError, match="has no such part"):
                host.sites(role)
            continue
        sites = host.sites(role)
        wanted.discard(role)
        for site in sites:
            if site.parameter is None:
                hooks.append(site.module.register_forward_hook(_noting(widths, site)))
    assert not wanted
    inputs = _inputs(host.model, hooks)
    with torch.no_grad():
        host(**batch)
    for hook in hooks:
        hook.remove()
    assert widths
    for label, (said, found) in widths.items():
        assert said == found, label
    for layers in one_input(host.model):
        calls = [inputs[layer] for layer in layers if layer in inputs]
        assert all(x is first for first, *rest in zip(*calls, strict=True) for x in rest)


@torch.no_grad()
def _check_lora(host: mg.Host, batch: Batch) -> None:
    """LoRA at every role leaves the host as it is at first, then acts, and merges to the same."""
    bare = first_output(host(**batch))
    for role in weighted_roles(host):
        host.implant("m", mg.LoRA(rank=2), at=role)
        assert torch.equal(first_output(host(**batch)), bare), role
        for parameter in host["m"].parameters():
            parameter.normal_(0, 0.3)
        changed = first_output(host(**batch))
        assert (changed - bare).abs().max() > 1e-5, role
        merged = first_output(host.merge("m")(**batch))
        torch.testing.assert_close(merged, changed, rtol=1e-4, atol=1e-4, msg=role)
        host.remove("m")


def _attends_across(model: nn.Module) -> bool:
    return any(re.search("cross|Enc|encoder_attn", path) for path, _ in model.named_modules())


def _noting(widths: dict[str, tuple[int, int]], site: Site) -> Any:
    said = site.width

    def note(_: nn.Module, __: Any, out: Any) -> None:
        found = tensor_of(out).shape[-1]
        widths[site.label] = said, found if site.part is None else site.part.size(found)

    return note


def _inputs(model: nn.Module, hooks: list[Any]) -> dict[nn.Module, list[torch.Tensor]]:
    inputs: dict[nn.Module, list[torch.Tensor]] = {}

    def note(own: nn.Module, args: tuple) -> None:
        inputs.setdefault(own, []).append(args[0])

    hooks += [m.register_forward_pre_hook(note) for layers in one_input(model) for m in layers]
    return inputs


CACHED = (
    "gpt2", "gpt_bigcode", "gpt_bigcode, many keys", "gpt_neox", "falcon", "falcon, many keys",
    "falcon, grouped", "bloom", "mpt", "phi3", "llama",
)  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_parts_of_a_fused_projection_are_what_their_role_says(name: str) -> None:
    host, batch = mg.Host(CASES[name].model()).eval(), CASES[name].batch()

    def kept() -> tuple[torch.Tensor, torch.Tensor]:
        layer = host(**batch, use_cache=True).past_key_values.layers[0]
        return layer.keys, layer.values

    keys, values = kept()
    for role, moves in {
        "query": (False, False),
        "key": (True, False),
        "value": (False, True),
    }.items():
        first = host.sites(role)[0].label
        host.implant("m", mg.LoRA(rank=2), at=first)
        for parameter in host["m"].parameters():
            parameter.normal_(0, 0.3)
        new_keys, new_values = kept()
        shared = (keys - new_keys).abs().amax((0, 2)), (values - new_values).abs().amax((0, 2))
        assert tuple(bool(change.max() > 1e-6) for change in shared) == moves
        host.remove("m")


@pytest.mark.parametrize("name", ["modernbert", "deberta", "vit", "clip_text_model"])
@torch.no_grad()
def test_one_token_alone_reads_its_value_whatever_query_and_key_are(name: str) -> None:
    case = CASES[name]
    host, batch = mg.Host(case.model()).eval(), {"input_ids": torch.tensor([[5]])}
    if name == "vit":
        attention = host.sites("attention")[0].module
        run = lambda: attention(torch.ones(1, 1, 16))[0]  # noqa: E731
    else:
        run = lambda: first_output(host(**batch))  # noqa: E731
    bare = run()
    for role, moves in {"query": False, "key": False, "value": True}.items():
        host.implant("m", mg.LoRA(rank=2), at=role)
        for parameter in host["m"].parameters():
            parameter.normal_(0, 0.3)
        if name == "vit":
            with host.using("m"):
                changed = run()
        else:
            changed = run()
        assert bool((changed - bare).abs().max() > 1e-4) is moves, role
        host.remove("m")


def test_families_do_not_overlap_and_each_type_was_tried() -> None:
    kinds = [kind for family in FAMILIES for kind in family.types]
    assert len(kinds) == len(set(kinds)) >= 60
    assert family_of(nn.Linear(2, 2)) is None
    with torch.device("meta"):
        models = [case.bare() for case in CASES.values()]
    tried = {config.model_type for model in models for *_, config in known_models(model)}
    assert tried == set(kinds)
