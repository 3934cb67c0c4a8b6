"""LoRA at the weights of experts, a stack of matrices, against a product written out for each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    ZambaConfig,
    ZambaForCausalLM,
)

import modgraft as mg
from core.families import CASES, first_output
from modgraft.core.layers import keeps_inputs_first
from modgraft.host.describe import lora_cost

EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "llama4_text", "deepseek_v3")


def wide(name: str) -> nn.Module:
    """Make a float64 model that runs expert by expert: PyTorch's grouped product takes none."""
    model = CASES[name].model().double()
    model.config._experts_implementation = "eager"
    return model


def made(name: str, method: mg.Computation, at: str | list[str]) -> mg.Host:
    """Make a float64 host with a module of random numbers."""
    host = mg.Host(wide(name)).eval()
    host.implant("m", method, at=at)
    with torch.no_grad():
        for parameter in host["m"].parameters():
            parameter.normal_(0, 0.3)
    return host


def written_out(host: mg.Host, scale: float) -> dict[str, Tensor]:
    """Return θ + s·BA by parameter, expert by expert."""
    weights = {}
    for path, place in zip(host["m"].paths, host["m"].places, strict=True):
        own = host.model.get_parameter(path)
        changes = [scale * place.B[e] @ place.A[e] for e in range(len(own))]
        layer, name = host.model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if keeps_inputs_first(layer, name):
            changes = [change.T for change in changes]
        weights[path] = own + torch.stack(changes)
    return weights


@pytest.mark.parametrize("name", EXPERTS)
def test_each_expert_has_a_change_of_its_own(name: str) -> None:
    host = made(name, mg.LoRA(rank=2, alpha=3.0), ["experts.up", "experts.down"])
    batch, plain = CASES[name].batch(), copy.deepcopy(host.merge(None))
    up = host["m"].places[0 if "up" in host["m"].paths[0] else 1]
    assert up.A.shape == (4, 2, 16)  # what the host's width is
    changed = first_output(host(**batch))
    expected = first_output(functional_call(plain, written_out(host, 1.5), kwargs=batch))
    torch.testing.assert_close(changed, expected, rtol=1e-9, atol=1e-11)
    merged = first_output(host.merge("m")(**batch))
    torch.testing.assert_close(merged, changed, rtol=1e-9, atol=1e-11)

    probe = torch.randn_like(changed)
    parameters = list(host["m"].parameters())
    own = torch.autograd.grad((changed * probe).sum(), parameters)
    reference = torch.autograd.grad((expected * probe).sum(), parameters)
    for one, other in zip(own, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
    host.remove("m")
    assert torch.equal(first_output(host(**batch)), first_output(plain(**batch)))


@torch.no_grad()
def test_it_is_born_as_the_identity_drawn_as_a_linear_layer_is() -> None:
    for name in EXPERTS:
        host = mg.Host(CASES[name].model()).eval()
        batch = CASES[name].batch()
        bare = first_output(host(**batch))
        host.implant("m", mg.LoRA(rank=2), at="experts.up")
        host.implant("d", mg.LoRA(rank=2, dora=True), at="experts.down")
        assert torch.equal(first_output(host(**batch)), bare)
        A = host["m"].places[0].A
        assert A.abs().max() <= A.shape[-1] ** -0.5 < 1.2 * A.abs().max()
        assert host["m"].size == lora_cost(host.sites("experts.up"), 2)


@torch.no_grad()
def test_dora_norms_the_outputs_of_each_expert() -> None:
    for name in ("mixtral", "gpt_oss"):
        host = made(name, mg.LoRA(rank=2, dora=True), "experts.down")
        place, path = host["m"].places[0], host["m"].paths[0]
        own = host.model.get_parameter(path)
        weight = own.mT if name == "gpt_oss" else own
        new = host.merge("m").get_parameter(path)
        new = new.mT if name == "gpt_oss" else new
        wanted = weight.norm(dim=-1) + place.magnitude
        torch.testing.assert_close(new.norm(dim=-1), wanted)
        batch = CASES[name].batch()
        merged = first_output(host.merge("m")(**batch))
        torch.testing.assert_close(merged, first_output(host(**batch)), rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_sums_files_and_refusals(tmp_path: Path) -> None:
    host, batch = made("mixtral", mg.LoRA(rank=2), "up"), CASES["mixtral"].batch()
    host.implant("n", mg.LoRA(rank=1), at=["experts.up", "router"])
    for parameter in host["n"].parameters():
        parameter.normal_(0, 0.3)
    both = first_output(host(**batch, modules="m - 0.5*n"))
    torch.testing.assert_close(first_output(host.merge("m - 0.5*n")(**batch)), both)
    other = mg.Host(wide("mixtral")).eval()
    other.load(host.save("m", tmp_path / "m"))
    torch.testing.assert_close(
        first_output(other(**batch)), first_output(host(**batch, modules="m"))
    )
    each = first_output(host(**batch, modules=["m", "n"]))
    for row, name in enumerate("mn"):
        alone = first_output(host(**batch, modules=name))
        torch.testing.assert_close(each[row], alone[row])
    for method, at, words in (
        (
            mg.SparseDelta(),
            "experts.up",
            "weights of 4 experts, and SparseDelta changes one matrix",
        ),
        (mg.Rescale(), "down", r"weights of 4 experts.*LoRA\(rank=8\) changes each"),
        (
            mg.LoRA(rank=2),
            "*.gate",
            r"reads its weight itself.*at='model\.layers\.0\.mlp\.gate\.weight'",
        ),
        (mg.LoRA(rank=2), "experts", "several weights, 'model.layers.0.mlp.experts.gate_up_proj'"),
        (mg.LoRA(rank=99), "experts.up", "at most 16"),
    ):
        with pytest.raises(mg.ModgraftError, match=words):
            host.implant("x", method, at=at)
    assert list(host.implants) == ["m", "n"]


class Stacked(nn.Module):
    """A stack of matrices of which nothing says what they are, nor which axis is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.hidden_size = 3, 8
        self.up_weight = nn.Parameter(torch.randn(3, 8, 8))
        self.up_bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", x, self.up_weight).sum(1) + self.up_bias


def test_where_nothing_says_which_axis_is_the_output() -> None:
    host, x = mg.Host(Stacked()), torch.randn(2, 8)
    for module, words in (
        (mg.LoRA(rank=2, dora=True), r"\[3, 8, 8\], and nothing says which axis is the output"),
        (mg.LoRA(rank=2, bias=True), "no bias that could change"),
        (mg.Rescale(), r"is \[3, 8, 8\], and Rescale .*LoRA\(rank=8\) changes each matrix"),
    ):
        with pytest.raises(mg.ModgraftError, match=words):
            host.implant("m", module, at="up_weight")
    bare = host(x)
    place = host.implant("m", mg.LoRA(rank=2), at="up_weight").places[0]
    assert torch.equal(host(x), bare)
    with torch.no_grad():
        place.B.normal_()
    weight = host.model.up_weight + place.B @ place.A
    expected = functional_call(host.merge(None), {"up_weight": weight}, (x,))
    torch.testing.assert_close(host(x), expected)
    torch.testing.assert_close(host.merge("m")(x), expected)


def longcat() -> nn.Module:
    config = LongcatFlashConfig(
        vocab_size=41, hidden_size=16, num_layers=1, num_attention_heads=2, num_key_value_heads=2,
        ffn_hidden_size=24, expert_ffn_hidden_size=16, n_routed_experts=4, zero_expert_num=2,
        moe_topk=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
        v_head_dim=8, head_dim=4,
    )  # fmt: skip
    return LongcatFlashForCausalLM(config)


def zamba() -> nn.Module:
    config = ZambaConfig(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=5, n_mamba_heads=2,
        attn_layer_period=2, attn_layer_offset=1, num_attention_heads=2, num_key_value_heads=2,
        mamba_dt_rank=2, mamba_d_state=4,
    )  # fmt: skip
    return ZambaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "at"),
    [
        (longcat, ["*.gate_up_proj", "*.experts.down_proj"]),
        (zamba, ["*.x_proj_weight", "*.dt_proj_weight"]),
    ],
)
def test_stacks_of_other_families(make: Any, at: list[str]) -> None:
    torch.manual_seed(0)
    host, ids = mg.Host(make().double().eval()), torch.randint(3, 41, (2, 7))
    with torch.no_grad():
        for p in host.model.parameters():
            p.normal_(0, 0.3)
    bare = first_output(host(ids))
    implant = host.implant("m", mg.LoRA(rank=2), at=at)
    assert torch.equal(first_output(host(ids)), bare)
    with torch.no_grad():
        for p in implant.parameters():
            p.normal_(0, 0.3)
    plain = host.merge(None)
    tensors = {
        path: plain.get_parameter(path) + place.B @ place.A
        for path, place in zip(implant.paths, implant.places, strict=True)
    }
    want = first_output(functional_call(plain, tensors, (ids,)))
    got = first_output(host(ids))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(first_output(host.merge("m")(ids)), want)
    parameters = list(implant.parameters())
    for one, other in zip(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(want.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_what_experts_put_out_is_as_wide_as_the_model() -> None:
    host = mg.Host(longcat().eval())
    implant = host.implant("a", mg.Adapter(width=2), at="model.layers.0.mlp")
    assert implant.places[0].down.in_features == 16
    host(torch.randint(3, 41, (2, 7)))
