"""Merges a composition of weight changes into a copy of a model: θ + Σ w·Δ at each site."""

from __future__ import annotations

import torch
from torch import nn

from modgraft.computation.base import Computation, InputComposition, ParameterComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.expression import Expression
from modgraft.core.layers import compute_now
from modgraft.core.offloaded import present
from modgraft.core.sites import find
from modgraft.engine.copies import copied
from modgraft.engine.fast_paths import take_fast_paths
from modgraft.engine.frozen import let_go
from modgraft.engine.implant import Implants
from modgraft.engine.inputs.padding import count_padding_too
from modgraft.engine.kernels.functional_call import new_weights, write
from modgraft.engine.kernels.linear import Change
from modgraft.engine.own_forward import check_copies
from modgraft.engine.served_weight import unwatch_forwards
from modgraft.host.compositions import check_one
from modgraft.routing.mixture import Mixture


def merged(model: nn.Module, implants: Implants, composition: Expression | None) -> nn.Module:
    """Return a copy of ``model`` with ``composition`` merged into its weights.

    Args:
        model: the host's.
        implants: the modules in it.
        composition: what to merge; None is the bare host.

    Raises:
        ModgraftError: if the merge would not be exact, because a module is no change of weights, or
            changes a weight that another layer shares.
    """
    check_one(composition)
    weights = {} if composition is None else composition.weights()
    for name in weights:
        _check_merges(name, implants.computation(name))
    changes: dict[str, list[Change]] = {}
    for name, weight in weights.items():
        for label, place in implants.at_sites(name):
            assert isinstance(place, ParameterComposition)  # noqa: S101
            site = find(model, label)[0]
            change = Change(place, weight, site.part, site.parameter)
            changes.setdefault(site.path, []).append(change)
    check_copies(model, {model.get_submodule(path) for path in changes})
    plain = copied(model)
    take_fast_paths(plain)
    unwatch_forwards(plain)
    count_padding_too(plain)
    let_go(plain)
    with torch.no_grad(), present(plain):
        for path, here in changes.items():
            # every Δ is relative to the bare host's weight, and is added to that
            compute_now(layer := model.get_submodule(path))
            write(plain, path, new_weights(layer, here))
    return plain


def _check_merges(name: str, method: Computation) -> None:
    if isinstance(method, ParameterComposition):
        return
    does = "computes on activations, and no weight of the host has its effect"
    if isinstance(method, InputComposition):
        does = "puts vectors before what is read, and no weight of the host does that"
    elif isinstance(method, Mixture):
        does = "weighs modules at each call; merge a sum of those that change weights"
    raise ModgraftError(
        f"{name!r} cannot be merged: {type(method).__name__} {does}; leave it out, or keep it "
        f"implanted"
    )
