"""The roles of a host's parts: those of the known models in it, else what names and shapes say.

A host may be a known model, or hold one: a wrapper of one's own, a model with PEFT's layers, an eye
beside a language model. Each known model in it brings the roles of its family. Where there is a
language model the roles are its, and those of a tower that reads something else have its sense
before them: ``"query"``, ``"vision.query"``. In a host without one they are the first tower's,
unless what is around the known towers attends too: that is the model then, with guessed roles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from modgraft.core.architectures import FAMILIES
from modgraft.core.family import Family
from modgraft.core.guesses import guess
from modgraft.core.patterns import joined, pattern

_FIRST = ("", "vision", "audio")


@dataclass(frozen=True)
class Roles:
    """Role → patterns of paths in a host, in which ``*`` is a layer's number.

    Attributes:
        patterns: in the order in which tables show them; some may match nothing.
        guessed: whether the host is of no known family, and they follow from names and shapes.
    """

    patterns: Mapping[str, tuple[str, ...]]
    guessed: bool = False

    def __str__(self) -> str:
        if not self.patterns:
            return "it is of no known family, so it has paths and types but no roles"
        how = ", guessed from names and shapes" if self.guessed else ""
        return f"its roles{how}: {', '.join(self.patterns)}"


def roles_of(model: nn.Module) -> Roles:
    """Return the roles of a host's parts."""
    known = list(known_models(model))
    if not known:
        return Roles(guess(model), guessed=True)
    senses = [family.sense for _, family, _ in known]
    plain = next((sense for sense in _FIRST if sense in senses), senses[0])
    around = guess(model, [path for path, *_ in known]) if plain else {}
    found: dict[str, tuple[str, ...]] = {}
    if "query" in around or "attention" in around:  # towers beside a model of no known family
        plain, found = "", dict(around)
    for path, family, config in sorted(known, key=lambda each: each[1].sense != plain):
        before = "" if family.sense == plain else f"{family.sense}."
        for role, patterns in family.roles(config).items():
            more = tuple(joined(path, each) for each in patterns)
            found[before + role] = found.get(before + role, ()) + more
    return Roles(found, guessed=bool(around) and not plain)


def same_input(model: nn.Module) -> list[tuple[str, ...]]:
    """Return groups of patterns: the layers of one group in one parent read the same input."""
    return [
        tuple(joined(path, each) for each in patterns)
        for path, family, _ in known_models(model)
        for patterns in family.same_input()
    ]


def family_of(model: nn.Module) -> Family | None:
    """Return the family that a model's class declares as ``family``, or that a Hugging Face model
    is of by its ``config.model_type``.

    None for any other.
    """
    if isinstance(own := getattr(type(model), "family", None), Family):
        return own
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return next((family for family in FAMILIES if kind in family.types), None)


def known_models(model: nn.Module) -> Iterator[tuple[str, Family, Any]]:
    """Yield the models of a known family in ``model``, with path and config: itself, or those that
    it holds."""
    seen: set[nn.Module] = set()

    def within(path: str, module: nn.Module) -> Iterator[tuple[str, Family, Any]]:
        if module in seen:
            return
        seen.add(module)
        family = family_of(module)
        if family is not None and _is_laid_out_as(family, module):
            yield path, family, module.config
            return
        for name, child in module.named_children():
            yield from within(joined(path, name), child)

    return within("", model)


def _is_laid_out_as(family: Family, module: nn.Module) -> bool:
    """Return whether a model's blocks are where its family has them: its head's are elsewhere."""
    block = pattern(family.block, numbers=True)
    return any(block.matches(path) for path, _ in module.named_modules())
