"""Checks of modules that are functions of a layer's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modgraft as mg
from zoo.case import (
    Case,
    Cell,
    Meaningless,
    Outputs,
    at,
    difference,
    first_of,
    hooks,
    randomise,
    with_first,
)
from zoo.check import check, implanted, refusal_allowed


def _hooked(case: Case, path: str, function: Callable[[Tensor], Tensor]) -> tuple[Outputs, int]:
    """Run the plain copy with a function of one layer's output; also say how often it ran."""
    count = 0

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        nonlocal count
        first = first_of(out)
        if first is None:
            raise Meaningless("puts out no tensor")
        count += 1
        return with_first(out, function(first))

    with hooks([(case.plain.get_submodule(path), hook)]):
        return case.oracle(), count


def _adapters(case: Case, cell: Cell, paths: list[str]) -> None:
    host, bare, module = case.host(), case.bare, mg.Adapter(width=3)
    for path in paths:
        # there is no output, or no features in it, for an adapter to act on
        nothing = path not in case.shapes or path in case.maps
        with (
            cell.at(path),
            refusal_allowed(nothing),
            implanted(host, "m", module, at(path), True) as implant,
        ):
            randomise(implant)
            place: Any = implant.places[0]

            def adapter(y: Tensor, place: Any = place) -> Tensor:
                return y + place.up(F.relu(place.down(y)))

            ours = case.run(host, modules="m")
            truth, ran = _hooked(case, path, adapter)
            cell.expect(path, ours, truth, bare)
            if not ran and _is_read(case, path):
                cell.wrong[path] = "the layer is never called, and nothing is said"


def _is_read(case: Case, path: str) -> bool:
    """Return whether a layer's weight changes what the host puts out."""
    weight = getattr(case.plain.get_submodule(path), "weight", None)
    if not isinstance(weight, Tensor):
        return False
    with case.edited(path, torch.ones_like(weight)):
        return difference(case.oracle(), case.bare) > 0


@check
def adapters(case: Case, cell: Cell) -> None:
    """An adapter after each layer does what a forward hook does."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    paths = [p for p in case.layers if not isinstance(case.plain.get_submodule(p), convolutions)]
    _adapters(case, cell, paths)


@check
def blocks(case: Case, cell: Cell) -> None:
    """An adapter after each block, attention, feed-forward and norm does what a hook does."""
    _adapters(case, cell, case.blocks)


@check
def residual(case: Case, cell: Cell) -> None:
    """An adapter in a block's residual, where it has one, changes no bit at birth."""
    taking: set[str] = set()

    def look(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            first = first_of(out)
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            if any(v.is_floating_point() and first is not None and v.shape == first.shape
                   for v in given):  # fmt: skip
                taking.add(path)

        return hook

    with hooks(((case.plain.get_submodule(p), look(p)) for p in case.blocks), with_kwargs=True):
        case.oracle()
    host = case.host()
    bare = case.run(host)
    for path in sorted(taking):
        module = mg.Adapter(width=3)
        with (
            cell.at(path),
            refusal_allowed(path in case.maps),
            implanted(host, "m", module, f"{path}[residual]") as implant,
        ):
            if implant is not None:  # a refusal is said of the column of blocks
                cell.expect(path, case.run(host, modules="m"), bare, None)
