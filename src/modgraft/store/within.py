"""Modules of a model that stands under another path, or another head, in this host.

A module that was trained in a ``BertModel`` belongs into any host that holds that model, as
``bert`` under a head or within a module of one's own, and one that was trained in a classifier into
the model alone. The card names the model of a known family that holds all of a module's sites, and
identifies it beside the whole host.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from modgraft.core.errors import CheckpointError
from modgraft.core.patterns import bare, joined
from modgraft.core.roles import known_models
from modgraft.store.fingerprint import differences, fingerprint_of_part, rounded_fingerprints
from modgraft.store.stored import Stored

INNER, PATH = "inner", "path"
"""The entry of a host's fingerprint for the model inside, and in that the entry for its path."""

SKETCHES = "each"
"""The entry that tells the weights apart, by name (:func:`fingerprint.sketches`)."""


def inner(model: nn.Module, sites: Sequence[str], beside: Collection[str]) -> dict[str, Any]:
    """Identify the known model inside a host that holds all of these sites and weights.

    Returns:
        Its fingerprint and its path, as an entry of the host's; nothing where there is none, or it
        is the whole host.
    """
    for path, _, _ in known_models(model):
        if path and sites and all(_relative(path, bare(name)) for name in (*sites, *beside)):
            own = [_relative(path, name) for name in beside]
            said = fingerprint_of_part(model, path, own)
            rounded = rounded_fingerprints(model.get_submodule(path), own)
            return {INNER: {PATH: bare(path), **said, **rounded}}
    return {}


def placed(found: Stored, model: nn.Module) -> Stored:
    """Name modules as this host does, where it is another one and holds the model of theirs.

    Its fingerprint stands in place of the whole host's then, with its path here.

    Raises:
        CheckpointError: if it holds that model several times.
    """
    there = found.card.host
    if "config" not in there or not differences(model, there, found.card.beside, values=False):
        return found
    said: Mapping[str, Any] = there.get(INNER, {PATH: ""} | there)
    before = said[PATH]
    if not all(site for saved in found.card.modules for site in saved.sites):
        return found  # it acts at the input of the whole host
    places = [
        path
        for path, _, _ in known_models(model)
        if not differences(model.get_submodule(path), said, values=False)
    ]
    if len(places) > 1:
        raise CheckpointError(
            f"{found.folder}: the model that the module was trained in is here several times, at "
            f"{', '.join(map(repr, places))}; load it into a host of one of them"
        )
    if not places:
        return found

    def here(name: str) -> str:
        return joined(places[0], _relative(before, name))

    named = found.named(here, here)
    each = {_relative(before, name): text for name, text in sketches_of(there).items()}
    host = {**said, SKETCHES: {name: text for name, text in each.items() if name}}
    return replace(named, card=named.card.model_copy(update={"host": host}), within=places[0])


def sketches_of(there: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the entry :data:`SKETCHES` of a fingerprint; nothing where an older one has none."""
    each = there.get(SKETCHES)
    return each if isinstance(each, Mapping) else {}


def beside_within(found: Stored) -> list[str]:
    """Return what of the host trained with modules, named as in the model that they belong to."""
    return [_relative(found.within, name) for name in found.card.beside]


def _relative(path: str, name: str) -> str:
    """Return a name as it is in the model at ``path``, "" if it is not in there."""
    if not path:
        return name
    return name.removeprefix(f"{path}.") if name.startswith(f"{path}.") else ""
