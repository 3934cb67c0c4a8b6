"""Checks of saving, of half precision, of compiling, and of the probe."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modgraft as mg
from zoo.case import (
    Case,
    Cell,
    Meaningless,
    Outputs,
    at,
    difference,
    randomise,
    rank_of,
    size,
)
from zoo.check import (
    check,
    edited_everywhere,
    everywhere,
    gradients,
    implanted,
)
from zoo.row import EXAMPLES


@check
def saved(case: Case, cell: Cell) -> None:
    """A saved module, loaded in another copy of the host, is the same to the last bit."""
    with cell.at("all"), tempfile.TemporaryDirectory() as folder:
        host, other = case.host(), case.host()
        everywhere(case, host)
        host.save("m", Path(folder) / "m")
        other.load(Path(folder) / "m")
        other.use("m")
        cell.expect("all", case.run(other), case.run(host, modules="m"), None)


@check
def half(case: Case, cell: Cell) -> None:
    """In bfloat16 a module is born as the identity, and does what the edited weight does."""
    half_case = Case(case.row, torch.bfloat16)
    bare, host = half_case.bare, half_case.host()
    unchanged = half_case.run(half_case.host())
    for path in case.layers:
        if half_case.moves:  # each run rounds its tables once more
            host = half_case.host()
        module = mg.LoRA(rank=rank_of(case.plain.get_submodule(path)))
        with cell.at(path), implanted(host, "m", module, at(path), True) as implant:
            cell.expect(path, half_case.run(host, modules="m"), unchanged, None)
            randomise(implant)
            place: Any = implant.places[0]
            with half_case.edited(path, (place.B @ place.A).detach()):
                truth = half_case.oracle()
            ours = half_case.run(host, modules="m")
            ours = {n: ours[n] - unchanged[n] + bare[n] for n in bare}  # rounded in another way
            off, effect = _far(ours, truth), _far(truth, bare)
            if not off <= 0.25 * effect + 0.02 * _far(truth, {}):
                cell.wrong[path] = f"off by {off:.2g} of {effect:.2g}"


def _far(one: Outputs, other: Outputs) -> float:
    """Return the norm of a difference; of the first alone, where the second has no such output."""
    found = [(v - other.get(n, 0)).nan_to_num(0, 0, 0).norm() for n, v in one.items()]
    return float(torch.stack(found).norm())


@check
def compiled(case: Case, cell: Cell) -> None:
    """One graph runs every composition, as the host runs it that is not compiled.

    As many graphs, where the bare model alone makes more than one.
    """
    count = 0

    def counting(graph: Any, _: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    def compile_(model: nn.Module, whole: bool = True) -> Any:
        torch._dynamo.reset()
        return torch.compile(model, backend=counting, fullgraph=whole)

    bare = case.bare
    try:
        alone = compile_(case.fresh(plain=True))
        case.run(alone), case.run(alone)
        own = count
    except Exception as error:
        raise Meaningless(f"the bare model: {type(error).__name__}") from error
    with cell.at("all"):
        host = case.host()
        everywhere(case, host, "a", 1)
        everywhere(case, host, "b", 2)
        fast, count = compile_(host), 0
        try:
            case.run(fast)
        except torch._dynamo.exc.Unsupported as error:  # in parts it has to be right all the same
            cell.refused["one graph"] = str(error).partition("\n")[0]
            fast, count = compile_(host, whole=False), 0
        for composition in ("a", "0.5*b", "a + b", None):
            host.use(composition)
            cell.expect(f"{composition}", case.run(fast), case.run(host), bare)
        if count > max(1, own) and not cell.refused:
            cell.wrong["graphs"] = f"{count} graphs"


@check
def probed(case: Case, cell: Cell) -> None:
    """``host.probe`` says that something is wrong where it is, and nothing where nothing is."""
    with cell.at("all"):
        host = case.host()
        deltas = everywhere(case, host)
        before = {k: v.clone() for k, v in host.state_dict().items()}
        found = host.probe(case.batch).faults
        if any(not torch.equal(v, before[k]) for k, v in host.state_dict().items()):
            cell.wrong["all"] = "the host is not left as it was"
            return
        truth, bare = case.run(edited_everywhere(case, deltas)), case.bare
        ours, wrong = case.run(host, modules="m"), ""
        if difference(ours, truth) > 3e-3 * difference(truth, bare) + 1e-4 * size(truth):
            wrong = "the host is off the one with edited weights"
        try:
            gradients(host, case.batch)
        except RuntimeError as error:
            wrong = f"training raises {error}"
        with suppress(mg.ModgraftError, Meaningless):
            mixed = case.run(host, modules=["m", *[None] * (EXAMPLES - 1)])
            for i in (0, 1):
                off = difference(case.row_of(mixed, i), case.row_of((bare, ours)[i == 0], i))
                if off > 1e-2 * difference(ours, bare) + 1e-4 * size(bare):
                    wrong = "one composition for each example is wrong"
        if wrong and not found:
            cell.wrong["all"] = f"it says nothing, and {wrong}"
        elif found and not wrong:
            where, faults = next(iter(found.items()))
            cell.wrong["all"] = f"nothing is wrong, and it says of {where}: {faults[0]}"
