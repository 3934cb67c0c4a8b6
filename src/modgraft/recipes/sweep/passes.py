"""The runs of a sweep that are modules in one host: as many as can be are trained in one pass."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from modgraft.computation.base import Computation
from modgraft.core.errors import ModgraftError
from modgraft.core.sites import At
from modgraft.host.host import Host
from modgraft.recipes.sweep.result import Cell, told
from modgraft.training.history import History
from modgraft.training.procedures.side_by_side import SHARED, fit_side_by_side
from modgraft.training.randomness import own_randomness
from modgraft.training.settings import Settings


@dataclass(frozen=True)
class Trained:
    """A module that is to be trained: what it is, where it acts, and the settings of its fit."""

    key: str
    cell: Cell
    method: Computation
    at: At | None
    fit: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The module's name in the host."""
        return f"cell_{sha256(self.key.encode()).hexdigest()[:8]}"

    @property
    def shared(self) -> str:
        """What is one for all modules of a pass."""
        return json.dumps([told(self.fit.get(name)) for name in SHARED])


def planned(cells: Mapping[str, Cell], same: Mapping[str, Any]) -> dict[str, Trained]:
    """Take the settings of each run apart: those of the module, its sites, and those of its fit.

    Raises:
        ModgraftError: without a loader or a module, or for a setting that is none.
    """
    if same.get("loader") is None:
        raise ModgraftError("sweep(host, …): give loader=, the batches that every module learns of")
    fixed = {name: value for name, value in same.items() if name not in ("loader", "at_once")}
    return {key: _planned(key, cell, {**fixed, **cell.settings}) for key, cell in cells.items()}


def _planned(key: str, cell: Cell, given: dict[str, Any]) -> Trained:
    module, at = given.pop("module", None), given.pop("at", None)
    if not isinstance(module, Computation):
        if not callable(module):
            raise ModgraftError(
                f"sweep(host, …, module={module!r:.60}): give a module, mg.LoRA(rank=4), or what "
                f"makes one of its settings, mg.LoRA"
            )
        make: Any = module
        module = make(**{n: given.pop(n) for n in signature(make).parameters if n in given})
    known = Settings.__dataclass_fields__
    if unknown := [name for name in given if name not in known]:
        raise ModgraftError(
            f"sweep(host, …): {unknown[0]}= is no setting of {type(module).__name__} and none of "
            f"fit, which takes {', '.join(known)}"
        )
    return Trained(key, cell, module, at, given)


def in_passes(
    host: Host, todo: Sequence[Trained], home: Path | None, label: str, progress: bool,
    loader: Any, at_once: int | None = None,
) -> Iterator[tuple[str, Cell]]:  # fmt: skip
    """Train modules, as many at once as can be, and yield each as its pass has ended.

    Raises:
        ModgraftError: they cannot be trained in one pass.
    """
    groups: dict[str, list[Trained]] = {}
    for one in todo:
        groups.setdefault(one.shared, []).append(one)
    for group in groups.values():
        size = at_once or len(group)
        for start in range(0, len(group), size):
            several = group[start : start + size]
            yield from _in_one_pass(host, several, loader, home, label, progress)


def _in_one_pass(
    host: Host, several: Sequence[Trained], loader: Any, home: Path | None, label: str,
    progress: bool,
) -> Iterator[tuple[str, Cell]]:  # fmt: skip
    there: list[Trained] = []
    try:
        for one in several:
            try:
                with own_randomness():
                    torch.manual_seed(one.cell.seed)
                    host.implant(one.name, one.method, one.at, active=False)
                there.append(one)
            except ModgraftError as error:  # this module is not defined there; others may be
                yield one.key, _cell(one, {}, 0.0, f"{type(error).__name__}: {error}")
        if not there:
            return
        histories = fit_side_by_side(
            host, {one.name: loader for one in there}, label=label, progress=progress, note=False,
            **_settings(there), folder=None if home is None else home / "passes" / _digest(there),
        )  # fmt: skip
        for one in there:
            history = histories[one.name]
            share = history.seconds / len(there)
            yield one.key, _cell(one, _figures(history, one), share, history.error or "")
    finally:
        for one in there:
            host.remove(one.name)


def _settings(there: list[Trained]) -> dict[str, Any]:
    """Return the settings of a pass, by module where they may differ."""
    first, names = there[0].fit, dict.fromkeys(name for one in there for name in one.fit)
    found: dict[str, Any] = {name: first[name] for name in names if name in SHARED}
    for name in names - found.keys():
        default = getattr(Settings, name)
        found[name] = {one.name: one.fit.get(name, default) for one in there}
    return found | {"seed": {one.name: one.cell.seed for one in there}}


def _digest(there: list[Trained]) -> str:
    return sha256(" ".join(one.name for one in there).encode()).hexdigest()[:12]


def _figures(history: History, one: Trained) -> dict[str, float]:
    if history.error:
        return {}
    best = one.fit.get("restore_best") or one.fit.get("patience") is not None
    last = history.best if best else next(iter(history.evaluations[-1:]), None)
    measured = {n: v for n, v in (last or {}).items() if n not in ("step", "seconds")}
    return {**{n: v for n, v in measured.items() if v is not None}, "training loss": history.last}


def _cell(one: Trained, figures: Mapping[str, float], seconds: float, error: str) -> Cell:
    return Cell(one.cell.settings, one.cell.seed, figures, seconds, error)
