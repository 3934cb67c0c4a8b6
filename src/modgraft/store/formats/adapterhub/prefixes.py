"""Prefixes as ``adapters`` has them: all layers of a kind in one tensor, or made by one MLP.

A prefix of ours counts no positions, as theirs. It is refused in a T5, where theirs moves the
relative positions of the text by its length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from modgraft.computation.prefix import Prefix, key_value_shape
from modgraft.core.errors import ModgraftError
from modgraft.core.sites import Site, find
from modgraft.store.formats.adapterhub.layout import Module, Tie, check, prefix, type_of
from modgraft.store.formats.adapterhub.places import layer_number

PREFIX: dict[str, Any] = {
    "architecture": "prefix_tuning", "encoder_prefix": True, "cross_prefix": True,
    "leave_out": [], "flat": False, "prefix_length": 30, "bottleneck_size": 512,
    "non_linearity": "tanh", "dropout": 0.0, "use_gating": False, "shared_gating": True,
    "init_weights_seed": None,
}  # fmt: skip
_LOCATIONS = {
    "bert": {"self_prefix": "self_attention"},
    "roberta": {"self_prefix": "self_attention"},
    "distilbert": {"self": "self_attention"},
    "gpt2": {"self_prefix": "self_attention"},
    "llama": {"self_prefix": "self_attention"},
    "vit": {"self_prefix": "self_attention"},
    "bart": {
        "encoder_prefix": "encoder.*.self_attn",
        "self_prefix": "decoder.*.self_attn",
        "cross_prefix": "cross_attention",
    },
}  # fmt: skip
"""What each kind of prefix is called, and the layers that it is at."""


def modules(config: Mapping[str, Any], model: nn.Module, name: str) -> list[Module]:
    """Return the prefixes of a configuration, one for each kind of attention.

    Raises:
        ModgraftError: for what is set and not computed here.
    """
    use = {"encoder_prefix", "cross_prefix", "leave_out", "flat", "prefix_length"}
    c = check(config, PREFIX, use | {"bottleneck_size", "shared_gating"})
    kind = type_of(model)
    if kind == "t5":
        raise ModgraftError(
            "a prefix in a T5 is not read: adapters counts the text's keys from its length on and "
            "the queries from 0, so that the relative positions of the text are others than here"
        )
    if kind not in _LOCATIONS:
        raise ModgraftError(f"prefixes are read in {', '.join(_LOCATIONS)}, not in a {kind}")
    method = Prefix(c["prefix_length"], None if c["flat"] else c["bottleneck_size"])
    found = []
    for location, at in _LOCATIONS[kind].items():
        if not c.get(location, True):
            continue
        where = at if at.endswith("attention") else prefix(model) + at
        sites = [
            site
            for site in find(model, where)
            if layer_number(model, site.path) not in c["leave_out"]
        ]
        if not sites:
            continue
        stem = f"prefix_tuning.prefix_tunings.{name}.{location}"
        labels = [site.label for site in sites]
        ties = (_flat if c["flat"] else _made)(sites, stem, method.length)
        found.append(Module(location, method, labels, ties))
    return found


def _flat(sites: Sequence[Site], stem: str, length: int) -> list[Tie]:
    """Return the keys and values of all layers, which are one tensor."""
    return [
        Tie(
            f"{site.label}:{ours}",
            f"{stem}.control_trans",
            piece=(2 * i + j, 2 * len(sites)),
            vectors=(length, key_value_shape("Prefix", site)[0]),
        )
        for i, site in enumerate(sites)
        for j, ours in enumerate(("keys", "values"))
    ]


def _made(sites: Sequence[Site], stem: str, length: int) -> list[Tie]:
    """Return the MLP, whose last layer is one for all."""
    first, parts = sites[0].label, ("weight", "bias")
    ties = [Tie(f"{first}:embedding", f"{stem}.wte.weight")]
    ties += [Tie(f"{first}:hidden.{part}", f"{stem}.control_trans.0.{part}") for part in parts]
    return ties + [
        Tie(f"{site.label}:out.{p}", f"{stem}.control_trans.2.{p}", piece=(i, len(sites)))
        for i, site in enumerate(sites)
        for p in parts
    ]


def tries(name: str, method: Prefix) -> Iterator[dict[str, Any]]:
    """Return the configurations that may say a prefix, whichever fits its sites.

    Raises:
        ModgraftError: for what they cannot say.
    """
    if method.counted:
        raise ModgraftError(
            f"{name!r} counts as positions, and a prefix of AdapterHub does not; it has the place "
            f"of Prefix(length={method.length})"
        )
    made = {**PREFIX, "flat": method.reparametrise is None, "prefix_length": method.length}
    made["bottleneck_size"] = method.reparametrise or PREFIX["bottleneck_size"]
    for encoder in (True, False):
        for cross in (True, False):
            yield {**made, "encoder_prefix": encoder, "cross_prefix": cross}
