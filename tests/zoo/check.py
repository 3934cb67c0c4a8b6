"""What the checks share: their list, how they implant, and what they edit by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import modgraft as mg
from zoo.case import (
    Case,
    Cell,
    Meaningless,
    Outputs,
    at,
    outputs,
    randomise,
    rank_of,
)
from zoo.row import Batch

Check = Callable[[Case, Cell], None]
CHECKS: dict[str, Check] = {}

LINEAR = (nn.Linear, Conv1D)
SIDE, WIDTH = 4, 6
"""Vectors of a side input for each example, and their width."""


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


@contextmanager
def implanted(
    host: mg.Host, name: str, module: mg.Computation, at: Any, must: bool = False
) -> Iterator[Any]:
    """Implant a module in a ``with`` block, in force where it is named.

    A refusal gives None, or is raised where the module ``must`` go in.
    """
    try:
        implant = host.implant(name, module, at=at, active=False)
    except mg.ModgraftError:
        if must:
            raise
        implant = None
    try:
        yield implant
    finally:
        if name in host:
            host.remove(name)


@contextmanager
def refusal_allowed(where: bool) -> Iterator[None]:
    """Take a refusal in a ``with`` block for what is right, ``where`` nothing else would be."""
    try:
        yield
    except mg.ModgraftError:
        if not where:
            raise


@contextmanager
def lora(case: Case, host: mg.Host, path: str) -> Iterator[Tensor]:
    """Implant a LoRA at one layer as ``m`` in a ``with`` block, which gets its Δ ``[out, in]``."""
    module = mg.LoRA(rank=rank_of(case.plain.get_submodule(path)))
    with implanted(host, "m", module, at(path), True) as implant:
        randomise(implant)
        place = implant.places[0]
        yield (place.B @ place.A).detach()


def everywhere(case: Case, host: mg.Host, name: str = "m", seed: int = 7) -> dict[str, Tensor]:
    """Implant a LoRA at every linear layer that takes one; return each Δ by path."""
    linear = [p for p in case.layers if isinstance(case.plain.get_submodule(p), LINEAR)]
    paths = [p for p in linear if rank_of(case.plain.get_submodule(p)) == 2]
    if not paths:
        raise Meaningless("no linear layer")
    chosen = set(paths)
    implant = host.implant(name, mg.LoRA(rank=2), at=lambda p, _: p in chosen, active=False)
    randomise(implant, seed, 0.1)
    return {
        path: (place.B @ place.A).detach()  # type: ignore[operator]
        for path, place in zip(implant.paths, implant.places, strict=True)
        if path in chosen
    }


def as_stored(layer: nn.Module, delta: Tensor) -> Tensor:
    return delta.T if isinstance(layer, Conv1D) else delta


def edited_everywhere(case: Case, deltas: dict[str, Tensor]) -> nn.Module:
    """Return a copy of the plain model with every Δ added to its layer's weight by hand."""
    model = case.fresh(plain=True)
    for path, delta in deltas.items():
        layer = model.get_submodule(path)
        layer.weight = nn.Parameter(layer.weight.detach() + as_stored(layer, delta))  # type: ignore[operator]
    return model


def by_site(cell: Cell, paths: list[str], one: Callable[[list[str], str, Cell], None]) -> None:
    """Try a check at all sites at once, and one by one only where that does not hold.

    Args:
        cell: what comes of it.
        paths: the sites.
        one: tries some sites; it gets what to call them, and a cell.
    """
    together = Cell()
    with together.at("all"):
        one(paths, "all", together)
    if together.status == "holds":
        cell.holds += len(paths)
        return
    for path in paths:
        with cell.at(path):
            one([path], path, cell)


def unpadded(case: Case) -> Batch:
    """Return the batch with no padding: the first example is the second's once more."""
    return case.changed(lambda rows: [rows[1], *rows[1:]])


def loss(values: Outputs) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    total = torch.zeros(())
    for value in values.values():
        weights = torch.randn(value.shape, generator=generator)
        total = total + (value.nan_to_num(0, 0, 0) * weights).sum()
    return total


def gradients(host: mg.Host, batch: Batch) -> dict[str, Tensor]:
    host.zero_grad()
    torch.manual_seed(0)
    loss(outputs(host(**batch, modules="m"))).backward()
    named = host["m"].named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}
