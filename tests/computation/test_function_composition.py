"""FunctionComposition and Rescale beyond the contract: shapes, placements, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertModel, LlamaModel, ResNetConfig, ResNetModel, T5EncoderModel

import modgraft as mg
from contract.hosts import HOSTS, WIDTH
from contract.modules import MODULES
from core.families import CASES

REFUSED = [
    pytest.param(HOSTS[host], module, why, id=f"{module.name}-{host}")
    for module in MODULES.values()
    for host, why in module.refused.items()
]


@pytest.mark.parametrize(("case", "module", "why"), REFUSED)
def test_a_host_on_which_a_method_is_not_defined(case: Any, module: Any, why: str) -> None:
    host = mg.Host(case.model())
    with pytest.raises(mg.ModgraftError, match=why):
        host.implant("m", module.make(), at=module.at(case))
    assert "m" not in host
    assert not any("_modgraft_state" in sub.__dict__ for sub in host.model.modules())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mg.Adapter(reduction=0), r"Adapter\(reduction=0\).* at least 1"),
        (lambda: mg.Adapter(width=-3), r"Adapter\(width=-3\).* at least 1"),
        (lambda: mg.Adapter(reduction=4, width=4), "give one of them"),
        (lambda: mg.Adapter(nonlinearity="swish"), "one of relu, gelu, gelu_tanh, silu, tanh"),
        (lambda: mg.ParallelAdapter(scale=0.0), "finite and not 0"),
        (lambda: mg.ParallelAdapter(scale=float("nan")), "finite and not 0"),
        (lambda: mg.Compacter(n=0), r"Compacter\(n=0\)"),
        (lambda: mg.Compacter(rank=0), r"Compacter\(rank=0\)"),
        (lambda: mg.ConvAdapter(kernel=4), "use kernel=3 or kernel=5"),
        (lambda: mg.ConvAdapter(over="image"), "'tokens' or 'map'"),
        (lambda: mg.ConvAdapter(form="both"), "'series' or 'parallel'"),
        (lambda: mg.Rescale(where="weight"), "'output' or 'input'"),
    ],
)
def test_options_that_mean_nothing(make: Any, message: str) -> None:
    with pytest.raises(mg.ModgraftError, match=message):
        make()


@pytest.mark.parametrize(
    ("host", "module", "at", "message"),
    [
        ("bert", mg.Adapter(reduction=17), "down", r"is 16 wide.*Adapter\(width=8\)"),
        ("cnn", mg.Adapter(width=4), "conv", r"ConvAdapter\(over='map'\)"),
        ("bert", mg.ParallelAdapter(width=4), "down", "its input is 24 wide and its output 16"),
        ("gpt2", mg.ParallelAdapter(width=4), "up", "its input is 16 wide and its output 64"),
        ("bert", mg.ParallelAdapter(width=4), "embedding", "token ids"),
        ("cnn", mg.ConvAdapter(over="map", form="parallel"), "stem", "3 wide and its output 16"),
        ("cnn", mg.ConvAdapter(), "conv", r"ConvAdapter\(over='map'\)"),
        ("cnn", mg.ConvAdapter(over="map"), "mix", r"ConvAdapter\(over='tokens'\)"),
        ("bert", mg.ConvAdapter(over="map"), "block", "not known to put out a map"),
        ("t5", mg.ConvAdapter(kernel=3), "decoder.output", "one at a time"),
        ("t5", mg.ConvAdapter(kernel=3), "lm_head", "one at a time"),
        ("bert", mg.Compacter(width=6), "down", r"bottleneck's 6; use Compacter\(width=4, n=4\)"),
        ("bert", mg.Compacter(width=3, n=3), "down", r"use Compacter\(width=2, n=2\)"),
        ("bert", mg.Compacter(width=8, rank=3), "down", "the rank is at most 2"),
        ("bert", mg.Rescale(where="input"), "embedding", "an embedding's input is ids"),
        ("bert", mg.Rescale(), "block", "no weight that a parameter module can change"),
    ],
)
def test_sites_that_a_method_cannot_use(
    host: str, module: mg.Computation, at: str, message: str
) -> None:
    grafted = mg.Host(HOSTS[host].model())
    with pytest.raises(mg.ModgraftError, match=message):
        grafted.implant("m", module, at=at)
    assert not list(grafted.implants)


@pytest.mark.parametrize("module", [mg.ParallelAdapter(width=4), mg.ConvAdapter(form="parallel")])
def test_a_site_whose_input_cannot_stand_beside_its_output(module: mg.Computation) -> None:
    """The first argument of BERT's feed-forward output is the inner activations, 24 wide."""
    case = HOSTS["bert"]
    host = mg.Host(case.model()).eval()
    host.implant("m", module, at="feedforward")
    with pytest.raises(mg.ModgraftError, match=r"\[3, 7, 16\].*\[3, 7, 24\]"):
        host(**case.batch())


def test_an_output_of_another_width_or_layout() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 8))
    host = mg.Host(model)
    host.implant("m", mg.ConvAdapter(), at="1")
    with pytest.raises(mg.ModgraftError, match=r"\[B, n, 8\] and this site puts out \[2, 8\]"):
        host(torch.randn(2, 5))
    series = mg.Host(nn.Sequential(nn.Conv1d(2, 4, 3)))
    with pytest.raises(mg.ModgraftError, match=r"puts out \[B, C, n\]"):
        series.implant("m", mg.ConvAdapter(), at="0")


def test_a_map_of_as_many_columns_as_channels() -> None:
    """The width of a ResNet's stage is in its config, and nothing says on which axis it lies."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16], depths=[1], layer_type="basic")
    host = mg.Host(ResNetModel(config)).eval()
    host.implant("m", mg.Adapter(width=3), at="encoder.stages.0")
    with pytest.raises(mg.ModgraftError, match=r"\[2, 16, 16, 16\]: as many on axis 1 as on the"):
        host(torch.randn(2, 3, 64, 64))


@torch.no_grad()
def test_an_adapter_on_rows_without_tokens() -> None:
    host = mg.Host(nn.Sequential(nn.Linear(5, 8), nn.Tanh()))
    host.implant("m", mg.Adapter(width=2), at="0")
    x = torch.randn(3, 5)
    assert torch.equal(host(x), host.model(x))


@torch.no_grad()
def test_houlsby_and_pfeiffer_are_selections() -> None:
    """One after attention and one after feed-forward, 2dm + m + d parameters each."""
    host = mg.Host(HOSTS["bert"].model())
    houlsby = host.implant("houlsby", mg.Adapter(reduction=2), at=["output", "down"], expect=4)
    pfeiffer = host.implant("pfeiffer", mg.Adapter(reduction=2), at="down", expect=2)
    each = 2 * WIDTH * 8 + 8 + WIDTH
    assert (houlsby.size, pfeiffer.size) == (4 * each, 2 * each)


@torch.no_grad()
def test_a_function_of_one_part_of_a_fused_projection_leaves_the_others() -> None:
    case = HOSTS["gpt2"]
    host = mg.Host(case.model()).eval()
    host.implant("m", mg.Adapter(width=3), at="query")
    for p in host["m"].parameters():
        p.normal_()
    layer, place = host.model.transformer.h[0].attn.c_attn, host["m"].places[0]
    x = torch.randn(2, 4, WIDTH)
    with host.using(None):
        q, k, v = layer(x).chunk(3, dim=-1)
    torch.testing.assert_close(layer(x), torch.cat([place(q, x, None), k, v], dim=-1))


def test_compacter_has_one_a_and_the_first_site_owns_it() -> None:
    case = HOSTS["bert"]
    host = mg.Host(case.model())
    host.implant("m", mg.Compacter(width=8, n=4), at=["output", "down"])
    factors = 4 * (2 + 4 + 4 + 2) + 8 + WIDTH  # S, T and biases of one site, rank 1
    assert host["m"].size == 4**3 + 4 * factors
    assert [k for k in host["m"].tensors() if k.endswith(":A")] == [f"{host['m'].paths[0]}:A"]
    twin = copy.deepcopy(host)
    for owner, place in ((host, host["m"].places[3]), (twin, twin["m"].places[3])):
        assert place.A is owner["m"].places[0].A
    assert twin["m"].places[0].A is not host["m"].places[0].A
    host.double()
    assert host["m"].places[3].A.dtype == torch.float64


def test_rescale_at_an_embedding_and_with_lora_merges_exactly() -> None:
    case = HOSTS["bert"]
    host = mg.Host(case.model()).double().eval()
    host.implant("scale", mg.Rescale(), at=["key", "value"])
    host.implant("lora", mg.LoRA(rank=2), at=["key", "value"])
    host.implant("scale2", mg.Rescale(where="input"), at=["value", "down"])
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(1.0, 0.3)
        for composition in ("scale + lora + scale2", "lora >> scale2 >> scale", "scale - 2*scale2"):
            torch.testing.assert_close(
                host.merge(composition)(**case.batch()).logits,
                host(**case.batch(), modules=composition).logits,
                rtol=1e-9,
                atol=1e-11,
            )
        table = mg.Host(nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 2)))
        table.implant("m", mg.Rescale(), at="0")
        phi = table["m"].places[0].phi.normal_()
        ids = torch.arange(9)
        expected = table.model[1](nn.functional.embedding(ids, table.model[0].weight) * phi)
        torch.testing.assert_close(table(ids), expected)
        torch.testing.assert_close(table.merge("m")(ids), expected)


def test_where_tokens_come_one_at_a_time() -> None:
    def stepwise(model: nn.Module, at: str) -> bool:
        (is_so,) = {site.stepwise for site in mg.Host(model).sites(at)}
        return is_so

    t5, bert = HOSTS["t5"].model(), HOSTS["bert"].make().config
    assert (stepwise(t5, "encoder.output"), stepwise(t5, "decoder.output")) == (False, True)
    assert stepwise(T5EncoderModel(t5.config), "encoder.output") is False
    assert stepwise(LlamaModel(HOSTS["llama"].make().config), "block") is True
    assert stepwise(BertModel(bert), "block") is False
    bert.is_decoder = True
    assert stepwise(BertModel(bert), "block") is True


CAUSAL = {
    "encoder-decoder": {
        "encoder.encoder.layer.*.output": False, "encoder.encoder": False,
        "decoder.bert.encoder.layer.*.output": True, "decoder.*.crossattention": True,
    },
    "vision-encoder-decoder": {"vision.feedforward": False, "feedforward": True},
    "bart": {"model.encoder.layers.*.fc2": False, "model.decoder.layers.*.fc2": True},
    "llava": {"vision.feedforward": False, "feedforward": True},
    "blip-2": {"vision.feedforward": False, "qformer.attention": False, "attention": True},
    "qwen2_vl": {"vision.block": False, "block": True},
    "whisper": {"model.encoder.layers.*.fc2": False, "model.decoder.layers.*.fc2": True},
    "mamba": {"block": True}, "bloom": {"block": True}, "longformer": {"block": False},
    "deberta-v2": {"block": False}, "gpt_bigcode": {"block": True},
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_whether_tokens_see_later_ones_is_told_by_what_attends(name: str) -> None:
    host = mg.Host(CASES[name].model())
    for at, causal in CAUSAL[name].items():
        assert {site.stepwise for site in host.sites(at)} == {causal}, at
        if causal:
            with pytest.raises(mg.ModgraftError, match="may not see later ones"):
                host.implant("c", mg.ConvAdapter(kernel=3), at=at)
        else:
            host.implant("c", mg.ConvAdapter(kernel=3), at=at)
            host.remove("c")


@torch.no_grad()
def test_no_token_of_a_bert_that_decodes_sees_a_later_one() -> None:
    case = CASES["encoder-decoder"]
    host, batch = mg.Host(case.model()).eval(), case.batch()
    host.implant("c", mg.ConvAdapter(kernel=3), at="encoder.encoder.layer.*.output")
    for parameter in host["c"].parameters():
        parameter.normal_(0, 0.3)
    first = host(**batch).logits
    batch["decoder_input_ids"][:, -1] += 1
    second = host(**batch).logits
    torch.testing.assert_close(second[:, :-1], first[:, :-1])
    assert not torch.allclose(second[:, -1], first[:, -1])


FUNCTIONS = (
    mg.Adapter(width=3, nonlinearity="gelu"),
    mg.Adapter(width=3, nonlinearity="gelu_tanh"),
    mg.Adapter(width=3, nonlinearity="silu", scale=0.5),
    mg.ParallelAdapter(width=3, nonlinearity="tanh"),
    mg.Compacter(width=4, n=2),
    mg.ConvAdapter(kernel=3),
    mg.ConvAdapter(form="parallel"),
)


@pytest.mark.parametrize("method", FUNCTIONS, ids=repr)
def test_gradients_of_every_tensor_and_input(method: mg.FunctionComposition) -> None:
    place = method.at(mg.Site("", nn.Linear(4, 4))).double()
    names = [name for name, _ in place.named_parameters()]
    values = [torch.randn_like(p).requires_grad_() for p in place.parameters()]
    y, x = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(y: torch.Tensor, x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(place, given, (y, x, None))

    assert torch.autograd.gradcheck(run, (y, x, *values))


@pytest.mark.parametrize("method", [*FUNCTIONS, mg.Rescale(), mg.Rescale(where="input")], ids=repr)
def test_half_precision_stays_half(method: mg.Computation) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(4, 4)))
    host.implant("m", method, at="0")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert host(torch.randn(2, 3, 4).bfloat16()).dtype == torch.bfloat16
    half = mg.Host(nn.Sequential(nn.Linear(4, 4)).bfloat16())
    half.implant("m", method, at="0")
    assert {p.dtype for p in half["m"].parameters()} == {torch.float32}
    x = torch.randn(2, 3, 4).bfloat16()
    for kind in (torch.float32, torch.bfloat16):  # whoever asks has the module in half precision
        out = half.implants.to(kind) and half(x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, half(x, modules=None))


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("depthwise", [False, True])
def test_convolution_equals_a_layer_of_torch(kernel: int, depthwise: bool) -> None:
    groups = 6 if depthwise else 1
    for over, plain in (("tokens", nn.Conv1d), ("map", nn.Conv2d)):
        wanted = plain(6, 6, kernel, padding=kernel // 2, groups=groups, bias=False)
        site = nn.Linear(5, 6) if over == "tokens" else nn.Conv2d(3, 6, 1)
        host = mg.Host(nn.Sequential(site))
        host.implant("m", mg.ConvAdapter(over=over, kernel=kernel, depthwise=depthwise), at="0")
        x = torch.randn(2, 7, 5) if over == "tokens" else torch.randn(2, 3, 4, 5)
        with torch.no_grad():
            host["m"].places[0].F.copy_(wanted.weight)
            y = host(x, modules=None)
            moved = y.transpose(1, 2) if over == "tokens" else y
            made = wanted(moved).transpose(1, 2) if over == "tokens" else wanted(moved)
            torch.testing.assert_close(host(x), y + made)


def test_a_residual_is_for_functions_and_for_sites_that_take_one() -> None:
    host = mg.Host(HOSTS["bert"].model()).eval()
    with pytest.raises(mg.ModgraftError, match=r"only a function of activations.*leave out"):
        host.implant("m", mg.LoRA(), at="query[residual]")
    host.implant("m", mg.Adapter(reduction=4), at="up[residual]")  # 16 wide in, 24 out
    with pytest.raises(mg.ModgraftError, match=r"dense\[residual\]: none of the tensors"):
        host(**HOSTS["bert"].batch())
    host.remove("m")
    assert [s.label for s in host.sites("feedforward[residual]")] == [
        f"bert.encoder.layer.{i}.output[residual]" for i in range(2)
    ]
    attention = mg.Host(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}))
    with pytest.raises(mg.ModgraftError, match="sums no residual; leave out"):
        attention.implant("m", mg.Adapter(reduction=4), at="attn[residual]")
