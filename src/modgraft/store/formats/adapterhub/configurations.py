"""What a configuration of ``adapters`` means as modules of ours, and what it is of ours.

One adapter of theirs may be several modules: a bottleneck with an invertible adapter, prefixes of
an encoder and of a decoder, or a union, whose configurations each have a module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from modgraft.computation.adapter import Adapter, ParallelAdapter
from modgraft.computation.compacter import Compacter
from modgraft.computation.invertible_adapter import InvertibleAdapter
from modgraft.computation.lora import LoRA
from modgraft.computation.prefix import Prefix
from modgraft.computation.rescale import Rescale
from modgraft.core.errors import ModgraftError, an
from modgraft.engine.implant import Implant
from modgraft.store.formats.adapterhub import bottlenecks, prefixes, weights
from modgraft.store.formats.adapterhub.layout import Module
from modgraft.store.formats.adapterhub.places import layer_number

_ORDER = ("prefix", "self", "invertible", "lora", "ia3", "bottleneck")
"""How they act where several stand at one layer: a bottleneck reads what the weights made."""


def modules(config: Mapping[str, Any], model: nn.Module, name: str) -> list[Module]:
    """Return the modules of a configuration, in the order in which they act.

    Raises:
        ModgraftError: for what is set and not computed here.
    """
    match config.get("architecture"):
        case "union":
            found = _union(config, model, name)
        case "lora":
            found = weights.modules(config, model, name)
        case "prefix_tuning":
            found = prefixes.modules(config, model, name)
        case "prompt_tuning":
            raise ModgraftError(
                "architecture='prompt_tuning' is not read: adapters puts a prompt after the "
                "positions and the norm of the embeddings, and ours stands before them"
            )
        case None:
            found = bottlenecks.modules(config, model, name)
        case other:
            raise ModgraftError(
                f"architecture={other!r:.40} is not read; bottlenecks, invertible adapters, "
                f"Compacter, LoRA, IA³, prefixes and unions of them are"
            )
    return sorted(found, key=lambda m: _ORDER.index(m.kind.rpartition("_")[2]))


def _union(config: Mapping[str, Any], model: nn.Module, name: str) -> list[Module]:
    if unknown := config.keys() - {"architecture", "configs"}:
        raise ModgraftError(f"architecture='union': {', '.join(sorted(unknown))} is not understood")
    several = config.get("configs")
    if not isinstance(several, list) or not all(isinstance(one, dict) for one in several):
        raise ModgraftError("architecture='union': configs is no list of configurations")
    if any(one.get("architecture") == "union" for one in several):
        raise ModgraftError("architecture='union' in a union is not understood")
    found = [each for one in several for each in modules(one, model, name)]
    for kind in {module.kind for module in found}:
        sites = [site for module in found if module.kind == kind for site in module.sites]
        if len(sites) != len(set(sites)):
            raise ModgraftError(f"architecture='union' has two of a kind ({kind}) at one layer")
    return found


def said(implants: Sequence[Implant], model: nn.Module) -> dict[str, Any]:
    """Return the configuration of modules that become one adapter.

    Raises:
        ModgraftError: for what it cannot say.
    """
    prefix = [i for i in implants if isinstance(i.method, Prefix)]
    groups = [prefix] * bool(prefix) + [[i] for i in implants if i not in prefix]
    found = [_said(group, model) for group in groups]
    inverted = [one for one in found if one.get("inv_adapter")]
    plain = [one for one in found if "architecture" not in one and one not in inverted]
    if len(inverted) == len(plain) == 1 and (
        inverted[0]["non_linearity"] == plain[0]["non_linearity"]
    ):
        keys = ("inv_adapter", "inv_adapter_reduction_factor")
        both = plain[0] | {key: inverted[0][key] for key in keys}
        found = [both, *(one for one in found if "architecture" in one)]
    if len(found) == 1:
        return found[0]
    return {"architecture": "union", "configs": found}


def _said(group: Sequence[Implant], model: nn.Module) -> dict[str, Any]:
    """Return the configuration of one module, or of prefixes."""
    name, own = group[0].name, {label for implant in group for label in implant.paths}
    if any(repr(i.method) != repr(group[0].method) for i in group):
        raise ModgraftError(f"{name!r} and another prefix are unlike, and become one in adapters")
    why, fits = "its sites are none of theirs", list[dict[str, Any]]()
    for one in _tries(group[0]):
        try:
            every = _sites(modules(one, model, name))
            if not own <= every:
                continue
            one["leave_out"] = sorted(_numbers(model, every) - _numbers(model, own))
            if _sites(modules(one, model, name)) == own:
                fits.append(one)
        except ModgraftError as error:
            why = str(error)
    if fits:  # what a kind of place says need not be said by layers
        return min(fits, key=lambda one: len(one["leave_out"]))
    raise ModgraftError(
        f"{name!r} cannot be written as an adapter of AdapterHub: {why} "
        f"({', '.join(group[0].paths[:3])}); save it as modgraft's"
    )


def _tries(implant: Implant) -> Iterable[dict[str, Any]]:
    name, method = implant.name, implant.method
    if isinstance(method, InvertibleAdapter) and any(place.undoes for place in implant.places):
        raise ModgraftError(
            f"{name!r} undoes an invertible adapter at {implant.paths[-1]}, and adapters has one "
            f"at the embeddings alone"
        )
    match method:
        case Adapter() | ParallelAdapter() | Compacter() | InvertibleAdapter():
            return bottlenecks.tries(name, method)
        case LoRA() | Rescale():
            return weights.tries(name, method)
        case Prefix():
            return prefixes.tries(name, method)
    raise ModgraftError(
        f"{name!r} is {an(type(method).__name__)}, which is not written as an adapter of "
        f"AdapterHub; Adapter, ParallelAdapter, Compacter, InvertibleAdapter, LoRA, Rescale and "
        f"Prefix are"
    )


def _sites(found: Iterable[Module]) -> set[str]:
    return {site for module in found for site in module.sites}


def _numbers(model: nn.Module, labels: Iterable[str]) -> set[int]:
    """Return the numbers of the layers that labels stand in."""
    return {layer_number(model, label) for label in labels if re.search(r"\d", label)}
