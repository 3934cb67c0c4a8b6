"""LoRA and IA³ as ``adapters`` has them: at weights that roles of a host name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from modgraft.computation.base import Computation
from modgraft.computation.lora import LoRA
from modgraft.computation.rescale import Rescale
from modgraft.core.errors import ModgraftError
from modgraft.core.sites import find, located
from modgraft.store.formats.adapterhub.layout import Module, Places, Tie, check, type_of
from modgraft.store.formats.adapterhub.places import layer_number, path_of

LORA: dict[str, Any] = {
    "architecture": "lora", "selfattn_lora": True, "intermediate_lora": False,
    "output_lora": False, "leave_out": [], "r": 8, "alpha": 8, "dropout": 0.0,
    "attn_matrices": ["q", "v"], "composition_mode": "add", "init_weights": "lora",
    "init_weights_seed": None, "use_gating": False, "use_dora": False, "vera_d": None,
    "vera_b": None, "dtype": None,
}  # fmt: skip
_MATRICES = {"q": "query", "k": "key", "v": "value"}
_HOSTS = ("bert", "roberta", "distilbert", "gpt2", "t5", "bart", "llama", "vit")


def modules(config: Mapping[str, Any], model: nn.Module, name: str) -> list[Module]:
    """Return the LoRA or IA³ of a configuration.

    Raises:
        ModgraftError: for what is set and not computed here.
    """
    c = _checked(config)
    places = weights(model, c)
    labels = [label for _, label in places]
    if c["composition_mode"] == "scale":
        return [Module("ia3", Rescale(), labels, _ties(places, name, {"phi": "lora_B"}))]
    ties = _ties(places, name, {"A": "lora_A", "B": "lora_B"})
    if c["use_dora"]:
        _check_dora(model, c, places)
        ties += _magnitudes(model, places, name)
    method = LoRA(c["r"], float(c["alpha"]), dropout=float(c["dropout"]), dora=c["use_dora"])
    return [Module("lora", method, labels, ties)]


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole configuration, if it is computed here; a type is how tensors are kept."""
    scaled = config.get("composition_mode") == "scale"
    use = {"selfattn_lora", "intermediate_lora", "output_lora", "attn_matrices", "r", "alpha"}
    use |= {"leave_out", "composition_mode"} | (set() if scaled else {"dropout", "use_dora"})
    c = check({k: v for k, v in config.items() if k != "dtype"}, LORA, use)
    if c["composition_mode"] not in ("add", "scale"):
        raise ModgraftError(f"composition_mode={c['composition_mode']!r:.40} is not understood")
    if scaled and (c["r"], c["alpha"]) != (1, 1):
        raise ModgraftError("composition_mode='scale' is read with r=1 and alpha=1")
    if config.get("dtype") not in (None, "float32", "float16", "bfloat16"):
        raise ModgraftError(f"dtype={config['dtype']!r:.40} is not understood")
    return c


def _ties(places: Places, name: str, own: Mapping[str, str]) -> list[Tie]:
    """Return tensors by what theirs are called; those of one fused layer are pieces of one."""
    ties = []
    for at, (path, label) in enumerate(places):
        same = [i for i, (other, _) in enumerate(places) if other == path]
        for ours, theirs in own.items():
            key = f"{path}.loras.{name}.{theirs}"
            ties.append(Tie(f"{label}:{ours}", key, piece=(same.index(at), len(same))))
    return ties


def _magnitudes(model: nn.Module, places: Places, name: str) -> list[Tie]:
    """Return the magnitudes of DoRA: theirs are whole, ours are counted from the host's norms."""
    ties = []
    for path, label in places:
        weight = cast(Tensor, model.get_submodule(label).weight).detach()
        norm = weight.to(torch.promote_types(weight.dtype, torch.float32)).norm(dim=1)
        ties.append(Tie(f"{label}:magnitude", f"{path}.loras.{name}.m.weight", above=norm))
    return ties


def _check_dora(model: nn.Module, c: Mapping[str, Any], places: Places) -> None:
    """Refuse DoRA where theirs is another function: it scales biases, and norms W + BA unscaled."""
    kind = type_of(model)
    layers = [site.module for site in located(model, [label for _, label in places])]
    if any(getattr(layer, "bias", None) is not None for layer in layers):
        raise ModgraftError(
            f"use_dora in a {kind}, whose layers have a bias: adapters scales that too, which is "
            f"not computed here; it is read where there is none, as in T5 and Llama"
        )
    if c["alpha"] != c["r"]:
        raise ModgraftError(
            f"use_dora with alpha={c['alpha']} and r={c['r']}: adapters leaves alpha out of the "
            f"norm, which is not computed here; it is read with alpha=r"
        )
    if c["dropout"]:
        raise ModgraftError("use_dora with dropout is not computed here")


def weights(model: nn.Module, c: Mapping[str, Any]) -> Places:
    """Return the layers whose weights a configuration changes."""
    if unknown := set(c["attn_matrices"]) - _MATRICES.keys():
        raise ModgraftError(f"attn_matrices: {sorted(unknown)} are not understood")
    kind = type_of(model)
    if kind not in _HOSTS:
        raise ModgraftError(f"LoRA and IA³ are read in {', '.join(_HOSTS)}, not in a {kind}")
    if kind == "llama" and c["output_lora"]:
        raise ModgraftError("output_lora is not understood in a Llama")
    roles = [_MATRICES[m] for m in _MATRICES if c["selfattn_lora"] and m in c["attn_matrices"]]
    roles += ["down" if kind == "llama" else "up"] * bool(c["intermediate_lora"])
    roles += ["down"] * bool(c["output_lora"])
    if not roles:
        raise ModgraftError("the configuration changes no weight")
    found = [(path_of(model, site.path), site.label) for site in find(model, roles)]
    if untold := [p for p, _ in found if "crossattention" in p or p.endswith(".wi_0")]:
        raise ModgraftError(f"LoRA and IA³ are not understood where a {kind} has {untold[0]}")
    return [f for f in found if layer_number(model, f[0]) not in c["leave_out"]]


def tries(name: str, method: Computation) -> Iterator[dict[str, Any]]:
    """Return the configurations that may say a module, whichever fits its sites.

    Raises:
        ModgraftError: for what they cannot say.
    """
    made = {**LORA, **_said(method)}
    several = [m for n in range(8) if (m := [k for i, k in enumerate("qkv") if n >> i & 1])]
    for matrices in ([], *several):
        for up, down in ((False, False), (True, False), (False, True), (True, True)):
            one = {"selfattn_lora": bool(matrices), "intermediate_lora": up, "output_lora": down}
            yield {**made, **one, "attn_matrices": matrices or made["attn_matrices"]}


def _said(method: Any) -> dict[str, Any]:
    if isinstance(method, Rescale):
        if method.where == "input":
            raise ModgraftError("Rescale(where='input') is not written: adapters scales outputs")
        return {"r": 1, "alpha": 1, "composition_mode": "scale", "init_weights": "ia3"}
    if method.rslora or method.bias or method.rank_pattern or method.alpha_pattern:
        raise ModgraftError(
            "LoRA with rslora, bias, rank_pattern or alpha_pattern is not written as one of "
            "AdapterHub"
        )
    alpha = method.rank if method.alpha is None else method.alpha
    alpha = int(alpha) if alpha == int(alpha) else alpha
    said = {"r": method.rank, "alpha": alpha, "dropout": method.dropout}
    return said | {"use_dora": method.dora}
