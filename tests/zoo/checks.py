"""The checks of the zoo: one function a column of the matrix. None of them knows a host by name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.modeling_utils import AttentionInterface
from transformers.pytorch_utils import Conv1D

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
    outputs,
    randomise,
    rank_of,
    size,
    with_first,
)
from zoo.row import EXAMPLES, PROMPT, TOKENS, Batch

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
def _lora(case: Case, host: mg.Host, path: str) -> Iterator[Tensor]:
    """Implant a LoRA at one layer as ``m`` in a ``with`` block, which gets its Δ ``[out, in]``."""
    module = mg.LoRA(rank=rank_of(case.plain.get_submodule(path)))
    with implanted(host, "m", module, at(path), True) as implant:
        randomise(implant)
        place = implant.places[0]
        yield (place.B @ place.A).detach()


def _everywhere(case: Case, host: mg.Host, name: str = "m", seed: int = 7) -> dict[str, Tensor]:
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


def _as_stored(layer: nn.Module, delta: Tensor) -> Tensor:
    return delta.T if isinstance(layer, Conv1D) else delta


def _edited_everywhere(case: Case, deltas: dict[str, Tensor]) -> nn.Module:
    """Return a copy of the plain model with every Δ added to its layer's weight by hand."""
    model = case.fresh(plain=True)
    for path, delta in deltas.items():
        layer = model.get_submodule(path)
        layer.weight = nn.Parameter(layer.weight.detach() + _as_stored(layer, delta))  # type: ignore[operator]
    return model


def _by_site(cell: Cell, paths: list[str], one: Callable[[list[str], str, Cell], None]) -> None:
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


# -- what it is at birth --------------------------------------------------------------------------


@check
def birth(case: Case, cell: Cell) -> None:
    """Modules that start as the identity change no bit, and leave none behind."""
    model = case.fresh()
    bare = case.oracle(model=model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    host = mg.Host(model).eval()
    for module in (mg.LoRA(rank=1), mg.Adapter(width=3)):

        def one(paths: list[str], where: str, into: Cell, module: mg.Computation = module) -> None:
            with implanted(host, "m", module, at(*paths)) as implant:
                if implant is not None:  # a refusal is said of the column of that kind
                    into.expect(where, case.run(host, modules="m"), bare, None)

        _by_site(cell, case.layers, one)
    with cell.at("after remove"):
        cell.expect("after remove", case.run(host), bare, None)
        after = host.model.state_dict()
        if any(not torch.equal(before[k], after[k]) for k in before):
            cell.wrong["after remove"] = "the host's tensors are not what they were"


# -- weights --------------------------------------------------------------------------------------


@check
def layers(case: Case, cell: Cell) -> None:
    """A LoRA at each layer alone does what its weight, edited by hand, does."""
    host, bare = case.host(), case.bare
    for path in case.layers:
        with cell.at(path), _lora(case, host, path) as delta:
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
        with cell.at(path), _lora(case, host, path) as delta:
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
                with case.edited(path, place.B @ place.A, name):
                    truth = case.oracle()
                cell.expect(label, case.run(host, modules="m"), truth, bare)
                cell.expect(f"{label}, merged", case.run(host.merge("m")), truth, bare)


@check
def peft(case: Case, cell: Cell) -> None:
    """LoRA at all linear layers is PEFT's with the same factors, where that is θ + BA."""
    import peft as other

    host = case.host()
    with cell.at("all"):
        truth = case.run(_edited_everywhere(case, _everywhere(case, host)))
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


# -- functions ------------------------------------------------------------------------------------


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
    host, bare = case.host(), case.bare
    for path in paths:
        with cell.at(path), implanted(host, "m", mg.Adapter(width=3), at(path), True) as implant:
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
        with cell.at(path), implanted(host, "m", module, f"{path}[residual]") as implant:
            if implant is not None:  # a refusal is said of the column of blocks
                cell.expect(path, case.run(host, modules="m"), bare, None)


# -- gradients ------------------------------------------------------------------------------------


def _loss(values: Outputs) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    total = torch.zeros(())
    for value in values.values():
        weights = torch.randn(value.shape, generator=generator)
        total = total + (value.nan_to_num(0, 0, 0) * weights).sum()
    return total


def _tiled(case: Case, times: int) -> Batch:
    return case.changed(lambda rows: rows * times)


def _gradients(host: mg.Host, batch: Batch) -> dict[str, Tensor]:
    host.zero_grad()
    _loss(outputs(host(**batch, modules="m"))).backward()
    named = host["m"].named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


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
    with cell.at("implanting"):
        _everywhere(case, host)
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
                new[f"{path}.weight"] = layer.weight.detach() + _as_stored(layer, change)  # type: ignore[operator]
            try:
                out = functional_call(case.plain, new, (), batch, tie_weights=False)
                _loss(outputs(out)).backward()
            except Exception as error:
                raise Meaningless(f"functional_call: {type(error).__name__}: {error}") from error
            truth = {
                n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in leaves.items()
            }
            _compare(cell, f"{times * EXAMPLES} examples", _gradients(host, batch), truth)


def _checkpointed(case: Case, cell: Cell, reentrant: bool) -> None:
    if not getattr(case.plain, "supports_gradient_checkpointing", True) or not hasattr(
        case.plain, "gradient_checkpointing_enable"
    ):
        raise Meaningless("the host recomputes nothing")
    with cell.at("all"):
        host = case.host()
        host.train()
        _everywhere(case, host)
        truth = _gradients(host, case.batch)
        try:
            host.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        except ValueError as error:
            raise Meaningless(str(error)) from error
        batch = case.batch
        if reentrant:  # which gives no gradient to a block whose input has none
            if hasattr(host.model, "enable_input_require_grads"):
                host.model.enable_input_require_grads()
            batch = {n: v.clone().requires_grad_() if isinstance(v, Tensor) and
                     v.is_floating_point() else v for n, v in batch.items()}  # fmt: skip
        _compare(cell, "all", _gradients(host, batch), truth)


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
        _everywhere(case, host)
        host.train()
        for _ in range(2):
            _gradients(host, case.batch)
        host.eval()
        host.remove("m")
        cell.expect("all", case.run(host), bare, None)
        after = host.model.state_dict()
        if moved := [k for k in before if not torch.equal(before[k], after[k])]:
            cell.wrong["all"] = f"{len(moved)} tensors of the host moved: {moved[0]}"


# -- examples -------------------------------------------------------------------------------------


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

        _by_site(cell, paths, one)


@check
def weighted(case: Case, cell: Cell) -> None:
    """Weights for each example are what the sum with those weights is, for each example."""
    host, local = case.host(), case.local
    w = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0], [-1.0, 2.0], [0.25, 1.0]])
    with cell.at("all"):
        _everywhere(case, host, "a", 1)
        _everywhere(case, host, "b", 2)
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
        _everywhere(case, host, "a", 1)
        _everywhere(case, host, "b", 2)
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
            deltas = [(m.places[0].B @ m.places[0].A).detach() for m in (a, b)]

            def hook(
                _: nn.Module, args: Any, out: Tensor, route: Any = route, d: Any = deltas
            ) -> Tensor:
                w = route.choose(route.map(args[0]), args[0]).weights
                return out + sum(w[..., j : j + 1] * F.linear(args[0], d[j]) for j in (0, 1))

            ours = case.run(host, modules="mix")
            with hooks([(layer, hook)]):
                truth = case.oracle()
            cell.expect(path, ours, truth, case.bare)


def _rolled(case: Case) -> Batch:
    return case.changed(lambda rows: rows[1:] + rows[:1])


@check
def fusion(case: Case, cell: Cell) -> None:
    """A side input reaches its own example: another order of examples is that order of results."""
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
        with cell.at(path):
            one(path)


@check
def convolution(case: Case, cell: Cell) -> None:
    """A convolution over tokens keeps to its example, and sees no later token where none does."""
    local, whole = case.local, _unpadded(case)
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
        with cell.at(path), implanted(host, "m", module, at(path), not causal) as implant:
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


# -- prompts --------------------------------------------------------------------------------------


def _taught(case: Case, vectors: Tensor) -> nn.Module:
    """Return a copy of the plain model in whose table the ids ``PROMPT`` are ``vectors``.

    A prompt is words that nobody wrote: the oracle writes them, and calls the model as ever.
    """
    model = case.fresh(plain=True)
    try:
        table = model.get_input_embeddings()
        words = torch.tensor([PROMPT])
        with torch.no_grad():
            scale = table(words)[0] / table.weight[words[0]]  # tables that scale what they find
            new = table.weight.clone()
            new[words[0]] = vectors / scale
    except Exception as error:
        raise Meaningless("reads no text") from error
    if "input_ids" not in case.batch:
        raise Meaningless("reads no text")
    same, taught = table.weight, nn.Parameter(new, requires_grad=False)
    for layer in model.modules():
        if isinstance(layer, nn.Embedding) and layer.weight is same:  # not the logits' layer
            layer.weight = taught
    return model


def _with_prompt(case: Case, batch: Batch) -> Batch:
    """Return a batch in which the ids ``PROMPT`` stand before each text."""
    words, new = batch["input_ids"], dict(batch)
    length = words.shape[1]
    first = int(case.row.class_token)
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == words.shape:
            ones = {"attention_mask": 1}.get(name, 0)
            put = value.new_full((len(words), len(PROMPT)), ones)
            if name == "input_ids":
                put = torch.tensor([PROMPT]).expand(len(words), -1)
            elif name == "decoder_input_ids":
                continue
            new[name] = torch.cat([value[:, :first], put, value[:, first:]], 1)
    assert new["input_ids"].shape[1] == length + len(PROMPT)
    return new


def _without_prompt(case: Case, values: Outputs, length: int, of: Outputs) -> Outputs:
    """Take the prompt's positions out of what the oracle put out."""
    first = int(case.row.class_token)
    found = {}
    for name, value in values.items():
        if name not in of:
            continue
        for axis in range(1, value.dim()):
            if value.shape[axis] == length + len(PROMPT) and of[name].shape[axis] == length:
                keep = [*range(first), *range(first + len(PROMPT), length + len(PROMPT))]
                value = value.index_select(axis, torch.tensor(keep))
        found[name] = value
    return found


def _unpadded(case: Case) -> Batch:
    """Return the batch with no padding: the first example is the second's once more."""
    return case.changed(lambda rows: [rows[1], *rows[1:]])


def _prompted(case: Case) -> tuple[mg.Host, Tensor]:
    host = case.host()
    implant = host.implant("p", mg.SoftPrompt(length=len(PROMPT)), active=False)
    randomise(implant, 5, 0.5)
    return host, implant.places[0].phi.detach().clone()  # type: ignore[union-attr]


@check
def prompt(case: Case, cell: Cell) -> None:
    """A soft prompt is three words that nobody wrote; a padded text is what it is alone."""
    if "input_ids" not in case.batch:
        raise Meaningless("reads no text")
    with cell.at("all"):
        host, vectors = _prompted(case)
        taught, batch = _taught(case, vectors), _unpadded(case)
        try:
            truth = case.run(taught, _with_prompt(case, batch))
        except Exception as error:
            raise Meaningless(f"the bare model: {type(error).__name__}: {error}") from error
        ours = case.run(host, batch, modules="p")
        bare = case.oracle(batch)
        kept = _without_prompt(case, truth, batch["input_ids"].shape[1], ours)
        cell.expect("all", ours, kept, {n: bare[n] for n in kept})
        _expect_alone(case, cell, host)


def _expect_alone(case: Case, cell: Cell, host: mg.Host) -> None:
    """Compare the padded first example with what it is alone, where the bare host allows it."""
    mask = case.batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        return
    kept = mask[0].bool().nonzero()[:, 0]
    alone = {n: v[:1, kept] if v.shape == mask.shape and n != "decoder_input_ids" else v[:1]
             for n, v in case.batch.items()}  # fmt: skip

    def off(model: nn.Module, **how: Any) -> float:
        one, all_ = case.run(model, alone, **how), case.run(model, **how)
        found = 0.0
        for name, value in one.items():
            if name not in all_ or value.dim() != all_[name].dim() or len(value) != 1:
                continue
            mine = all_[name][:1]
            if mine.dim() > 1 and mine.shape[1] == TOKENS and value.shape[1] == len(kept):
                mine = mine[:, kept]
            if mine.shape == value.shape:
                found = max(found, difference({name: mine}, {name: value}) / size({name: value}))
        return found

    if off(case.plain) < 1e-4 and (share := off(host, modules="p")) > 1e-3:
        cell.wrong["padded"] = f"a padded text is {share:.2g} off what it is alone"


# -- generating -----------------------------------------------------------------------------------


def _generated(case: Case, model: Any, batch: Batch, cache: bool, **how: Any) -> Outputs:
    """Return the scores of four words that a model writes, each without the words before it."""
    known = {k: v for k, v in batch.items() if k != "decoder_input_ids"}
    out = model.generate(
        **known, **how, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1,
        use_cache=cache, output_logits=True, return_dict_in_generate=True,
        suppress_tokens=[*PROMPT, 41, 42, 43, 44],
    )  # fmt: skip
    return {"scores": torch.stack(out.logits).nan_to_num(0, 0, 0)}


def _can_generate(case: Case) -> None:
    can = getattr(case.plain, "can_generate", None)
    if can is None or not can():
        raise Meaningless("writes no text")


def _written(case: Case, model: Any, batch: Batch, cache: bool) -> Outputs:
    try:
        return _generated(case, model, batch, cache)
    except Exception as error:
        raise Meaningless(f"the bare model: {type(error).__name__}: {error}") from error


@check
def generate(case: Case, cell: Cell) -> None:
    """What is written is what the model with edited weights writes, with a cache and without."""
    _can_generate(case)
    host = case.host()
    with cell.at("implanting"):
        deltas = _everywhere(case, host)
    if "m" not in host:
        return
    edited = _edited_everywhere(case, deltas)
    for cache in (True, False):
        where = "cached" if cache else "not cached"
        with cell.at(where):
            bare = _written(case, case.fresh(plain=True), case.batch, cache)
            truth = _written(case, edited, case.batch, cache)
            ours = _generated(case, host, case.batch, cache, modules="m")
            cell.expect(where, ours, truth, bare)


@check
def prompted(case: Case, cell: Cell) -> None:
    """What is written after a prompt is what follows three words that nobody wrote."""
    _can_generate(case)
    if "input_ids" not in case.batch:
        raise Meaningless("reads no text")
    for cache in (True, False):
        where = "cached" if cache else "not cached"
        with cell.at(where):
            host, vectors = _prompted(case)
            taught, batch = _taught(case, vectors), _unpadded(case)
            bare = _written(case, case.fresh(plain=True), batch, cache)
            truth = _written(case, taught, _with_prompt(case, batch), cache)
            ours = _generated(case, host, batch, cache, modules="p")
            for values in (ours, truth, bare):  # the words that the oracle was taught
                values["scores"][..., list(PROMPT)] = 0
            cell.expect(where, ours, truth, bare)


def _attends(case: Case) -> bool:
    """Return whether the plain model asks transformers' registry for a function that attends."""
    asked, before = [], AttentionInterface.get_interface

    def ask(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return before(*args, **kwargs)

    AttentionInterface.get_interface = ask  # type: ignore[method-assign]
    try:
        case.oracle()
    finally:
        AttentionInterface.get_interface = before  # type: ignore[method-assign]
    return bool(asked)


@check
def prefix(case: Case, cell: Cell) -> None:
    """A prefix acts, in each example as alone, and in what is written cached as not cached."""
    if not _attends(case):
        raise Meaningless("no attention of transformers")
    with cell.at("all"):
        host = case.host()
        for seed, name in enumerate("ab"):
            randomise(host.implant(name, mg.Prefix(length=2), active=False), seed, 1.0)
        rows = ["a", "b", None, "a", "a >> b"]
        alone = {row: case.run(host, modules=row) for row in rows}
        if difference(alone["a"], case.bare) <= 1e-5 * size(case.bare):
            cell.wrong["all"] = "no effect"
            return
        ours = case.run(host, modules=rows)
        truth = {n: torch.cat([case.examples(alone[r][n])[i] for i, r in enumerate(rows)],
                              case.row.axis) for n in case.local}  # fmt: skip
        cell.expect("each", ours, truth, alone[None])
    if cell.status == "holds" and hasattr(case.plain, "generate"):
        with cell.at("generate"):
            _can_generate(case)
            bare = _written(case, case.fresh(plain=True), case.batch, True)
            slow = _written(case, case.fresh(plain=True), case.batch, False)
            if difference(bare, slow) > 1e-3 * size(bare):
                return
            one, two = (_generated(case, host, case.batch, c, modules="a") for c in (True, False))
            cell.expect("generate", one, two, bare)


# -- stored, in half precision, compiled ----------------------------------------------------------


@check
def saved(case: Case, cell: Cell) -> None:
    """A saved module, loaded in another copy of the host, is the same to the last bit."""
    with cell.at("all"), tempfile.TemporaryDirectory() as folder:
        host, other = case.host(), case.host()
        _everywhere(case, host)
        host.save("m", Path(folder) / "m")
        other.load(Path(folder) / "m")
        other.use("m")
        cell.expect("all", case.run(other), case.run(host, modules="m"), None)


@check
def half(case: Case, cell: Cell) -> None:
    """In bfloat16 a module is born as the identity, and does what the edited weight does."""
    dtype = torch.bfloat16
    batch = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
             for k, v in case.batch.items()}  # fmt: skip
    half_case = Case(case.row)
    half_case.batch = batch
    half_case.__dict__["plain"] = plain = case.fresh(plain=True).to(dtype)
    bare, host = half_case.bare, mg.Host(case.fresh().to(dtype)).eval()
    unchanged = half_case.run(host)
    for path in case.layers:
        module = mg.LoRA(rank=rank_of(plain.get_submodule(path)))
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
    """One graph runs every composition, as the host runs it that is not compiled."""
    count = 0

    def counting(graph: Any, _: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    def compile_(model: nn.Module) -> Any:
        torch._dynamo.reset()
        return torch.compile(model, backend=counting, fullgraph=True)

    bare = case.bare
    try:
        case.run(compile_(case.fresh(plain=True)))
    except Exception as error:
        raise Meaningless(f"the bare model: {type(error).__name__}") from error
    with cell.at("all"):
        host = case.host()
        _everywhere(case, host, "a", 1)
        _everywhere(case, host, "b", 2)
        fast, count = compile_(host), 0
        for composition in ("a", "0.5*b", "a + b", None):
            host.use(composition)
            cell.expect(f"{composition}", case.run(fast), case.run(host), bare)
        if count > 1:
            cell.wrong["graphs"] = f"{count} graphs"


@check
def probed(case: Case, cell: Cell) -> None:
    """``host.probe`` says that something is wrong where it is, and nothing where nothing is."""
    with cell.at("all"):
        host = case.host()
        deltas = _everywhere(case, host)
        before = {k: v.clone() for k, v in host.state_dict().items()}
        found = host.probe(case.batch).faults
        if any(not torch.equal(v, before[k]) for k, v in host.state_dict().items()):
            cell.wrong["all"] = "the host is not left as it was"
            return
        truth, bare = case.run(_edited_everywhere(case, deltas)), case.bare
        ours, wrong = case.run(host, modules="m"), ""
        if difference(ours, truth) > 3e-3 * difference(truth, bare) + 1e-4 * size(truth):
            wrong = "the host is off the one with edited weights"
        try:
            _gradients(host, case.batch)
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
