"""Start a prefix from a real text, and fold the MLP that it was trained with."""

from __future__ import annotations

from typing import Any

import torch

from modgraft.computation.prefix import Prefix
from modgraft.core.errors import ModgraftError, an
from modgraft.engine.implant import Implant
from modgraft.engine.inputs.prefix_attention import observed
from modgraft.training.host_like import HostLike


def prefix_from_text(host: HostLike, name: str, **batch: Any) -> None:
    """Set a prefix to the keys and values that the bare host computes for a text of k tokens.

    Li & Liang 2021, section 4.3 and figure 5: real words make a better start than random numbers
    where there is little data. In a causal decoder the prefix then is that text, at positions 0
    to k − 1.

    Args:
        host: where the prefix is implanted.
        name: a ``Prefix`` without an MLP.
        **batch: one text for the host's ``forward``, ``input_ids`` ``[1, k]`` (and
            ``decoder_input_ids`` ``[1, k]``).

    Raises:
        ModgraftError: for another module, a prefix with an MLP, or a text that does not give each
            site k keys.
    """
    places = _places(host, name)
    if places[0].reparametrise is not None:
        raise ModgraftError(
            f"the MLP of {name!r} decides what its keys and values are; start from a text with "
            f"Prefix(length={places[0].length})"
        )
    with torch.no_grad(), observed() as found:
        host(**batch, modules=None)
    starts = []
    for path, place in zip(host[name].paths, places, strict=True):
        start = found.get(host.model.get_submodule(path))
        shape = [] if start is None else list(start[0].shape)
        if start is None or shape[0] != 1 or shape[2] != place.length:
            raise ModgraftError(
                f"{path} sees keys {shape or 'of none'} for this text, where {name!r} needs one "
                f"text of {place.length} tokens [1, heads, {place.length}, d]"
            )
        starts.append(start)
    with torch.no_grad():
        for place, (keys, values) in zip(places, starts, strict=True):
            place.keys.copy_(keys[0].transpose(0, 1))  # [heads, k, d] → [k, heads, d]
            place.values.copy_(values[0].transpose(0, 1))


def fold_prefix(host: HostLike, name: str, into: str) -> Implant:
    """Implant a plain prefix equal to ``name``, whose MLP was only needed for training.

    Args:
        host: where it is implanted.
        name: a ``Prefix(reparametrise=…)``; it stays as it is, and can be trained on.
        into: the name of the new one, which is not put in force; ``host.save(into, …)`` saves it.

    Raises:
        ModgraftError: for another module, or a name in use.
    """
    places = _places(host, name)
    sites = list(host[name].paths)
    plain_one = Prefix(places[0].length, counted=places[0].counted)
    folded = host.implant(into, plain_one, sites, expect=len(sites), active=False)
    with torch.no_grad():
        for place, plain in zip(places, folded.places, strict=True):
            assert isinstance(plain, Prefix)  # noqa: S101
            for tensor, value in zip(plain.plain(), place.plain(), strict=True):
                tensor.copy_(value)
    return folded


def _places(host: HostLike, name: str) -> list[Prefix]:
    places = [place for place in host[name].places if isinstance(place, Prefix)]
    if not places:
        kind = type(host[name].method).__name__
        raise ModgraftError(f"{name!r} is {an(kind)}; this is for mg.Prefix(length=…)")
    return places
