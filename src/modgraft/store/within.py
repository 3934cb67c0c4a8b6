"""Modules of a model that stands under another path, or another head, in this host.

A module that was trained in a ``BertModel`` belongs into any host that holds that model, as
``bert`` under a head or within a module of one's own, and one that was trained in a classifier into
the model alone. The card names the model of a known family that holds all of a module's sites, and
identifies it beside the whole host.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from modgraft.core.errors import CheckpointError
from modgraft.core.patterns import bare, joined
from modgraft.core.roles import known_models
from modgraft.engine.own_forward import own_class
from modgraft.store.fingerprint import (
    differences,
    fingerprint,
    fingerprint_of_part,
    means_the_same,
    rounded_fingerprints,
    sketches,
)
from modgraft.store.stored import Stored

INNER, PATH = "inner", "path"
"""The entry of a host's fingerprint for the model inside, and in that the entry for its path."""

SKETCHES = "each"
"""The entry that tells the weights apart, by name (:func:`modgraft.store.fingerprint.sketches`)."""


def inner(model: nn.Module, sites: Sequence[str], beside: Collection[str]) -> dict[str, Any]:
    """Identify the smallest part of a host that holds all of these sites and weights, of a model of
    a known family and what is around it, such as its head.

    Returns:
        Its fingerprint and its path, as an entry of the host's; nothing where there is none, or it
        is the whole host.
    """
    known = [path.split(".") for path, _, _ in known_models(model)]
    around = [".".join(path[:n]) for path in known for n in range(len(path), 0, -1)]
    for path in around:
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
    said: dict[str, Any] = dict(there.get(INNER, {PATH: ""} | there))
    before = said[PATH]
    if not all(site for saved in found.card.modules for site in saved.sites):
        return found  # it acts at the input of the whole host
    each = {_relative(before, name): text for name, text in sketches_of(there).items()}
    said[SKETCHES] = {name: text for name, text in each.items() if name}
    beside = [_relative(before, name) for name in found.card.beside]
    fits = {
        path: _fitting(model.get_submodule(path), said, beside) for path in _models(model, said)
    }
    places = [path for path, fit in fits.items() if fit is not None]
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
    host = fits[places[0]]
    return replace(named, card=named.card.model_copy(update={"host": host}), within=places[0])


def _models(model: nn.Module, said: Mapping[str, Any]) -> list[str]:
    """Return the paths of the models that may be the one of this fingerprint."""
    known = [path for path, _, _ in known_models(model)]
    kind = said.get("architecture")
    every = model.named_modules()
    return [*dict.fromkeys([*known, *(p for p, m in every if own_class(m).__name__ == kind)])]


def _fitting(
    model: nn.Module, said: dict[str, Any], beside: Collection[str]
) -> dict[str, Any] | None:
    """Return the fingerprint that a model is held against: this one, if their outlines agree.

    Either may lack a part at the end, as BERT's pooler, of which a head that reads every token has
    no use. Then what both have is compared, weight by weight, and what is here counts as the rest.
    """
    if not differences(model, said, values=False):
        return said
    here = fingerprint(model, beside)
    if here["architecture"] != said["architecture"] or not all(
        _may_agree(name, theirs, here[part][name])
        for part in ("config", "settings")
        for name, theirs in said[part].items()
        if name in here[part]
    ):
        return None
    ours, theirs = sketches(model, beside), said[SKETCHES]
    both = ours.keys() & theirs.keys()
    lacks_some = ours.keys() != theirs.keys()
    if not (lacks_some and both and all(_ends_with_more(names, both) for names in (ours, theirs))):
        return None
    same = all(_hash(ours[name]) == _hash(theirs[name]) for name in both)
    parts = ("shape", "config", "settings", *(("weights", "buffers") if same else ()))
    counts = {part: here[part] for part in parts}
    return said | counts | {SKETCHES: {name: theirs[name] for name in both}}


def _may_agree(name: str, there: Any, here: Any) -> bool:
    """Return whether what is said of some layers, and of those and others, may mean the same."""
    if name.endswith((" by layer", " in their order")):  # a hash over all
        return True
    if isinstance(there, list) and isinstance(here, list):
        return {*there} <= {*here} or {*here} <= {*there}
    return means_the_same(name, there, here)


def _ends_with_more(names: Iterable[str], both: Collection[str]) -> bool:
    """Return whether all that a model has beside some weights is in whole parts, its last ones."""
    parts = list(dict.fromkeys(name.partition(".")[0] for name in names))
    common = {name.partition(".")[0] for name in both}
    more = {name.partition(".")[0] for name in names if name not in both}
    return not more & common and {*parts[len(parts) - len(more) :]} == more


def _hash(sketch: str) -> str:
    return sketch.partition(":")[0]


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
