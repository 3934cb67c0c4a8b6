"""Calls that other tests do not make: without data, under transforms inside a host, exported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modgraft as mg
from modgraft.core.errors import ModgraftError
from modgraft.models.t5 import T5, T5Config
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


# -- tied weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_t5, lambda: T5(T5Config(vocab_size=40, hidden_size=16))])
@pytest.mark.parametrize("method", [mg.LoRA(rank=2), mg.Adapter(reduction=2)])
def test_a_table_that_others_run_with_is_refused_and_its_role_acts(make, method):
    model = make().eval()
    host, ids = mg.Host(model), torch.randint(3, 30, (2, 5))
    batch = {"input_ids": ids, "labels": ids}
    host.implant("e", method, at="shared")
    with pytest.raises(
        ModgraftError, match=r"'e' had no effect at shared: this Embedding never runs"
    ):
        host(**batch)
    host.remove("e")
    host.implant("e", method, at="embedding", expect=2)
    with torch.no_grad():
        for parameter in host["e"].parameters():
            parameter.normal_(std=0.3)
    assert not torch.allclose(host(**batch).logits, host(**batch, modules=None).logits)


def test_a_tied_table_that_runs_is_no_fault():
    host = mg.Host(small_gpt2()).eval()
    host.implant("e", mg.LoRA(rank=2), at="embedding")
    ids = torch.randint(3, 30, (2, 5))
    host(input_ids=ids)
    host(input_ids=ids, modules=["e", None])


# -- an autograd function of the host's own --------------------------------------------------------


class Product(torch.autograd.Function):
    """x Wᵀ, whose backward reads the weight from the layer."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.weight, None


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.layer = (nn.Linear(6, 6, bias=False) for _ in "ab")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Product.apply(self.before(x), self.layer)


def test_a_weight_that_is_read_in_backward_is_the_changed_one():
    torch.manual_seed(0)
    host = mg.Host(ByHand())
    host.implant("a", mg.LoRA(rank=2), at=["before", "layer"])
    with torch.no_grad():
        for parameter in host["a"].parameters():
            parameter.normal_()
    x = torch.randn(4, 6, requires_grad=True)
    host(x).sum().backward()
    got, x.grad = x.grad, None
    host.merge("a")(x).sum().backward()
    torch.testing.assert_close(got, x.grad, atol=1e-4, rtol=1e-4)
    host(x, modules=None)  # now it has run under two
    with pytest.raises(ModgraftError, match="its weight is read there"):
        host(x).sum().backward()
