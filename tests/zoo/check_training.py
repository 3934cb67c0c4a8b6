"""Checks of gradients, of recomputing them, and of what training leaves of the host."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

import modgraft as mg
from zoo.case import (
    Case,
    Cell,
    Meaningless,
    outputs,
)
from zoo.check import (
    as_stored,
    check,
    everywhere,
    gradients,
    loss,
)
from zoo.row import EXAMPLES, Batch


def _tiled(case: Case, times: int) -> Batch:
    return case.changed(lambda rows: rows * times)


def _compare(cell: Cell, where: str, ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    off = {n: float((ours[n] - truth[n]).norm()) for n in truth}
    whole = float(torch.stack([g.norm() for g in truth.values()]).norm())
    wrong = {n: d for n, d in off.items() if not d <= 2e-3 * float(truth[n].norm()) + 2e-4 * whole}
    if wrong:
        worst = max(wrong, key=lambda n: wrong[n])
        size = float(truth[worst].norm())
        cell.wrong[where] = (
            f"{len(wrong)} of {len(off)} off, one by {wrong[worst]:.2g} of {size:.2g}"
        )


@check
def gradient(case: Case, cell: Cell) -> None:
    """Gradients are those of ``functional_call`` with θ + BA, with few examples and with many."""
    host = case.host()
    with cell.caught("implanting"):
        everywhere(case, host)
        handle = host["m"]
    if "m" not in host:
        return
    truth: dict[str, Tensor] = {}
    for times in (1, 13):
        with cell.at(f"{times * EXAMPLES} examples"):
            batch = case.batch if times == 1 else _tiled(case, times)
            leaves: dict[str, Tensor] = {}
            new: dict[str, Tensor] = {}
            for k, path in enumerate(handle.paths):
                for name in "AB":
                    value = getattr(handle.places[k], name)
                    leaves[f"places.{k}.{name}"] = value.detach().clone().requires_grad_()
                change = leaves[f"places.{k}.B"] @ leaves[f"places.{k}.A"]
                layer = case.plain.get_submodule(path)
                new[f"{path}.weight"] = layer.weight.detach() + as_stored(layer, change)  # type: ignore[operator]
            try:
                out = functional_call(case.plain, new, (), batch, tie_weights=False)
                loss(outputs(out)).backward()
            except Exception as error:
                raise Meaningless(f"functional_call: {type(error).__name__}: {error}") from error
            truth = {
                n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in leaves.items()
            }
            _compare(cell, f"{times * EXAMPLES} examples", gradients(host, batch), truth)


def _checkpointed(case: Case, cell: Cell, reentrant: bool) -> None:
    if not getattr(case.plain, "supports_gradient_checkpointing", True) or not hasattr(
        case.plain, "gradient_checkpointing_enable"
    ):
        raise Meaningless("the host recomputes nothing")
    if reentrant and getattr(getattr(case.plain, "config", None), "model_type", "") == "wavlm":
        raise Meaningless("the bare model takes all memory there is")
    with cell.at("all"):
        host = case.host()
        host.train()
        everywhere(case, host)
        truth = gradients(host, case.batch)
        try:  # whether the bare model can, when it learns itself
            bare = case.fresh().train().requires_grad_(True)
            bare.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant and hasattr(bare, "enable_input_require_grads"):
                bare.enable_input_require_grads()
            loss(outputs(bare(**case.batch))).backward()
        except Exception as error:
            raise Meaningless(f"the bare model: {type(error).__name__}: {error}") from error
        host.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        _compare(cell, "all", gradients(host, case.batch), truth)


@check
def checkpoint(case: Case, cell: Cell) -> None:
    """Gradients are the same when blocks are recomputed in backward."""
    _checkpointed(case, cell, reentrant=False)


@check
def reentrant(case: Case, cell: Cell) -> None:
    """Gradients are the same when blocks are recomputed in backward, the reentrant way."""
    _checkpointed(case, cell, reentrant=True)


@check
def frozen(case: Case, cell: Cell) -> None:
    """Training leaves every bit of a frozen host as it was, its buffers too."""
    with cell.at("all"):
        model = case.fresh()
        bare = case.oracle(model=model)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        host = mg.Host(model)
        everywhere(case, host)
        host.train()
        for _ in range(2):
            gradients(host, case.batch)
        host.eval()
        host.remove("m")
        cell.expect("all", case.run(host), bare, None)
        after = host.model.state_dict()
        if moved := [k for k in before if not torch.equal(before[k], after[k])]:
            cell.wrong["all"] = f"{len(moved)} tensors of the host moved: {moved[0]}"
