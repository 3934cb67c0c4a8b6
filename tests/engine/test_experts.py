"""LoRA at the weights of experts, a stack of matrices, against a product written out for each."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

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
    with pytest.raises(mg.ModgraftError, match="one set of weights a call"):
        host(**batch, modules=["m", "n"])
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


def test_where_nothing_says_which_axis_is_the_output() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts, self.hidden_size = 3, 8
            self.up = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eio->beo", x, self.up).sum(1)

    host = mg.Host(Square())
    with pytest.raises(mg.ModgraftError, match=r"this parameter is \[3, 8, 8\]"):
        host.implant("m", mg.LoRA(rank=2), at="up")
