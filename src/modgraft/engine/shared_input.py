"""Layers that share an input, as one: query, key and value with their changes of low rank.

A module's thin product passes over its layer's input once more, forward and backward. Layers that
are called one after another with one input need that pass once, and add their gradients to one
tensor. The first of them that is called computes all, and the others find their outputs in the
call; one that is called with anything but that input computes its own then. Which layers share an
input is data of the architecture (``anatomy``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modgraft.core.per_example import Each
from modgraft.engine.kernels.linear import LowRank, of_low_rank

if TYPE_CHECKING:
    from modgraft.engine.plan import Group
    from modgraft.engine.run import SiteCall, State


def computed(site: SiteCall, group: Group, x: Tensor) -> Tensor | None:
    """The output of ``site`` with its changes: found in the call, or computed now with the others'.

    None where it has to run alone: it gets another input than they do, no gradient is wanted, there
    is no call in which to leave something, or none of the others would run in this way.
    """
    left = site.call.outputs.pop(_key(site.host), None)
    if left is not None:
        of, version, y = left
        return y if of is x and version == x._version else None
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not site.state.context.under_way(site.call):
        return None
    own = of_low_rank(site.host, site.forward, x, group.changes)
    if own is None:
        return None
    some = {site.host: own}
    for layer in site.state.beside:
        if layer is not site.host and (other := _of(layer, site, x)) is not None:
            some[layer] = other
    if len(some) == 1:
        return None
    scales = tuple(s for s, _ in some.values())
    ys = LowRank.apply(x, scales, *(t for _, tensors in some.values() for t in tensors))
    for layer, y in zip(some, ys, strict=False):  # the last of them is no layer's
        if layer is not site.host:
            site.call.outputs[_key(layer)] = x, x._version, y
    return ys[0]


def _of(
    layer: nn.Module, site: SiteCall, x: Tensor
) -> tuple[float, tuple[Tensor | None, ...]] | None:
    """The share of a layer beside ``site``, where its composition begins with such a change."""
    state: State = layer.__dict__["_modgraft_state"]
    composition = site.call.composition
    if composition is None or isinstance(composition, Each):
        return None
    plan = state.plan(composition)
    if not plan or plan[0].shifts or plan[0].inner or not plan[0].changes:
        return None
    return of_low_rank(layer, type(layer).__mro__[1].forward, x, plan[0].changes)


def _key(layer: nn.Module) -> tuple[str, int]:
    return "together", id(layer)
