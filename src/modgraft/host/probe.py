"""``host.probe(batch)``: whether the modules of a host do there what they are meant to do.

A stranger's model may call a layer in ways that no library foresees: read its weight and never
call it, run another forward than its class has, put the batch second. One batch shows it before
hours of training do. It is run as the bare host, once more with its first example changed, and
with each module alone. The module's parameters are made random for the while, since one that is
newly built has no effect. What comes of it is compared with what must come of it:

    acts      the layer puts out something else than it does by itself, on the same input
    learns    a gradient reaches the module there
    examples  the axis along which the layer's output changes where the first example does
    merged    the layer puts out what its weight θ + Δ does, and so does the whole host
    each      modules=["a", None, …] is "a" for the first example, and the bare host for the others

The bare host is itself compared with the model whose layers have their own classes again.

The host is left as it was to the last bit: weights that its forward writes, random numbers,
buffers and attributes. What a forward changes outside of its model, each of these calls changes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import is_parametrized
from transformers import Cache

from modgraft.computation.base import Computation, FunctionComposition, ParameterComposition
from modgraft.core.errors import ModgraftError, SiteError
from modgraft.core.layers import STATE, computed, feature_axis, stored
from modgraft.core.offloaded import is_offloaded
from modgraft.core.sites import WEIGHTED, Site, find, joined
from modgraft.core.tensors import rebuilt, tensors_in
from modgraft.engine.batch import lists_in
from modgraft.engine.frozen import what_moves
from modgraft.engine.graft import restored
from modgraft.engine.implant import Implants
from modgraft.engine.kernels.functional_call import new_weights, with_tensors
from modgraft.engine.kernels.linear import Change
from modgraft.engine.own_forward import PATCHED
from modgraft.engine.served_weight import kept_elsewhere
from modgraft.engine.twin import REFUSALS, all_steps
from modgraft.engine.writes import storage_of, taken_back
from modgraft.host.measure import (
    Seen,
    apart,
    as_it_was,
    changed,
    distance,
    first_float,
    floats,
    moved,
    watched,
)
from modgraft.host.probe_result import Probe, Probed, Verdict, percent

NOISE = 0.1  # what is added to a module's parameters: as large as a trained module's

Run = Callable[[Mapping[str, Any], Any], Any]

New = dict[str, dict[str, Tensor]]
"""By a layer's path, its new weights by their names in the model."""


def probe(
    model: nn.Module,
    implants: Implants,
    modules: nn.Module,
    batch: Mapping[str, Any],
    run: Run,
    bare: Callable[[], AbstractContextManager[Any]],
    unfed: Mapping[str, tuple[str, bool]],
) -> Probe:
    """Run one batch through a host, and say whether its modules act as they are meant to.

    Args:
        model: the host's model.
        implants: its modules, by name.
        modules: the same, as the module that holds their parameters.
        batch: keyword arguments of a call, with two different examples at least.
        run: calls the host: a batch and a composition → its output.
        bare: in a ``with`` block, every layer runs as it is.
        unfed: by the name of a module that reads a side input which ``run`` does not give, the name
            of that input, and whether the module is in force.

    Raises:
        ModgraftError: for a batch that shows nothing (no tensor, one example, or the same one
            twice), or a host without modules.
    """
    names = [name for implant in implants.values() for name in implant.names]
    if not names:
        raise ModgraftError("no module is implanted that could be probed; host.implant(…) first")
    with torch.inference_mode(False), as_it_was(model, modules):
        generator = torch.Generator().manual_seed(0)
        for parameter in modules.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * NOISE
            parameter.data = parameter.data + noise.to(parameter)
        host = _Host(model, implants, _fresh(dict(batch)), run, bare)
        found = Probe([], [], host.notes)
        for name in names:
            source, in_force = unfed.get(name, ("", False))
            rows, verdict = host.untried(name) if source else host.module(name)
            if source:
                words = _UNFED.format(name=name, source=source)
                (verdict.faults if in_force else found.notes).append(words)
            verdict.faults += host.refused
            found.sites += rows
            found.modules.append(verdict)
    return found


class _Host:
    """A host with a batch, and what the bare host did with it.

    Attributes:
        axis: the axis of the examples in the batch; None where they cannot be told apart.
        apart: of each output, whether an example has rows of its own in it.
        count: how many there are.
        by_class: the layers whose class the host asks for, so that it computes something else as
            soon as a module is there.
        notes: what holds for the host as a whole.
        written: the storages that its forward has written to.
        refused: why calls with modules in force are refused.
    """

    def __init__(
        self,
        model: nn.Module,
        implants: Implants,
        batch: Mapping[str, Any],
        run: Run,
        bare: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.implants, self.batch, self.bare = model, implants, batch, bare
        self._run = run
        self.layers = {
            site.path: site.module
            for implant in implants.values()
            for label in implant.paths
            for site in find(model, label)
        }
        self.notes: list[str] = []
        self.written: set[int] = set()
        if is_offloaded(model):
            self.notes.append(
                "Weights of this host are offloaded, so that its output is not compared with that "
                "of the weights θ + Δ."
            )
        if max(count for _, count, _ in self._ways()) < 2:
            raise ModgraftError("host.probe takes a batch of two different examples at least")
        with watched(self.layers) as self.alone:
            out = self.run(batch, None)
        notes, self.refused = what_moves(model, self.written)
        self.notes += notes
        self.out = floats(out)
        if not self.out:
            raise ModgraftError(
                f"the host's forward returned a {type(out).__name__} without a floating tensor of "
                f"more than one number, so that nothing of it can be compared; probe a model whose "
                f"forward returns some"
            )
        self.by_class = self._find_by_class()
        self._find_examples()

    @contextmanager
    def _anew(self) -> Iterator[None]:
        """Let a call find the weights and the random numbers that every other call finds."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices), taken_back(self.model) as written:
            yield
        self.written |= written.changed

    def run(self, batch: Mapping[str, Any], modules: Any) -> Any:
        """Call the host with modules alone in force; None: bare."""
        with self._anew():
            return all_steps(self._run(_fresh(batch), modules))

    def _find_by_class(self) -> list[nn.Module]:
        """Find the layers that change the host's output by having a class of ours."""
        layers = [m for m in self.model.modules() if STATE in m.__dict__]

        def changes(some: list[nn.Module]) -> bool:
            with restored(some):
                return any(map(apart, floats(self.run(self.batch, None)), self.out))

        return [one for one in layers if changes([one])] if changes(layers) else []

    def _find_examples(self) -> None:
        """Find the axis of the examples in the batch, and in each layer's output."""
        ways = self._ways()
        self.axis, self.count, self.other = None, ways[0][1], {}
        self.apart: list[bool] = []
        for axis, count, listed in ways:
            if count < 2:
                continue
            with watched(self.layers) as other:
                try:
                    out = floats(self.run(changed(self.batch, axis, count, listed), None))
                except REFUSALS:
                    if listed:  # a list of something else
                        continue
                    raise
            if self.by_class and not any(map(apart, out, self.out)):
                return
            if not listed and not any(map(apart, out, self.out)):
                raise ModgraftError(
                    "the first two examples of this batch are one to the host, and show nothing; "
                    "probe it with different ones"
                )
            self.apart = [bool(moved(a, b, count)) for a, b in zip(self.out, out, strict=True)]
            if any(self.apart):
                self.axis, self.count, self.other = axis, count, other
                break
        if self.axis is None:
            self.notes.append(
                "Where one example of this batch changes, all outputs do: what belongs to an "
                "example cannot be told here."
            )
        elif self.axis:
            self.notes.append(
                f"The examples lie on axis {self.axis} of this batch, and not on the first."
            )

    def _ways(self) -> list[tuple[int, int, bool]]:
        """Return along which axes the examples may lie, how many they are then, and whether they
        are the entries of lists."""
        shape = _first(self.batch).shape
        lengths = dict.fromkeys(map(len, filter(tensors_in, lists_in((), self.batch))))
        return [
            *((axis, count, False) for axis, count in enumerate(shape[:2])),
            *((0, count, True) for count in lengths),
        ]

    # -- one module

    def untried(self, name: str) -> tuple[list[Probed], Verdict]:
        """Return the rows of a module that is not run."""
        return [self._row(name, label) for label, _ in self.implants.at_sites(name)], Verdict(name)

    def module(self, name: str) -> tuple[list[Probed], Verdict]:
        """Return what the batch shows of one module, by site and as a whole."""
        method = self.implants.computation(name)
        rows, verdict = self.untried(name)
        places: dict[str, tuple[Site, Computation]] = {
            label: (find(self.model, label)[0], getattr(place, "mixture", place))
            for label, place in self.implants.at_sites(name)
        }
        changes: dict[str, list[Change]] = {}
        for site, place in places.values():
            if isinstance(place, ParameterComposition):
                change = Change(place, 1.0, site.part, site.parameter)
                changes.setdefault(site.path, []).append(change)
        local: dict[str, tuple[bool, float | None]] = {}

        def look(path: str, args: tuple, kwargs: dict, y: Tensor) -> None:
            if path in changes and isinstance(self.layers[path], WEIGHTED):
                inside = {
                    p[len(path) :].lstrip("."): some
                    for p, some in changes.items()
                    if p == path or not path or p.startswith(f"{path}.")
                }
                local[path] = self._local(self.layers[path], inside, args, kwargs, y)

        ran: dict[int, int] = {}
        handles = [
            place.register_forward_hook(lambda m, *_: ran.update({id(m): ran.get(id(m), 0) + 1}))
            for _, place in places.values()
        ]
        try:
            with watched(self.layers, look) as seen:
                out = floats(self.run(self.batch, name))
        except Exception as error:  # noqa: BLE001 it is what is to be found
            verdict.faults.append(_said(error))
            return rows, verdict
        finally:
            for handle in handles:
                handle.remove()
        verdict.faults += [
            _CLASS.format(path=state.path or "the model", kind=type(layer).__name__)
            for layer in self.by_class
            if name in (state := layer.__dict__[STATE]).entries or name in state.relays
        ]
        for row, (site, place) in zip(rows, places.values(), strict=True):
            row.called = max(row.called, seen[site.path].calls)
            if site.path in local:
                row.acts, row.merged = local[site.path]
            elif isinstance(place, FunctionComposition):
                row.acts = id(place) in ran
            else:
                row.acts = any(map(apart, out, self.out))
            self._judge_layer(row, site, place, seen[site.path])
        if isinstance(method, ParameterComposition):
            self._judge_merged(verdict, rows, places, changes, out)
        self._judge_learning(name, verdict, rows, places, out)
        self._judge_examples(name, verdict, rows, out)
        return rows, verdict

    def _row(self, name: str, label: str) -> Probed:
        site = find(self.model, label)[0]
        row, before = Probed(label, name), self.alone[site.path]
        row.called = before.calls
        if before.output is None:
            return row
        after = self.other[site.path].output if self.other else None
        where = None if after is None else moved(before.output, after, self.count)
        if after is not None and not apart(before.output, after):
            row.examples = "alike"
        elif after is not None:
            row.examples = "mixed" if where is None else f"axis {where[0]}"
            if where is not None and where[1] > 1:
                row.examples += f", {where[1]} rows each"
        axis = feature_axis(site.module)
        if label and before.output.dim() >= -axis:
            row.features = f"axis {before.output.dim() + axis}: {before.output.shape[axis]}"
        return row

    def _local(
        self,
        layer: nn.Module,
        changes: Mapping[str, list[Change]],
        args: tuple,
        kwargs: dict,
        y: Tensor,
    ) -> tuple[bool, float | None]:
        """Return whether a layer put out something else than alone, and how far it is off that
        with θ + Δ, as a share of the effect. Changes are by the path within the layer."""
        with self.bare(), torch.no_grad():
            alone = first_float(layer.forward(*args, **kwargs))
            assert alone is not None  # noqa: S101
            acts = apart(y, alone)
            if {PATCHED, "forward"} & layer.__dict__.keys() or _is_computed(layer):
                return acts, None
            new = {
                joined(path, name): value
                for path, some in changes.items()
                for name, value in new_weights(layer.get_submodule(path), some).items()
            }
            copy = with_tensors(layer, new)
            truth = first_float(copy.forward(*args, **kwargs))
        assert truth is not None  # noqa: S101
        effect = distance(truth, alone)
        if not apart(truth, alone):  # another forward runs than the copy's own, or Δ does nothing
            return acts or any(not bool(x.any()) for x in floats(args)[:1]), None
        if not apart(y, truth, effect):
            return acts, 0.0
        return acts, distance(y, truth) / max(effect, 1e-30)

    def _judge_layer(self, row: Probed, site: Site, place: Computation, seen: Seen) -> None:
        """Say what is wrong at one site, in the layer itself."""
        kind = type(site.module).__name__
        if not row.called:
            row.acts = None  # what learns there acts by another layer, which reads the weight
            if isinstance(place, FunctionComposition) and self._is_read(site):
                row.faults.append(_READ.format(kind=kind))
        elif row.acts is False:
            row.faults.append(f"the {kind} is called, and puts out what it does without the module")
        if row.merged:
            row.faults.append(
                f"the {kind} puts out something else than its forward does with the weight "
                f"θ + Δ, by {percent(row.merged)} of the effect: leave it out of at="
            )
        if isinstance(place, FunctionComposition) and not site.part and seen.output is not None:
            self._judge_width(row, site, seen.output)
        if site.residual and isinstance(place, FunctionComposition):  # and no mixture of such
            self._judge_residual(row, place)

    def _judge_width(self, row: Probed, site: Site, y: Tensor) -> None:
        try:
            width = site.width
        except SiteError:
            return
        axis = feature_axis(site.module)
        if y.dim() >= -axis and y.shape[axis] != width:
            row.faults.append(
                f"the module was made for {width} features, and the layer puts out "
                f"{y.shape[axis]}: implant at the layers inside that tell their width"
            )

    def _judge_residual(self, row: Probed, place: Computation) -> None:
        """Let a module in a residual do nothing: the host is then what it is without it."""
        place.__dict__["forward"] = lambda y, x, side: y
        try:
            out = floats(self.run(self.batch, row.module))
        finally:
            del place.__dict__["forward"]
        if any(map(apart, out, self.out)):
            row.faults.append(
                "at [residual] the layer is run twice, and the second run sees what the first one "
                "kept (a cache, a state): leave out [residual]"
            )

    def _is_read(self, site: Site) -> bool:
        """Return whether the host's output depends on the weight of a layer."""
        weight = getattr(site.module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            return False
        new = {joined(site.path, "weight"): weight + torch.ones_like(weight)}
        return any(map(apart, self._with_weights(new), self.out))

    def _with_weights(self, new: dict[str, Tensor]) -> list[Tensor]:
        weights: dict[str, Tensor] = {
            f"model.{name}": nn.Parameter(value.detach(), requires_grad=False)
            for name, value in new.items()
        }
        with self._anew(), self.bare():
            whole = _Whole(self.model)
            return functional_call(whole, weights, (), _fresh(self.batch), tie_weights=False)

    def _judge_merged(
        self,
        verdict: Verdict,
        rows: list[Probed],
        places: dict[str, tuple[Site, Computation]],
        changes: dict[str, list[Change]],
        out: list[Tensor],
    ) -> None:
        """Compare the host's output with that of the weights θ + Δ."""
        if any(_is_computed(self.layers[path]) for path in changes):
            return
        if is_offloaded(self.model):  # its hooks would put θ back
            return
        new = {
            path: {joined(path, n): v for n, v in new_weights(self.layers[path], some).items()}
            for path, some in changes.items()
        }
        truth = self._with_weights({n: v for some in new.values() for n, v in some.items()})
        off = [
            distance(a, t) / max(distance(t, b), 1e-30)
            for a, t, b in zip(out, truth, self.out, strict=True)
            if apart(a, t, distance(t, b))
        ]
        verdict.merged = percent(max(off)) if off else "equal"
        if not off:
            self._judge_kept(verdict, rows, out, new)
            return
        for row, (site, _) in zip(rows, places.values(), strict=True):
            if row.acts or row.faults:
                continue
            if any(map(apart, self._with_weights(new[site.path]), self.out)):
                row.acts = False
                row.faults.append(_READ.format(kind=type(site.module).__name__))
        if not any(row.faults for row in rows):
            verdict.faults.append(
                f"the host puts out something else than with the weights θ + Δ, by "
                f"{verdict.merged} of the effect, though each layer does what it should: another "
                f"part reads these weights too"
            )

    def _judge_kept(
        self, verdict: Verdict, rows: list[Probed], out: list[Tensor], new: New
    ) -> None:
        """Look for what computes with a weight that it keeps, and does not read of its layer.

        What is written into the weight itself reaches that too, as what is merged does.
        """
        names = self.model.named_parameters(remove_duplicate=False)
        owners = Counter(storage_of(parameter) for _, parameter in names)

        def differ(some: New) -> bool:
            tensors = {n: v for each in some.values() for n, v in each.items()}
            return any(map(apart, self._with_written(tensors), self._with_weights(tensors)))

        untied = {
            path: tensors
            for path, tensors in new.items()
            if all(owners[storage_of(stored(self.model, name))] == 1 for name in tensors)
        }  # a tied weight is its other owners' too, and is not merged into
        if not untied or not differ(untied):
            return
        for row in rows:
            path = find(self.model, row.site)[0].path
            if path not in untied or not differ({path: untied[path]}):
                continue
            layer = self.layers[path]
            keeper = kept_elsewhere(self.model, [layer]).get(layer)
            row.faults.append(
                _KEPT.format(
                    kind=type(layer).__name__,
                    path=path,
                    where=f", in its attribute {keeper}" if keeper else "",
                )
            )
        tensors = {n: v for each in new.values() for n, v in each.items()}
        truth = self._with_written(tensors)
        verdict.merged = percent(
            max(
                distance(a, t) / max(distance(t, b), 1e-30)
                for a, t, b in zip(out, truth, self.out, strict=True)
            )
        )

    def _with_written(self, new: dict[str, Tensor]) -> list[Tensor]:
        """Return what the host puts out with ``new`` written into its weights themselves."""
        with self._anew(), self.bare():
            for name, value in new.items():
                stored(self.model, name).data.copy_(value)
            return floats(all_steps(self._run(_fresh(self.batch), None)))

    def _judge_learning(
        self,
        name: str,
        verdict: Verdict,
        rows: list[Probed],
        places: dict[str, tuple[Site, Computation]],
        out: list[Tensor],
    ) -> None:
        """Ask for the gradients of the module's parameters, without keeping any."""
        own = [p for _, place in places.values() for p in place.parameters()]
        if not own:
            return
        for parameter in own:
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad():
                some = [y for y in floats(self.run(self.batch, name)) if y.requires_grad]
                parts = [y.nan_to_num(0, 0, 0).float().square().sum() for y in some]
                found = torch.autograd.grad(parts, own, allow_unused=True) if parts else ()
        except RuntimeError as error:
            fault = f"training raises {_said(error)}"
            if written := [path for path, one in self.alone.items() if one.written]:
                fault = f"the host writes in place to the output of {', '.join(written)}; {fault}"
            verdict.faults.append(fault)
            return
        if not found and not any(row.faults for row in rows):
            acts = any(map(apart, out, self.out))
            verdict.faults.append(_NO_GRADIENT if acts else self._no_effect(places))
        reached = {id(p) for p, g in zip(own, found, strict=False) if g is not None and g.any()}
        for row, (_, place) in zip(rows, places.values(), strict=True):
            parameters = list(place.parameters())
            row.learns = any(id(p) in reached for p in parameters) if parameters else None
            if not row.called and not row.faults:
                row.acts = row.learns

    def _no_effect(self, places: dict[str, tuple[Site, Computation]]) -> str:
        """Return the fault of a module that this batch does not come to anywhere."""
        paths = {site.module: site.path for site, _ in places.values()}
        kept = [
            f"; {keeper} is the weight of {paths[layer]}, which the forward has to read there"
            for layer, keeper in kept_elsewhere(self.model, list(paths)).items()
        ]
        return (
            "nothing that the host puts out for this batch depends on the module: no layer with it "
            f"is called, and of none is the weight read{''.join(kept[:1])}"
        )

    def _judge_examples(
        self, name: str, verdict: Verdict, rows: list[Probed], out: list[Tensor]
    ) -> None:
        """Give the module to the first example alone."""
        if self.axis is None:
            return
        axis, count = self.axis, self.count
        try:
            mixed = floats(self.run(self.batch, [name, *[None] * (count - 1)]))
        except ModgraftError as error:  # known, and said to whoever asks for it
            verdict.each = "refused"
            self.notes.append(f"For each example by itself, {name!r} is refused: {error}")
            return
        except Exception as error:  # noqa: BLE001 it is what is to be found
            verdict.each = "raises"
            verdict.faults.append(_said(error))
            return
        for new, all_, none, own in zip(mixed, out, self.out, self.apart, strict=False):
            alike = new.shape == all_.shape == none.shape  # a text with a prompt is longer
            if not own or not alike or new.dim() <= axis or new.shape[axis] % count:
                continue
            effect, each = distance(all_, none), new.shape[axis] // count
            truth = torch.cat(
                [all_.narrow(axis, 0, each), none.narrow(axis, each, new.shape[axis] - each)], axis
            )
            if apart(new, truth, effect):
                verdict.each = percent(distance(new, truth) / max(effect, 1e-30))
                odd = [row for row in rows if row.examples not in ("axis 0", "alike", "–")]
                for row in odd:
                    row.faults.append(
                        f"an example's rows are elsewhere than on the first axis ({row.examples}), "
                        f"where modules=[…], mg.Weighted, routing by example and side inputs look "
                        f"for them: call the host once for each composition"
                    )
                if not odd:
                    verdict.faults.append(
                        f"modules=[{name!r}, None, …] is not {name!r} for the first example alone, "
                        f"by {verdict.each}: call the host once for each composition"
                    )
                return
        verdict.each = "equal"


def _is_computed(layer: nn.Module) -> bool:
    """Return whether a weight of the layer is computed of others."""
    return is_parametrized(layer) or bool(computed(layer))


class _Whole(nn.Module):
    """A model that is run to its end: a generator is read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> list[Tensor]:
        return floats(all_steps(self.model(**batch)))


def _fresh(batch: Any) -> Any:
    """Return a batch in objects of its own, which the host may write to: caches among them.

    Autograd can follow its tensors, also where they were made in inference mode.
    """

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return copy.deepcopy(value) if isinstance(value, Cache | set) else NotImplemented

    return rebuilt(batch, part)


def _first(batch: Mapping[str, Any]) -> Tensor:
    """Return the first tensor of a batch."""
    tensors = tensors_in(batch)
    for odd in (v for v in tensors if v.is_nested or v.layout is not torch.strided):
        raise ModgraftError(
            f"host.probe compares the rows of examples, and this batch has a "
            f"{'nested' if odd.is_nested else str(odd.layout).removeprefix('torch.')} tensor; give "
            f"it a padded one, or a dense one"
        )
    first = next((v for v in tensors if v.dim()), None)
    if first is None:
        raise ModgraftError(
            f"host.probe takes the keyword arguments of a call, with a tensor among them; this "
            f"batch has {', '.join(batch) or 'nothing'}"
        )
    return first


_UNFED = (
    "{name!r} reads the side input {source!r}, which this call does not have, and was not tried: "
    "host.probe(batch, side={{{source!r}: mg.Side(tensor, mask)}})"
)

_NO_GRADIENT = (
    "the module acts and no gradient reaches it: the host detaches what it puts out, or runs "
    "without gradients, and trains no module so"
)

_KEPT = (
    "the host keeps the weight of this {kind}{where}, and computes with what it keeps: a module "
    "acts where the layer is called or {path}.weight is read, and has no effect there, though its "
    "merge would have; read {path}.weight in the forward, or leave the layer out of at="
)

_CLASS = (
    "the host computes something else as soon as a module is in {path}, also where none acts: its "
    "forward asks for the very class, as type(layer) is {kind} does, and a layer with modules is "
    "of a subclass; ask isinstance(layer, {kind}) there, or leave the layer out of at="
)

_READ = (
    "the layer above reads the weight of this {kind} and never calls it, so that the module has no "
    "effect here, though its merge would have: leave it out of at="
)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ModgraftError) else f"{type(error).__name__}: {error}"
