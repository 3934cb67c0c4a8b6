"""Checks that each example gets its own: compositions, weights, routes, side inputs."""

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
    hooks,
    randomise,
    rank_of,
    size,
)
from zoo.check import (
    LINEAR,
    SIDE,
    WIDTH,
    by_site,
    check,
    everywhere,
    implanted,
    refusal_allowed,
    unpadded,
)
from zoo.row import EXAMPLES, Batch


@check
def each(case: Case, cell: Cell) -> None:
    """Each example with its own composition is what it is where all have that composition."""
    host, rows = case.host(), ["a", "b", None, "a", "0.5*b"]
    local = case.local
    for module, paths in ((mg.LoRA(rank=1), case.layers), (mg.Adapter(width=3), case.blocks)):

        def one(paths: list[str], where: str, into: Cell, module: mg.Computation = module) -> None:
            with (
                implanted(host, "a", module, at(*paths)) as a,
                implanted(host, "b", module, at(*paths)) as b,
            ):
                if a is None or b is None:  # a refusal is said of the column of that kind
                    return
                randomise(a, 1)
                randomise(b, 2)
                try:
                    alone = {row: case.run(host, modules=row) for row in set(rows)}
                except mg.ModgraftError:
                    return
                ours = case.run(host, modules=rows)
                parts = {
                    n: [case.examples(alone[row][n])[i] for i, row in enumerate(rows)]
                    for n in local
                }
                truth = {n: torch.cat(values, case.row.axis) for n, values in parts.items()}
                into.expect(where, ours, truth, alone[None])

        by_site(cell, paths, one)


@check
def weighted(case: Case, cell: Cell) -> None:
    """Weights for each example are what the sum with those weights is, for each example."""
    host, local = case.host(), case.local
    w = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0], [-1.0, 2.0], [0.25, 1.0]])
    with cell.at("all"):
        everywhere(case, host, "a", 1)
        everywhere(case, host, "b", 2)
        ours = case.run(host, modules=mg.Weighted(["a", "b"], w))
        _expect_rows(case, cell, host, w, ours, local)


def _expect_rows(
    case: Case, cell: Cell, host: mg.Host, w: Tensor, ours: Outputs, local: list[str]
) -> None:
    """Compare each example with the sum of two modules by its weights."""
    for i in range(EXAMPLES):
        one = case.run(host, modules=f"{float(w[i, 0])!r}*a + {float(w[i, 1])!r}*b")
        truth = {n: case.examples(one[n])[i] for n in local}
        bare = {n: case.examples(case.bare[n])[i] for n in local}
        mine = {n: case.examples(ours[n])[i] for n in local}
        effect = difference(truth, bare)
        off = difference(mine, truth)
        if not off <= 3e-3 * effect + 1e-4 * size(truth):
            cell.wrong["all"] = f"example {i} off by {off:.2g} of {effect:.2g}"


@check
def mixture(case: Case, cell: Cell) -> None:
    """A mixture routed by example is, for each, the sum with its router's weights."""
    host, local = case.host(), case.local
    with cell.at("all"):
        everywhere(case, host, "a", 1)
        everywhere(case, host, "b", 2)
        mix = host.implant(
            "mix", mg.Mixture(["a", "b"], router=mg.Soft(level="example"), width=WIDTH),
            active=False,
        )  # fmt: skip
        randomise(mix, 3)
        query = torch.randn(EXAMPLES, WIDTH, generator=torch.Generator().manual_seed(6))
        with torch.no_grad():
            route: Any = mix.places[0].route
            w = route(query).weights
        ours = case.run(host, modules="mix", side={"example": mg.Side(query[:, None])})
        _expect_rows(case, cell, host, w, ours, local)


@check
def tokens(case: Case, cell: Cell) -> None:
    """A mixture routed by token is, at each layer, what a hook with its router's weights is."""
    host = case.host()
    linear = [p for p, s in case.shapes.items() if p in case.layers and len(s) >= 3]
    for path in linear:
        layer = case.plain.get_submodule(path)
        if not isinstance(layer, LINEAR) or rank_of(layer) < 2:
            continue
        one = mg.LoRA(rank=2)
        mixed = mg.Mixture(["a", "b"], router=mg.TopK(1, level="token"))
        with (
            cell.at(path),
            implanted(host, "a", one, at(path), True) as a,
            implanted(host, "b", one, at(path), True) as b,
            implanted(host, "mix", mixed, None, True) as mix,
        ):
            randomise(a, 1)
            randomise(b, 2)
            randomise(mix, 3, 1.0)
            route: Any = mix.places[0].route
            effects = [_effect(case, path, m.places[0]) for m in (a, b)]

            def hook(
                _: nn.Module, args: Any, out: Tensor, route: Any = route, of: Any = effects
            ) -> Tensor:
                w = route.choose(route.map(args[0]), args[0]).weights
                return out + sum(w[..., j : j + 1] * of[j](args[0]) for j in (0, 1))

            ours = case.run(host, modules="mix")
            with hooks([(layer, hook)]):
                truth = case.oracle()
            cell.expect(path, ours, truth, case.bare)


def _effect(case: Case, path: str, place: Any) -> Callable[[Tensor], Tensor]:
    """Return what a change of a layer's weight adds to its output."""
    delta = (place.B @ place.A).detach()
    if "forward" not in case.plain.get_submodule(path).__dict__:
        return lambda x: F.linear(x, delta)

    def patched(x: Tensor) -> Tensor:  # by the forward that was set on it
        bare = case.plain.get_submodule(path).forward(x)
        with case.edited(path, delta):
            return case.plain.get_submodule(path).forward(x) - bare

    return patched


def _rolled(case: Case) -> Batch:
    return case.changed(lambda rows: rows[1:] + rows[:1])


@check
def fusion(case: Case, cell: Cell) -> None:
    """A side input reaches its own example: another order of examples is that order of results.

    A layer that puts out one thing for all examples, or no features, has to refuse one.
    """
    local = case.local
    rolled, bare = _rolled(case), case.bare
    there = case.oracle(rolled)

    def in_turn(values: Outputs) -> Outputs:
        rows = {n: case.examples(values[n]) for n in local}
        return {n: torch.cat([*some[1:], some[0]], case.row.axis) for n, some in rows.items()}

    in_order = in_turn(bare)
    if difference(there, in_order) > 1e-4 * size(bare):
        raise Meaningless("another order of examples is not that order of results")
    side = torch.randn(EXAMPLES, SIDE, WIDTH, generator=torch.Generator().manual_seed(8))
    host = case.host()

    def one(path: str) -> None:
        module = mg.GatedFusion(source="image", dim=WIDTH)
        with implanted(host, "m", module, at(path), True) as implant:
            randomise(implant)
            ours = case.run(host, modules="m", side={"image": mg.Side(side)})
            turned = case.run(host, rolled, modules="m",
                              side={"image": mg.Side(side.roll(-1, 0))})  # fmt: skip
            cell.expect(path, turned, in_turn(ours), in_order)

    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    paths = [
        path
        for path, shape in case.shapes.items()
        if len(shape) == 3
        and shape[case.row.axis] > 1
        and not isinstance(case.plain.get_submodule(path), convolutions)
    ]
    for path in paths:  # alone: a gate behind it could hide what an earlier one did
        with cell.at(path), refusal_allowed(path in case.shared | case.maps):
            one(path)


@check
def convolution(case: Case, cell: Cell) -> None:
    """A convolution over tokens keeps to its example, and sees no later token where none does."""
    local, whole = case.local, unpadded(case)
    rolled = case.changed(lambda rows: [rows[1], *rows[1:]])
    name = next((n for n in ("decoder_input_ids", "input_ids") if n in case.batch), None)
    causal: list[str] = []
    if name is not None:
        words = whole[name].clone()
        words[:, -1] = 5 + (words[:, -1] - 4) % 35  # another word at the end of each text
        later, now = {**whole, name: words}, case.oracle(whole)
        then, tokens = case.oracle(later), words.shape[1]
        by_token = [n for n in local if now[n].dim() == 3 and now[n].shape[1] == tokens]
        causal = [n for n in by_token if torch.allclose(now[n][:, :-1], then[n][:, :-1], atol=1e-4)]
        if not by_token:
            raise Meaningless("what it puts out does not show which tokens see which")
    host = case.host()
    for path in case.blocks:
        module = mg.ConvAdapter(kernel=3)
        with (
            cell.at(path),
            refusal_allowed(path in case.maps),
            implanted(host, "m", module, at(path), not causal) as implant,
        ):
            if implant is None:
                continue  # as it has to be: its output would see later tokens
            randomise(implant)
            ours, other = case.run(host, modules="m"), case.run(host, rolled, modules="m")
            for i in range(1, EXAMPLES):
                leak = difference(case.row_of(other, i), case.row_of(ours, i))
                if leak > 1e-3 * size(case.row_of(ours, i)):
                    cell.wrong[path] = f"example {i} moves by {leak:.2g} with example 0"
            if causal:
                after = case.run(host, later, modules="m")
                before = case.run(host, whole, modules="m")
                leak = difference({n: after[n][:, :-1] for n in causal},
                                  {n: before[n][:, :-1] for n in causal})  # fmt: skip
                if leak > 1e-3 * size(ours):
                    cell.wrong[path] = f"a token sees a later one: {leak:.2g}"
