"""Checks of modules that change weights."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

import modgraft as mg
from zoo.case import (
    Case,
    Cell,
    Meaningless,
    at,
    difference,
    randomise,
    size,
)
from zoo.check import (
    by_site,
    check,
    edited_everywhere,
    everywhere,
    implanted,
    lora,
)


@check
def birth(case: Case, cell: Cell) -> None:
    """Modules that start as the identity change no bit, and leave none behind."""
    model = case.fresh()
    bare = case.oracle(model=model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    host = mg.Host(model).eval()
    for module in (mg.LoRA(rank=1), mg.Adapter(width=3)):

        def one(paths: list[str], where: str, into: Cell, module: mg.Computation = module) -> None:
            with suppress(mg.ModgraftError), implanted(host, "m", module, at(*paths)) as implant:
                if implant is not None:  # a refusal is said of the column of that kind
                    into.expect(where, case.run(host, modules="m"), bare, None)

        by_site(cell, case.layers, one)
    with cell.at("after remove"):
        cell.expect("after remove", case.run(host), bare, None)
        after = host.model.state_dict()
        if any(not torch.equal(before[k], after[k]) for k in before):
            cell.wrong["after remove"] = "the host's tensors are not what they were"


@check
def layers(case: Case, cell: Cell) -> None:
    """A LoRA at each layer alone does what its weight, edited by hand, does."""
    host, bare = case.host(), case.bare
    for path in case.layers:
        with cell.at(path), lora(case, host, path) as delta:
            with case.edited(path, delta):
                truth = case.oracle()
            cell.expect(path, case.run(host, modules="m"), truth, bare)


@check
def merged(case: Case, cell: Cell) -> None:
    """What a merge does is what the weight, edited by hand, does; a shared weight refuses it."""
    host, bare = case.host(), case.bare
    users: dict[int, int] = {}
    for _, parameter in case.plain.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    for path in case.layers:
        with cell.at(path), lora(case, host, path) as delta:
            if users[id(case.plain.get_submodule(path).weight)] > 1:
                with suppress(mg.ModgraftError):
                    host.merge("m")
                    cell.wrong[path] = "merged into a weight that another layer shares"
                continue
            with case.edited(path, delta):
                truth = case.oracle()
            cell.expect(path, case.run(host.merge("m")), truth, bare)


@check
def weights(case: Case, cell: Cell) -> None:
    """A LoRA at each single weight of a layer with several does what the edited weight does."""
    host, bare = case.host(), case.bare
    for path, module in case.plain.named_modules():
        for name, value in module.named_parameters(recurse=False):
            whole = value.dim() == 2 or (value.dim() == 3 and len(value) > 1)
            if f"{path}" in case.layers or not whole or min(value.shape[-2:]) < 2:
                continue
            label = f"{path}.{name}" if path else name
            with cell.at(label), implanted(host, "m", mg.LoRA(rank=2), label, True) as implant:
                randomise(implant)
                place: Any = implant.places[0]
                with case.edited(path, place.B @ place.A, name, fresh=True):
                    truth = case.oracle()
                cell.expect(label, case.run(host, modules="m"), truth, bare)
                cell.expect(f"{label}, merged", case.run(host.merge("m")), truth, bare)


@check
def peft(case: Case, cell: Cell) -> None:
    """LoRA at all linear layers is PEFT's with the same factors, where that is θ + BA."""
    import peft as other

    host = case.host()
    with cell.at("all"):
        truth = case.run(edited_everywhere(case, everywhere(case, host)))
        handle = host["m"]
        try:
            config = other.LoraConfig(r=2, lora_alpha=2, target_modules=list(handle.paths))
            theirs = other.get_peft_model(case.fresh(plain=True), config).eval()
            for path, place in zip(handle.paths, handle.places, strict=True):
                layer = theirs.base_model.model.get_submodule(path)
                layer.lora_A["default"].weight.data.copy_(place.A)
                layer.lora_B["default"].weight.data.copy_(place.B)
            found = case.run(theirs)
        except Exception as error:
            raise Meaningless(f"PEFT: {type(error).__name__}: {error}") from error
        if difference(found, truth) > 1e-3 * size(truth):
            raise Meaningless("PEFT is not θ + BA here")
        cell.expect("all", case.run(host, modules="m"), found, case.bare)
