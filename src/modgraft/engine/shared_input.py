"""Runs layers that read the same input as one: query, key and value with changes of low rank.

The thin product of a low-rank change reads its layer's input once more, forward and backward.
Layers that are called one after another with one input need to read it once, and add their
gradients to one tensor. The first of them that is called computes the outputs of all; the others
find theirs in the call. One that is called with any other input computes its own. Which layers
share an input is data of the architecture (``core/architectures.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modgraft.core.per_example import Each
from modgraft.engine.kernels.linear import low_rank_terms
from modgraft.engine.kernels.low_rank import LowRank
from modgraft.engine.plan import Group
from modgraft.engine.state import STATE, SiteCall, State

Terms = tuple[float, tuple[Tensor | None, ...]]  # s and W, b, B, A


def run(site: SiteCall, group: Group, x: Tensor) -> Tensor | None:
    """Return the layer's output with its changes: found in the call, or computed with the others'.

    None where the layer has to run alone: it reads another input than they do, no gradient is
    wanted, the call is not shared, or none of the others would run in this way.
    """
    left = site.call.outputs.pop(site.layer, None)
    if left is not None:
        of, version, y = left
        return y if of is x and version == x._version else None
    if not torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return None
    own = low_rank_terms(site.layer, x, group.changes)
    if own is None or not site.state.context.under_way(site.call):
        return None
    terms = {site.layer: own}
    for layer in site.state.same_input:
        if layer is not site.layer and (other := _terms(layer, site, x)) is not None:
            terms[layer] = other
    if len(terms) == 1:
        return None
    scales = tuple(s for s, _ in terms.values())
    ys = LowRank.apply(x, scales, *(t for _, tensors in terms.values() for t in tensors))
    for layer, y in zip(terms, ys, strict=False):  # the last output belongs to no layer
        if layer is not site.layer:
            site.call.outputs[layer] = x, x._version, y
    return ys[0]


def _terms(layer: nn.Module, site: SiteCall, x: Tensor) -> Terms | None:
    """Return another layer's arguments of the product, if its composition begins with a change."""
    state: State = layer.__dict__[STATE]
    composition = site.call.composition
    if composition is None or isinstance(composition, Each):
        return None
    groups = state.groups(composition)
    if not groups or groups[0].residual or groups[0].inside or not groups[0].changes:
        return None
    return low_rank_terms(layer, x, groups[0].changes)
