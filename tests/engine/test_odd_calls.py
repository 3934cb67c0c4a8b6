"""Calls that other tests do not make: without data, under transforms inside a host, exported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modgraft as mg
from modgraft.core.errors import ModgraftError
from modgraft.testing.hosts import small_gpt2, small_t5


def linear(**more) -> mg.Host:
    torch.manual_seed(0)
    host = mg.Host(nn.Sequential(nn.Linear(6, 6, **more))).eval()
    host.implant("a", mg.LoRA(rank=2), at="0")
    with torch.no_grad():
        for parameter in host["a"].parameters():
            parameter.normal_()
    return host


# -- without data ----------------------------------------------------------------------------------


def on_meta() -> mg.Host:
    with torch.device("meta"):
        return mg.Host(nn.Sequential(nn.Linear(6, 6)))


@pytest.mark.parametrize("method", [mg.LoRA(rank=2), mg.Adapter(reduction=2), mg.SparseDelta()])
def test_shapes_are_told_on_the_meta_device(method):
    host = on_meta()
    host.implant("a", method, at="0")
    assert host(torch.ones(3, 6, device="meta")).shape == (3, 6)


@pytest.mark.parametrize("method", [mg.LoRA(rank=2), mg.VeRA(rank=2), mg.SparseDelta()])
def test_a_module_without_data_is_refused_once_its_layer_has_some(method):
    host, full = on_meta(), nn.Sequential(nn.Linear(6, 6))
    host.implant("a", method, at="0")
    host.model.load_state_dict(full.state_dict(), assign=True)
    for rows in (1, 4, 64):
        with pytest.raises(ModgraftError, match=r"'a' at 0 has no data.*implant it anew"):
            host(torch.ones(rows, 6))
    host.remove("a")
    host.implant("a", method, at="0")
    torch.testing.assert_close(host(torch.ones(2, 6)), full(torch.ones(2, 6)))


# -- transforms inside -----------------------------------------------------------------------------


class Tangent(nn.Module):
    """J·1 of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(self.layer, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("method", [mg.LoRA(rank=2), mg.LoRA(rank=6), mg.VeRA(rank=2)])
@pytest.mark.parametrize("rows", [1, 4, 300])
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_forward_mode_differentiation_inside_a_host(method, rows):
    torch.manual_seed(0)
    host = mg.Host(Tangent())
    host.implant("a", method, at="layer")
    with torch.no_grad():
        for parameter in host["a"].parameters():
            parameter.normal_()
    weight = host.merge("a").layer.weight
    want = torch.ones(rows, 6) @ weight.T
    torch.testing.assert_close(host(torch.randn(rows, 6)), want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(host(torch.randn(rows, 6)), want, atol=1e-4, rtol=1e-4)


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:While compiling, we found")
def test_a_strict_export_is_refused_and_another_keeps_its_composition():
    host, x = linear(), torch.randn(3, 6)
    want = host(x)
    with pytest.raises(Exception, match="export with strict=False"):
        torch.export.export(host, (x,), strict=True)
    program = torch.export.export(host, (x,), strict=False)
    host.use(None)
    torch.testing.assert_close(program.module()(x), want)
    bare = mg.Host(nn.Linear(6, 4))
    torch.testing.assert_close(torch.export.export(bare, (x,), strict=True).module()(x), bare(x))


# -- odd tensors -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_strided_nested_tensor_has_no_composition_for_each_example():
    x = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(5, 6)], layout=torch.strided)
    with pytest.raises(ModgraftError, match=r"layout=torch\.jagged"):
        linear()(x, modules=["a", None])
    assert linear()(x).is_nested


def test_rotations_of_complex_weights_are_refused():
    host = mg.Host(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)))
    with pytest.raises(ModgraftError, match=r"OFT at 0: its weight is torch\.complex64"):
        host.implant("o", mg.OFT(block=2), at="0")
    assert "o" not in host


# -- words beside modules where they are looked up -------------------------------------------------


@pytest.mark.parametrize("method", [mg.LoRA(rank=2), mg.Adapter(reduction=2), mg.Rescale()])
@pytest.mark.parametrize("make", [small_gpt2, small_t5])
def test_a_prompt_of_words_beside_a_module_at_the_embedding(method, make):
    torch.manual_seed(0)
    model = make().eval()
    host = mg.Host(model)
    host.implant("p", mg.Prompt("x", ids=(5, 6)), active=False)
    host.implant("e", method, at="embedding", active=False)
    with torch.no_grad():
        for parameter in host["e"].parameters():
            parameter.normal_(std=0.3)
    ids = torch.randint(3, 30, (4, 7))
    more = {"labels": ids} if model.config.is_encoder_decoder else {}
    rows = ["e", "p", None, "e >> p"]
    each = host(input_ids=ids, modules=rows, **more).logits
    for i, row in enumerate(rows):
        alone = host(input_ids=ids, modules=row, **more).logits
        torch.testing.assert_close(each[i], alone[i], atol=1e-4, rtol=1e-4)
    embedded = host(inputs_embeds=model.get_input_embeddings()(ids), modules=rows, **more).logits
    assert embedded.shape == each.shape
