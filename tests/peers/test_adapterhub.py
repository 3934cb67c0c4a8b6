"""Outputs and gradients equal AdapterHub's from the same tensors.

``benchmarks/adapterhub.py`` wrote the fixtures in a separate environment: weights, a padded
batch, and what ``adapters`` computed from them in float64. Nothing of ``adapters`` runs here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import modgraft as mg

FOLDER = Path(__file__).parents[1] / "fixtures" / "adapterhub"
MADE = json.loads((FOLDER / "made.json").read_text("utf-8"))

# Where an adapter of theirs is → the label of our site.
HOUSED = {
    "bert": {r"(.*\.output)\.adapters": r"\1.dense"},
    "gpt2": {
        r"(.*\.h\.\d)\.attention_adapters\.adapters": r"\1.attn.c_proj",
        r"(.*\.h\.\d)\.output_adapters\.adapters": r"\1.mlp.c_proj",
    },
    "t5": {
        r"(.*\.layer\.0)\.adapters": r"\1.SelfAttention.o",
        r"(.*\.layer\.[12])\.adapters": r"\1.DenseReluDense.wo",
    },
    "llama": {
        r"(.*\.layers\.\d)\.attention_adapters\.adapters": r"\1.self_attn.o_proj",
        r"(.*\.layers\.\d)\.output_adapters\.adapters": r"\1.mlp.down_proj",
    },
}
# T5 has adapters after its cross-attention only if asked to (cross_adapter)
HOUSLBY_AT = {name: ["*.SelfAttention.o" if name == "t5" else "output", "down"] for name in HOUSED}
# Theirs reads the residual stream after the sum and adds to it: in a pre-norm host, the block.
ON_THE_STREAM = {
    "gpt2": {r"(.*\.h\.\d)\.output_adapters\.adapters": r"\1"},
    "t5": {r"(.*\.block\.\d)\.layer\.\d\.adapters": r"\1"},
    "llama": {r"(.*\.layers\.\d)\.output_adapters\.adapters": r"\1"},
}
# In a post-norm host it reads after the norm, adds before it, and the norm is taken again.
ON_THE_STREAM["bert"] = {r"(.*\d\.output)\.adapters": r"\1[residual]"}
ON_THE_STREAM_AT = dict.fromkeys(ON_THE_STREAM, "block") | {"bert": "feedforward[residual]"}
LORAS = {r"(.*)\.loras": r"\1"}

BOTTLENECK = {
    "down.weight": ("adapter_down.0.weight", lambda t: t),
    "down.bias": ("adapter_down.0.bias", lambda t: t),
    "up.weight": ("adapter_up.weight", lambda t: t),
    "up.bias": ("adapter_up.bias", lambda t: t),
}
# Theirs is x H with H = Σ_j A_j ⊗ L_j R_j, ours W x with W = Hᵀ: every factor transposed.
KRONECKER = {
    f"{ours}_{way}": (f"adapter_{way}{'.0' * (way == 'down')}.{theirs}", change)
    for way in ("down", "up")
    for ours, theirs, change in (
        ("A", "phm_rule", lambda t: t.transpose(1, 2)),
        ("S", "W_right", lambda t: t.transpose(1, 2)),
        ("T", "W_left", lambda t: t),
        ("b", "b", lambda t: t),
    )
}
# Their norms compute in float32 whatever the host's type, and not in one order in both versions.
CLOSE = {"bert": 1e-9, "gpt2": 1e-9, "t5": 1e-6, "llama": 5e-6}
Names = dict[str, tuple[str, Callable[[Tensor], Tensor]]]


@cache
def fixture(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def rebuilt(name: str) -> mg.Host:
    """Build the fixture's host in today's transformers, in float64."""
    kind, config = MADE["hosts"][name]["class"], MADE["hosts"][name]["config"]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**config)).eval()
    weights = {k.removeprefix("weight/"): t for k, t in fixture(name).items() if "weight/" in k}
    own = dict(model.named_parameters())
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for key, value in weights.items():
            own[key].copy_(value)
    return mg.Host(model.double())


def batch(name: str) -> dict[str, Tensor]:
    return {k.removeprefix("input/"): t for k, t in fixture(name).items() if "input/" in k}


def pairs(
    implant: mg.Implant, host: str, method: str, where: dict[str, str], names: Names
) -> list[tuple[nn.Parameter, str, Callable[[Tensor], Tensor]]]:
    """Pair each of our parameters with the name of theirs and the function that converts it."""
    keys = [k.split("/")[2] for k in fixture(method) if k.startswith(f"{host}/tensor/")]
    keys = [k for k in keys if f".{implant.name}." in k]
    label_of = {}
    for key in keys:
        for pattern, label in where.items():
            if found := re.fullmatch(rf"({pattern})\.{implant.name}\..*", key):
                label_of[found[1]] = re.sub(pattern, label, found[1])
    assert sorted(label_of.values()) == sorted(implant.paths)
    there = {label: stem for stem, label in label_of.items()}
    made, used = [], set()
    for label, place in zip(implant.paths, implant.places, strict=True):
        for own, parameter in place.named_parameters():
            if own == "A" and "A_down" in names:  # one for all: it is their model's own
                theirs = next(k for k in keys if "shared_parameters" in k)
                change = names["A_down"][1]
            else:
                theirs = f"{there[label]}.{implant.name}.{names[own][0]}"
                change = names[own][1]
            made.append((parameter, theirs, change))
            used.add(theirs)
    assert used == set(keys)  # none of theirs is left over
    return made


def check(host: mg.Host, name: str, method: str, matched: list) -> None:
    """Copy their tensors into ours; check that output and gradients are theirs."""
    saved = fixture(method)
    with torch.no_grad():
        for parameter, theirs, change in matched:
            parameter.copy_(change(saved[f"{name}/tensor/{theirs}"]).reshape(parameter.shape))
    output = host(**batch(name)).logits
    torch.testing.assert_close(output, saved[f"{name}/output"], rtol=0, atol=CLOSE[name])
    output.square().mean().backward()
    for parameter, theirs, change in matched:
        expected = change(saved[f"{name}/grad/{theirs}"]).reshape(parameter.shape).double()
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", HOUSED)
def test_the_bare_host_is_the_same_in_both(name: str) -> None:
    with torch.no_grad():
        output = rebuilt(name)(**batch(name)).logits
    torch.testing.assert_close(output, fixture(name)["output"], rtol=0, atol=CLOSE[name])


@pytest.mark.parametrize("name", HOUSED)
def test_houlsby(name: str) -> None:
    host = rebuilt(name)
    module = mg.Adapter(reduction=4, nonlinearity="silu")
    implant = host.implant("m", module, at=HOUSLBY_AT[name])
    check(host, name, "houlsby", pairs(implant, name, "houlsby", HOUSED[name], BOTTLENECK))


@pytest.mark.parametrize("name", ON_THE_STREAM)
def test_pfeiffer(name: str) -> None:
    host = rebuilt(name)
    implant = host.implant("m", mg.Adapter(reduction=4), at=ON_THE_STREAM_AT[name])
    check(host, name, "pfeiffer", pairs(implant, name, "pfeiffer", ON_THE_STREAM[name], BOTTLENECK))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_one_on_the_other(name: str) -> None:
    """Their Stack, as MAD-X has a task's adapter on a language's, is our ``m >> n``."""
    host = rebuilt(name)
    matched = []
    for own in ("m", "n"):
        implant = host.implant(own, mg.Adapter(reduction=4), at=ON_THE_STREAM_AT[name])
        matched += pairs(implant, name, "stack", ON_THE_STREAM[name], BOTTLENECK)
    assert str(host.composition) == "m >> n"
    check(host, name, "stack", matched)


# Theirs reads what goes into the block's feed-forward before its norm, if it is normed first. Where
# no module of the host takes that, as in GPT-2 and Llama, ours is the paper's: what the
# feed-forward takes.
PARALLEL = {
    "bert": ("feedforward[residual]", ON_THE_STREAM["bert"]),
    "t5": (
        "{encoder.block.*.layer.1,decoder.block.*.layer.2}",
        {r"(.*\.layer\.\d)\.adapters": r"\1"},
    ),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel(name: str) -> None:
    host = rebuilt(name)
    at, where = PARALLEL[name]
    implant = host.implant("m", mg.ParallelAdapter(reduction=4), at=at)
    check(host, name, "parallel", pairs(implant, name, "parallel", where, BOTTLENECK))


@pytest.mark.parametrize("method", ["compacter", "compacter_apart"])
@pytest.mark.parametrize("name", HOUSED)
def test_compacter(name: str, method: str) -> None:
    host = rebuilt(name)
    shared = method == "compacter"
    module = mg.Compacter(reduction=2, n=4 if shared else 2, rank=2, shared=shared)
    implant = host.implant("m", module, at=HOUSLBY_AT[name])
    check(host, name, method, pairs(implant, name, method, HOUSED[name], KRONECKER))


@pytest.mark.parametrize("name", ON_THE_STREAM)
def test_compacter_plus_plus(name: str) -> None:
    host = rebuilt(name)
    module = mg.Compacter(reduction=2, n=4, rank=2)
    implant = host.implant("m", module, at=ON_THE_STREAM_AT[name])
    method = "compacter_plus_plus"
    check(host, name, method, pairs(implant, name, method, ON_THE_STREAM[name], KRONECKER))


def test_invertible() -> None:
    host = rebuilt("llama")
    implant = host.implant("m", mg.InvertibleAdapter(reduction=2), at="embedding")
    names: Names = {
        f"{ours}_{block}.{part}": (f"{block}.{theirs}.{part}", lambda t: t)
        for block in ("F", "G")
        for ours, theirs in (("D", 0), ("U", 2))
        for part in ("weight", "bias")
    }
    where = {r"model\.invertible_adapters": "model.embed_tokens"}
    check(host, "llama", "invertible", pairs(implant, "llama", "invertible", where, names))


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_lora(name: str) -> None:
    host = rebuilt(name)
    implant = host.implant("m", mg.LoRA(rank=3, alpha=6.0), at=["query", "value"])
    names: Names = {"A": ("lora_A", lambda t: t), "B": ("lora_B", lambda t: t)}
    check(host, name, "lora", pairs(implant, name, "lora", LORAS, names))


def test_lora_in_a_fused_projection() -> None:
    """AdapterHub keeps query and value in one tensor, a half each."""
    host = rebuilt("gpt2")
    implant = host.implant("m", mg.LoRA(rank=3, alpha=6.0), at=["query", "value"], expect=4)
    matched = []
    for label, place in zip(implant.paths, implant.places, strict=True):
        path, _, part = label.partition("[")
        half = {"0/3]": 0, "2/3]": 1}[part]
        for own in ("A", "B"):
            theirs = f"{path}.loras.m.lora_{own}"
            matched.append((place.get_parameter(own), theirs, lambda t, i=half: t.chunk(2)[i]))
    check(host, "gpt2", "lora", matched)


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_ia3(name: str) -> None:
    host = rebuilt(name)
    last = "down" if name == "llama" else "up"  # what theirs takes for the intermediate layer
    implant = host.implant("m", mg.Rescale(), at=["key", "value", last])
    names: Names = {"phi": ("lora_B", lambda t: t)}
    check(host, name, "ia3", pairs(implant, name, "ia3", LORAS, names))


# One of theirs holds the prefixes of all layers of a kind: ours is a module a kind.
PREFIXES = {
    "bert": {"self_prefix": None},
    "gpt2": {"self_prefix": None},
    "t5": {
        "encoder_prefix": "encoder.*.SelfAttention",
        "self_prefix": "decoder.*.SelfAttention",
        "cross_prefix": "cross_attention",
    },
    "llama": {"self_prefix": None},
}


@pytest.mark.parametrize("method", ["prefix", "prefix_reparametrised"])
@pytest.mark.parametrize("name", PREFIXES)
def test_prefix(name: str, method: str) -> None:
    host = rebuilt(name)
    with torch.no_grad():  # with a prefix, theirs moves the text's keys away from its queries
        for key, parameter in host.model.named_parameters():
            if "relative_attention_bias" in key:
                parameter.zero_()
    width = 8 if method == "prefix_reparametrised" else None
    keys = [k.split("/")[2] for k in fixture(method) if k.startswith(f"{name}/tensor/")]
    matched: list[tuple[nn.Parameter, str, Callable[[Tensor], Tensor]]] = []
    for kind, at in PREFIXES[name].items():
        implant = host.implant(kind, mg.Prefix(length=4, reparametrise=width), at=at)
        stem = next(k for k in keys if f".{kind}." in k).partition(f".{kind}.")[0]
        theirs = f"{stem}.{kind}.control_trans"
        for i, place in enumerate(implant.places):
            if width is None:
                for j, parameter in enumerate((place.keys, place.values)):
                    matched.append((parameter, theirs, _layer_of(2 * i + j, len(implant.paths))))
                continue
            for part in ("weight", "bias"):
                parameter = place.get_parameter(f"out.{part}")
                change = _chunk_of(i, len(implant.paths))
                matched.append((parameter, f"{theirs}.2.{part}", change))
        if width is not None:
            first = implant.places[0]
            matched.append((first.embedding, f"{stem}.{kind}.wte.weight", lambda t: t))
            for part in ("weight", "bias"):
                parameter = first.get_parameter(f"hidden.{part}")
                matched.append((parameter, f"{theirs}.0.{part}", lambda t: t))
    assert {theirs for _, theirs, _ in matched} == set(keys)
    check(host, name, method, matched)


def _layer_of(index: int, layers: int) -> Callable[[Tensor], Tensor]:
    """Cut the keys or values of one layer out of a tensor [k · 2 layers · heads · d]."""
    return lambda t: t.reshape(4, 2 * layers, -1)[:, index]


def _chunk_of(index: int, layers: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.chunk(layers)[index]
