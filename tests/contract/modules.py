"""The modules of the contract suite. A new method is one row of ``MODULES``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import modgraft as mg
from contract.hosts import FEATURES, HostCase
from contract.references import (
    at_each_site,
    bottleneck,
    compacter,
    convolved,
    dense,
    dora,
    drawn_adapter,
    drawn_lora,
    gated_fusion,
    in_the_residual,
    intrinsic,
    invertible,
    lora,
    oft,
    prefixed,
    rslora,
    scaled_input,
    some_rows,
    sparse,
    subnetwork,
    supermask,
    tokens_before,
    vera,
    weights,
)


@dataclass(frozen=True)
class ModuleCase:
    """A module, where it goes, what it needs, and a reference written from the paper's equation.

    ``reference(host, plain, tensors)`` changes ``plain``, a float64 copy of the bare model, so that
    it computes what ``host`` does with the module ``m``, from the module's ``tensors`` by key.
    ``adds`` says that its effect does not depend on the site's output, so that ``a >> b`` equals
    ``a + b``. ``chains_only`` says that it can neither be added nor scaled; the reference of
    ``m >> n`` is then that of m followed by that of n. ``refused`` names the hosts where the method
    is not defined, each with what the error says. ``prepare(host, name)`` does what the method's
    training procedure does beside learning parameters, such as choosing a mask. ``task`` follows
    the name in a composition as it is printed.
    """

    name: str
    make: Callable[[], mg.Computation]
    at: Callable[[HostCase], Any]
    reference: Callable[[mg.Host, nn.Module, dict[str, Tensor]], None]
    needs_side: bool = False
    merges: bool = False
    adds: bool = False
    chains_only: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[mg.Host, str], None] = lambda host, name: None
    task: str = ""

    @property
    def before_input(self) -> bool:
        """Whether it puts tokens before the input, which changes the shapes that follow."""
        return isinstance(self.make(), mg.TokenComposition)


def _prune(host: mg.Host, name: str) -> None:
    for i, place in enumerate(host[name].places):
        chance = torch.rand(place.phi.shape, generator=torch.Generator().manual_seed(i))
        place.prune(chance < 0.8)


def _keep(host: mg.Host, name: str) -> None:
    for i, place in enumerate(host[name].places):  # another number at each site
        size = place.values.numel()
        order = torch.randperm(size, generator=torch.Generator().manual_seed(i))
        place.keep(order[: size // 10 + i])


NO_TOKENS = dict.fromkeys(("plain", "cnn", "mha", "rnn"), "reads no token embeddings")
EMBEDDED = ("t5", "bert", "gpt2", "llama", "vit")
UNEQUAL = dict.fromkeys(("plain", "cnn", "mha", "rnn"), "are to share A, which is")
NO_MAP = dict.fromkeys(
    ("t5", "bert", "gpt2", "llama", "plain", "mha", "rnn"), "not known to put out a map"
)
NO_ATTENTION = {
    **dict.fromkeys(("plain", "cnn", "rnn"), "nor does any other layer of this host"),
    "mha": "it computes its attention by itself",
}
NO_BLOCKS = dict.fromkeys(("plain", "cnn", "mha", "rnn"), "not made of such blocks")
ONE_BY_ONE = dict.fromkeys(("gpt2", "llama"), "one at a time")

MODULES = {
    case.name: case
    for case in (
        ModuleCase(
            "lora", lambda: mg.LoRA(rank=4, alpha=3.0), lambda h: h.lora_at, weights(lora),
            merges=True,
        ),
        ModuleCase(
            "rslora", lambda: mg.LoRA(rank=4, alpha=3.0, rslora=True), lambda h: h.lora_at,
            weights(rslora), merges=True,
        ),
        ModuleCase(
            "dora", lambda: mg.LoRA(rank=4, alpha=3.0, dora=True), lambda h: h.lora_at,
            weights(dora), merges=True,
        ),
        ModuleCase(
            "subnetwork", mg.SparseSubnetwork, lambda h: h.lora_at, weights(subnetwork),
            merges=True, prepare=_prune,
        ),
        ModuleCase(
            "supermask", lambda: mg.Supermask(density=0.7), lambda h: h.lora_at,
            weights(supermask), merges=True,
        ),
        ModuleCase(
            "dense_delta", lambda: mg.DenseDelta(bias=True), lambda h: h.lora_at,
            weights(dense, lambda b, t, place: b + t["b"]), merges=True,
        ),
        ModuleCase(
            "sparse", lambda: mg.SparseDelta(density=0.1), lambda h: h.lora_at, weights(sparse),
            merges=True, prepare=_keep,
        ),
        ModuleCase(
            "sparse_first_phase", lambda: mg.SparseDelta(density=0.1), lambda h: h.lora_at,
            weights(dense), merges=True,
        ),
        ModuleCase(
            "intrinsic", lambda: mg.IntrinsicDimension(dim=6, seed=3), lambda h: h.lora_at,
            weights(intrinsic), merges=True,
        ),
        ModuleCase(
            "vera", lambda: mg.VeRA(rank=5, seed=3), lambda h: h.lora_at,
            weights(vera, group=lambda label: ""), merges=True,
        ),
        ModuleCase(
            "oft", lambda: mg.OFT(blocks=1), lambda h: h.lora_at, weights(oft(None)), merges=True,
        ),
        ModuleCase(
            "oft_series", lambda: mg.OFT(block=4, terms=5), lambda h: h.lora_at,
            weights(oft(5)), merges=True, refused=NO_BLOCKS,
        ),
        ModuleCase(
            "tokens", lambda: mg.TrainableTokens(ids=(3, 0)), lambda h: h.lora_at,
            weights(some_rows), merges=True,
        ),
        ModuleCase(
            "fusion", lambda: mg.GatedFusion(dim=FEATURES), lambda h: h.output_at,
            gated_fusion("paper"), needs_side=True,
        ),
        ModuleCase(
            "fusion_released", lambda: mg.GatedFusion(dim=FEATURES, form="released"),
            lambda h: h.output_at, gated_fusion("released"), needs_side=True,
        ),
        ModuleCase(
            "adapter", lambda: mg.Adapter(reduction=4, scale=0.7), lambda h: h.adapter_at,
            at_each_site(lambda y, x, t: y + 0.7 * bottleneck(y, t)),
        ),
        ModuleCase(
            "adapter_residual", lambda: mg.Adapter(reduction=4),
            lambda h: f"{h.parallel_at}[residual]",
            in_the_residual(lambda y, x, t: bottleneck(y, t)),
        ),
        ModuleCase(
            "parallel", lambda: mg.ParallelAdapter(width=5), lambda h: h.parallel_at,
            at_each_site(lambda y, x, t: y + 4 * bottleneck(x, t)), adds=True,
        ),
        ModuleCase(
            "compacter", lambda: mg.Compacter(width=8, rank=2, scale=0.7), lambda h: h.adapter_at,
            at_each_site(compacter),
        ),
        ModuleCase(
            "compacter_apart", lambda: mg.Compacter(width=8, n=2, shared=False, scale=0.7),
            lambda h: h.output_at, at_each_site(compacter),
        ),
        ModuleCase(
            "conv", lambda: mg.ConvAdapter(), lambda h: h.adapter_at,
            at_each_site(lambda y, x, t: y + convolved(y, t["F"], False)),
        ),
        ModuleCase(
            "conv_parallel", lambda: mg.ConvAdapter(form="parallel", depthwise=True),
            lambda h: h.parallel_at,
            at_each_site(lambda y, x, t: y + convolved(x, t["F"], True)), adds=True,
        ),
        ModuleCase(
            "conv_tokens", lambda: mg.ConvAdapter(kernel=3, depthwise=True), lambda h: h.output_at,
            at_each_site(lambda y, x, t: y + convolved(y, t["F"], True)), refused=ONE_BY_ONE,
        ),
        ModuleCase(
            "conv_map", lambda: mg.ConvAdapter(over="map", kernel=3),
            lambda h: h.map_at or h.output_at,
            at_each_site(lambda y, x, t: y + convolved(y, t["F"], False)), refused=NO_MAP,
        ),
        ModuleCase(
            "rescale", lambda: mg.Rescale(), lambda h: h.keys_at,
            weights(lambda w, t, _: t["phi"][:, None] * w, lambda b, t, _: t["phi"] * b),
            merges=True,
        ),
        ModuleCase(
            "rescale_input", lambda: mg.Rescale(where="input"), lambda h: h.inner_at,
            weights(scaled_input), merges=True,
        ),
        ModuleCase(
            "prefix", lambda: mg.Prefix(length=3), lambda h: h.attention_at, prefixed,
            chains_only=True, refused=NO_ATTENTION,
        ),
        ModuleCase(
            "prefix_mlp", lambda: mg.Prefix(length=2, reparametrise=5), lambda h: h.attention_at,
            prefixed, chains_only=True, refused=NO_ATTENTION,
        ),
        ModuleCase(
            "soft_prompt", lambda: mg.SoftPrompt(length=3), lambda h: None,
            tokens_before(lambda t, model, prompt, v: t["phi"]), chains_only=True,
            refused=NO_TOKENS,
        ),
        ModuleCase(
            "prompt", lambda: mg.Prompt("two words", ids=(7, 30)), lambda h: None,
            tokens_before(lambda t, model, prompt, v: model.get_input_embeddings().weight[[7, 30]]),
            chains_only=True, refused={**NO_TOKENS, "vit": "reads no text"},
        ),
        ModuleCase(
            "linear_map", lambda: mg.LinearMap(dim=FEATURES), lambda h: None,
            tokens_before(lambda t, model, prompt, v: v @ t["map.weight"].T + t["map.bias"]),
            needs_side=True, chains_only=True, refused=NO_TOKENS,
        ),
        ModuleCase(
            "shared", lambda: mg.Shared(mg.LoRA(rank=4, alpha=3.0), group="name"),
            lambda h: h.lora_at, weights(lora, group=lambda label: label.rpartition(".")[2]),
            merges=True,
        ),
        ModuleCase(
            "shared_a", lambda: mg.Shared(mg.LoRA(rank=4, alpha=3.0), only=("A",)),
            lambda h: h.lora_at, weights(lora, group=lambda label: ""), merges=True,
            refused=UNEQUAL,
        ),
        ModuleCase(
            "shared_adapter", lambda: mg.Shared(mg.Adapter(reduction=4, scale=0.7)),
            lambda h: h.adapter_at,
            at_each_site(lambda y, x, t: y + 0.7 * bottleneck(y, t)),
        ),
        ModuleCase(
            "hyper",
            lambda: mg.HyperNetwork(
                mg.LoRA(rank=4, alpha=3.0), tasks=("fr",), embedding=3, hidden=7
            ),
            lambda h: h.lora_at, weights(drawn_lora, group=lambda label: ""), merges=True,
            task="['fr']",
        ),
        ModuleCase(
            "hyper_adapter",
            lambda: mg.HyperNetwork(
                mg.Adapter(reduction=4, scale=0.7), tasks=("fr",), embedding=4
            ),
            lambda h: h.adapter_at, at_each_site(drawn_adapter), task="['fr']",
        ),
        ModuleCase(
            "invertible", lambda: mg.InvertibleAdapter(),
            lambda h: ["embedding", h.output_at] if h.name in EMBEDDED else h.output_at,
            invertible,
        ),
    )
}  # fmt: skip


def implanted(
    case: HostCase, module: ModuleCase, stir: bool = True, shallow: bool = False, **kw: Any
) -> mg.Host:
    """Make a host with the module as ``m``, its parameters random numbers where ``stir``."""
    host = mg.Host(case.model(shallow=shallow), **kw).eval()
    host.implant("m", module.make(), at=module.at(case))
    module.prepare(host, "m")
    if stir:
        with torch.no_grad():
            for p in host["m"].parameters():
                p.normal_(0.0, 0.3)
    return host
