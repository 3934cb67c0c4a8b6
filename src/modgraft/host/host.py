"""The host: a model, the modules implanted in it, and the composition of them that acts."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch.func import functional_call
from transformers.utils.generic import ModelOutput

from modgraft.computation.base import (
    Computation,
    KeyValueComposition,
    ParameterComposition,
    TokenComposition,
)
from modgraft.core import expression as ex
from modgraft.core.call import UNSEEN, Call, Layout
from modgraft.core.compiled import NOT_COMPILED, NOT_EXPORTED, eagerly
from modgraft.core.context import Context
from modgraft.core.errors import ModgraftError, UndividedError, an, warn
from modgraft.core.expression import module_of
from modgraft.core.files import folder_path, writing
from modgraft.core.layers import STATE, check_computed
from modgraft.core.per_example import Weighted, joined
from modgraft.core.side import EXAMPLE, Side
from modgraft.core.sites import At, Site, find, located
from modgraft.core.tables import Page
from modgraft.core.tensors import device_of
from modgraft.engine.examples import ask, check_assumed, prompt_of, signature
from modgraft.engine.fast_paths import check_weights_stay, leave_fast_paths
from modgraft.engine.gradient_checkpointing import hook_checkpoints
from modgraft.engine.graft import (
    graft_everywhere,
    grafted_by_others,
    implant_again,
    implanted_in,
    link_shared_inputs,
    undivide,
    ungraft,
)
from modgraft.engine.guard import Guard
from modgraft.engine.implant import (
    Implant,
    Implants,
    check_module,
    check_name,
)
from modgraft.engine.inputs.caches import check_goes_on
from modgraft.engine.inputs.padding import count_from_texts, count_padding_too, count_prefix
from modgraft.engine.inputs.prefix_attention import hook_attention
from modgraft.engine.own_forward import check_copies
from modgraft.engine.parts import divide_around
from modgraft.engine.served_weight import (
    hook_functional_calls,
    unwatch_forwards,
    warn_of_kept,
    watch_forwards,
)
from modgraft.engine.shown import Shown
from modgraft.host.accelerate_state import hook_accelerate
from modgraft.host.accepted import check_model
from modgraft.host.as_model import AsModel
from modgraft.host.compositions import (
    Composition,
    Compositions,
    Reader,
    check_batch,
    check_generated,
    check_sides,
    examples_of,
    named,
)
from modgraft.host.describe import describe
from modgraft.host.explain import explain
from modgraft.host.later import run_within
from modgraft.host.merge import merged
from modgraft.host.mixtures import (
    check_unmixed,
    join_prompts,
    mixed_sites,
    routed,
)
from modgraft.host.probe import probe
from modgraft.host.probe_result import Probe
from modgraft.host.train import Trains
from modgraft.routing.losses import with_routing_losses
from modgraft.routing.mixture import Mixture

_IMPLANTED = "_implanted"
"""The entry of a host's state, when it is copied or pickled, that says what is in its model."""

_AT_ONCE = (Tensor, ModelOutput)
"""What a forward nearly always returns, in which nothing is left to be run."""

TARGETS = {"labels", "targets", "return_loss", "num_items_in_batch"}
"""What a call may be given beside its input."""

hook_checkpoints()
hook_functional_calls()
hook_accelerate()

if TYPE_CHECKING:
    from modgraft.store.stored import Stored


class Host(Trains, AsModel):
    """A model in which modules are implanted, composed and trained.

    It is an ``nn.Module`` whose ``forward`` is the model's with two more arguments, ``side`` and
    ``modules``. Optimisers, ``accelerate``, transformers' ``Trainer`` and pipelines use it as the
    model that it holds, whose attributes it has beside its own (:mod:`modgraft.host.as_model`).

    Args:
        model: any ``nn.Module``; known Hugging Face architectures get roles.
        freeze: whether to freeze the model's weights.

    Example:
        >>> host = Host(model)
        >>> host.implant("qa", LoRA(rank=8), at=["query", "value"])
        >>> host.fit(loader, train="qa", steps=500)
    """

    def __init__(self, model: nn.Module, freeze: bool = True) -> None:
        super().__init__()
        check_model(model)
        self._modules["model"] = model  # where ``self.model`` finds it
        self._context = Context()
        self.implants = nn.ModuleDict()
        self._implants = Implants(self.implants, self._context)
        self._reader = Reader(self._implants, self._context)
        self._waiting: dict[str, Callable[[], object]] = {}  # loaded, and not used yet
        self._learned = frozenset()
        self.register_state_dict_pre_hook(self._bring_all)
        self.register_load_state_dict_pre_hook(self._bring_all)
        leave_fast_paths(model)
        if freeze:
            model.requires_grad_(False)
        self._guard = Guard(self)

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The model, which is called without the checks that a call of the host makes."""
        return self._modules["model"]  # type: ignore[return-value]

    def __deepcopy__(self, memo: dict[int, Any]) -> Host:
        """Copy the host when the calls of other threads have ended, and hold off new ones."""
        with self._guard.gate.change("copy.deepcopy(host)"):
            check_copies(self.model, set(self._guard.layers))
            make, arguments, state = self.__reduce_ex__(4)
            memo[id(self)] = new = make(*arguments)
            new.__setstate__(copy.deepcopy(state, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        for name in list(self._waiting):  # a copy has no part in what is read from this one's files
            self._bring(name)
        make, arguments, state = super().__reduce_ex__(protocol)
        return make, arguments, {**state, _IMPLANTED: implanted_in(self.model, self._guard.layers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the modules into the model again, of which a copy by itself has none."""
        grafts, hooks = state.pop(_IMPLANTED, ((), ()))
        super().__setstate__(state)
        implant_again(grafts, hooks)
        for implant in self._implants.values():
            if isinstance(implant.method.unwrapped, KeyValueComposition):
                hook_attention()

    def _look_around(self) -> None:
        """See where modules are."""
        undivide(self.model)
        link_shared_inputs(self.model)
        self._guard.look(self)

    # -- implanting -----------------------------------------------------------------------------

    def sites(self, at: At, expect: int | None = None) -> list[Site]:
        """Return the sites that a selection means; see :func:`modgraft.core.sites.find`."""
        return self._shown(find(self.model, at, expect=expect))

    def _shown(self, sites: Sequence[Site]) -> list[Site]:
        shown = Shown(self.model).width
        return [replace(site, shown=shown) for site in sites]

    def implant(
        self,
        name: str,
        module: Computation,
        at: At | None = None,
        *,
        expect: int | None = None,
        active: bool = True,
    ) -> Implant:
        """Implant ``module`` under ``name`` at every site that ``at`` selects.

        Args:
            name: a Python identifier, new to this host.
            module: a computation by its hyper-parameters, ``LoRA(rank=8)``.
            at: a role, path pattern, type, predicate or list of these; a prompt needs none.
            expect: how many sites there must be.
            active: whether it joins the composition in force, at its end.

        Returns:
            The handle, also ``host[name]``.

        Raises:
            ModgraftError: for a name in use, no matching site, another number than expected, or a
                site the method is not defined at. The host is then as it was.
        """
        with self._guard.gate.change(f"host.implant({name!r}, …)"):
            return self._implant(
                name, module, lambda: self.sites(self._where(name, module, at), expect), active
            )

    @torch.inference_mode(False)  # a module made in inference mode could never be trained
    def _implant(
        self, name: str, module: Computation, where: Callable[[], list[Site]], active: bool
    ) -> Implant:
        self._check_new(name)
        check_module(module)
        self._bring(list(module.members))
        sites = where()
        check_weights_stay(self.model)
        for site in sites:
            check_computed(site.module, site.path, site.parameter)
        if other := grafted_by_others(self.model, self._context):
            raise ModgraftError(
                f"another Host has modules in this model (at {other[0] or 'its input'}); work with "
                f"that one, or wrap the copy that its merge(None) gives"
            )
        if active and len(names := module.task_names(name)) > 1:
            raise ModgraftError(
                f"{name!r} has {len(names)} tasks, and none is in force by itself: "
                f"host.implant({name!r}, …, active=False), then host.use({names[0]!r})"
            )
        with torch.device("cpu"):  # also where new tensors are made without data
            implant = Implant(name, module, sites)  # may raise: nothing has been touched yet
        if module.members:
            join_prompts(self._implants, implant)
        if isinstance(module.unwrapped, KeyValueComposition):
            hook_attention()
        new = [site for site in sites if STATE not in site.module.__dict__]
        self._graft(implant, sites, implant.names)
        if isinstance(module.unwrapped, ParameterComposition):
            warn_of_kept(self.model, name, {site.module: site.path for site in new})
        if not self.implants:
            watch_forwards(self.model, self._context)
        if not self._context.keys_values.isdisjoint(implant.names):
            count_from_texts(self.model, self._context)
            if isinstance(inner := module.unwrapped, KeyValueComposition):
                for each in implant.names:
                    count_prefix(self.model, self._context, each, inner.positions)
        implant.train(self.model.training)
        for site, place in zip(sites, implant.places, strict=True):
            place.train(self._guard.trains(site.module, self.model))
        self.implants[name] = implant
        self._reader.forget()
        now = self._context.composition
        self._context.switch(joined(now, implant.names[0]) if active else now)
        return implant

    def _check_new(self, name: str) -> None:
        check_name(name)
        if name in self:
            raise ModgraftError(
                f"{name!r} is implanted already; host.remove({name!r}) first, or take another name"
            )

    def _where(self, name: str, module: Computation, at: At | None) -> At:
        """Return the selection of the sites that ``module`` acts at."""
        if isinstance(module.unwrapped, TokenComposition):
            if at not in (None, "input", ""):
                raise ModgraftError(
                    f"{type(module).__name__} acts at the host's input; leave out at={at!r}"
                )
            return ""
        if isinstance(module, Mixture):
            if at is not None:
                raise ModgraftError(f"a Mixture acts where its modules do; leave out at={at!r}")
            return mixed_sites(self.model, self._implants, module)
        at = module.unwrapped.default_at if at is None else at
        if at is None:
            raise ModgraftError(f"where? host.implant({name!r}, …, at='query'), for instance")
        return at

    def _located(self, name: str, module: Computation, labels: Sequence[str]) -> list[Site]:
        """Return the sites that a card names; a mixture acts where its modules do."""
        if isinstance(module, Mixture):
            return self.sites(self._where(name, module, None))
        return self._shown(located(self.model, labels))

    def _graft(self, implant: Implant, sites: Sequence[Site], names: Sequence[str]) -> None:
        """Graft a module onto its sites under ``names``, all its names or some of them."""
        for name in names:
            places = [place for _, place in implant.at_sites(name)]
            sited = list(zip(sites, places, strict=True))
            graft_everywhere(name, implant.method, sited, device_of(self.model), self._context)
        self._look_around()

    def remove(self, name: str) -> None:
        """Remove a module; the host is as it was before it, bit for bit."""
        with self._guard.gate.change(f"host.remove({name!r})"):
            if self._let_go(name):
                return
            names = self[name].names  # raises for an unknown one
            self._guard.check_kinds()
            check_unmixed(self._implants, names)
            for each in names:
                for layer in self._guard.layers:
                    ungraft(layer, each)
                self._context.remove(each)
            self._look_around()
            self._implants.take_back(self[name], self.model)
            del self.implants[name]
            if not self.implants:
                unwatch_forwards(self.model)
            if not self._context.keys_values:
                count_padding_too(self.model)
            self._reader.forget()
            self._context.switch(ex.without(self._context.composition, name))

    def __getitem__(self, name: str) -> Implant:
        self._bring(name)
        return self._implants[name]

    def __contains__(self, name: str) -> bool:
        return name in self.implants or name in self._waiting

    def _let_go(self, name: str) -> bool:
        """Forget a module that was never used, if it came alone or cannot be read."""
        if not isinstance(name, str) or name not in self._waiting:
            return False
        load = self._waiting[name]
        if list(self._waiting.values()).count(load) > 1:
            with suppress(ModgraftError):  # which the others' first use says
                self._bring(name)
        return self._waiting.pop(name, None) is not None

    def _bring_all(self, *_: Any) -> None:
        """Implant all that was loaded with ``lazy=True``; a hook of state dicts."""
        for name in list(self._waiting):
            self._bring(name)

    def _bring(self, composition: Compositions) -> None:
        """Implant those modules of a composition that were loaded with ``lazy=True``."""
        if not self._waiting:
            return
        for name in named(composition, self._waiting):
            with self._guard.gate.change(f"the first use of {name!r}"):
                if load := self._waiting.pop(name, None):  # another thread may have been first
                    try:
                        load()
                    except BaseException:
                        self._waiting[name] = load
                        raise

    # -- composing ------------------------------------------------------------------------------

    @property
    def composition(self) -> ex.Expression | None:
        """The composition in force; None is the bare host."""
        return self._context.composition

    def use(self, composition: Compositions) -> None:
        """Put a composition in force, until another is; None is the bare host.

        Args:
            composition: an expression as a text or of handles, or a list with one for each example
                of the batches to come.

        Raises:
            ModgraftError: for an unknown name or an expression that means nothing.
        """
        self._bring(composition)
        with self._guard.gate:
            self._context.switch(self._reader.read(composition))

    @contextmanager
    def using(self, composition: Compositions) -> Iterator[Self]:
        """Put a composition in force in a ``with`` block, in this thread or task alone."""
        with self._under(self.read(composition)):
            yield self

    def _under(self, composition: ex.Expression | None) -> AbstractContextManager[None]:
        around = self._context.around() or Call(None)
        return self._context.call(replace(around, composition=composition))

    def read(self, composition: Compositions) -> ex.Expression | None:
        """Return a composition as an expression, without putting it in force.

        Raises:
            ModgraftError: for an unknown name or an expression that means nothing.
        """
        self._bring(composition)
        with self._guard.gate:
            return self._reader.read(composition)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, in which what is frozen moves as little as in evaluation.

        A layer of running statistics (``nn.BatchNorm2d``, the power iteration of a spectral norm)
        stays in evaluation mode while its parameters are frozen.
        """
        super().train(mode)
        self._guard.hold(self.model)
        return self

    # -- running --------------------------------------------------------------------------------

    def forward(
        self,
        *args: Any,
        side: Mapping[str, Side] | None = None,
        modules: Compositions | EllipsisType = ...,
        **kwargs: Any,
    ) -> Any:
        """Call the model with the modules in force.

        Args:
            *args: for the model.
            side: side inputs by name, each with the batch of this call.
            modules: a composition for this call alone, or a list of them, one for each example of
                the batch: ``["fr >> qa", "style", None]``.
            **kwargs: for the model.

        Raises:
            ModgraftError: if an active module's side input is missing.
        """
        if torch.compiler.is_dynamo_compiling():
            if torch.compiler.is_exporting() and self.implants:
                raise ModgraftError(NOT_EXPORTED)
            call = self._call(side, modules)
            if self._context.routed:
                call = routed(self.model, self._implants, call, args, kwargs)
            call = self._context.compiled.filled(call)
            copies = self._guard.copies()
            with self._context.call(call):
                out = (
                    functional_call(self.model, copies, args, kwargs)
                    if copies
                    else self.model(*args, **kwargs)
                )
            return with_routing_losses(out, call.routings, kwargs) if call.routings else out
        if callable(eval_frame.get_eval_frame_callback()):
            warn(NOT_COMPILED)
        return self._call_eagerly(False, side, modules, args, kwargs)

    def generate(
        self,
        *args: Any,
        side: Mapping[str, Side] | None = None,
        modules: Compositions | EllipsisType = ...,
        **kwargs: Any,
    ) -> Any:
        """Call the model's ``generate``; an example's beams share its side inputs."""
        return self._call_eagerly(True, side, modules, args, kwargs)

    @eagerly
    def _call_eagerly(
        self,
        generating: bool,
        side: Mapping[str, Side] | None,
        modules: Compositions | EllipsisType,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._waiting and modules is not ...:
            self._bring(modules)
        with self._guard.state(self):
            call = self._call(side, modules, generating)
            run: Any = self.model.generate if generating else self.model
            try:
                with self._guard.keeping(self, call.composition is not None):
                    out = self._run(run, call, args, kwargs)
                self._guard.check_ran(call.composition)
            except (ValueError, TypeError) as error:
                alone = kwargs and kwargs.keys() <= TARGETS and not (args or generating)
                if isinstance(error, ModgraftError) or not alone:
                    raise
                raise ModgraftError(
                    f"the host was called without an input, with {', '.join(kwargs)} alone. "
                    f"transformers' Trainer leaves out what it does not find in the arguments of "
                    f"forward, unless TrainingArguments(remove_unused_columns=False)"
                ) from error
        learns = call.routings and not generating
        return with_routing_losses(out, call.routings, kwargs) if learns else out

    def _run(
        self, run: Callable[..., Any], call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if call.generating and call.composition is not None:
            read = {self._context.side_sources.get(name) for name in call.composition.names()}
            sides = {name: side for name, side in call.side.items() if name in read}
            check_generated(sides, args, kwargs)
        if self._context.routed:
            call = routed(self.model, self._implants, call, args, kwargs)
        if (composition := call.composition) is not None:
            by_example = not self._context.by_example.isdisjoint(composition.names())
            if (composition.of_batch or by_example) and not call.generating:
                call = replace(call, layout=self._layout(composition, call.side, args, kwargs))
            elif composition.of_batch or by_example:
                call = self._of_prompt(composition, call, args, kwargs)
            if composition.of_batch:
                check_batch(composition, args, kwargs, call.layout or {})
        if self._context.token_modules and not (
            composition and self._context.token_modules_in(composition)
        ):
            check_goes_on(kwargs, None)
        take_back = None if call.layout is None else call.snapshot()
        while True:
            try:
                with self._context.call(call):
                    out = run(*args, **kwargs)
                return out if isinstance(out, _AT_ONCE) else self._whole(out, call, kwargs)
            except UndividedError as error:
                if composition is None or take_back is None:
                    raise
                count = examples_of(composition, call.side)
                call = divide_around(self.model, self._context, error, call, count, args, kwargs)
            take_back()

    def _whole(self, out: Any, call: Call, kwargs: dict[str, Any]) -> Any:
        """Return what a forward has put out, where what it leaves to be run is run in its call."""

        @contextmanager
        def again() -> Iterator[Callable[[Any], Any]]:
            more = replace(call, kept={}, outputs={}, routings=[])
            with self._guard.later(self, call.composition is not None):
                self._reader.check_known(call.composition)
                with self._context.call(more):
                    yield lambda out: with_routing_losses(out, more.routings, kwargs)

        in_force = not call.side and self._context.composition == call.composition
        return run_within(out, again, in_force)

    def _layout(
        self, composition: ex.Expression, sides: Mapping[str, Side], args: tuple, kwargs: Any
    ) -> Layout:
        """Ask the host, once for calls that are alike, where the examples lie at its layers."""
        layouts, last = self._context.layouts, self._context.layout
        count = examples_of(composition, sides)
        kind = signature(args, kwargs, count)
        if kind is None:
            check_assumed(self.model, last, args, kwargs)
            return last
        if kind not in layouts:
            found, lasts = ask(self.model, args, kwargs, count)
            if not lasts:
                return found
            unseen = {path: last[path] for path in found if found[path] == UNSEEN and path in last}
            self._context.remember(kind, {**found, **unseen})
        return layouts[kind]

    def _of_prompt(
        self, composition: ex.Expression, call: Call, args: tuple, kwargs: dict[str, Any]
    ) -> Call:
        """Say where the examples of a prompt with more than text do not lie first."""
        prompt = prompt_of(self.model, args, kwargs)
        if prompt is None:
            return call
        found = self._layout(composition, call.side, (), prompt)
        odd = {path: axis for path, axis in found.items() if axis not in (0, UNSEEN)}
        return replace(call, layout=odd) if odd else call

    def _call(
        self,
        side: Mapping[str, Side] | None,
        modules: Compositions | EllipsisType,
        generating: bool = False,
    ) -> Call:
        if torch.compiler.is_dynamo_compiling():
            if modules is not ... and not isinstance(modules, Weighted):
                raise ModgraftError(
                    "under torch.compile a composition is put in force before the call: "
                    "host.use('a >> b'), or with host.using('a >> b'): ..., not modules=; what can "
                    "come with the call is modules=mg.Weighted(names, weights)"
                )
            return Call(None if modules is ... else modules, side or {}, generating)
        now = self._context.around() or Call(self._context.composition)
        composition = now.composition if modules is ... else self._reader.read(modules)
        if composition is not self._context.composition:  # of a block around a host.remove
            self._reader.check_known(composition)
        given = {**now.side, **self._placed({} if side is None else side)}
        if self._context.side_sources:
            check_sides(composition, given, self._context.side_sources)
        entering = self._guard.entering
        return Call(composition, given, generating, in_forward=True, kept={}, entering=entering)

    def _placed(self, sides: Mapping[str, Side]) -> dict[str, Side]:
        if not isinstance(sides, Mapping):
            wanted = "{'image': mg.Side(tensor, mask)}, by the name that a module reads"
            raise ModgraftError(f"side is {an(type(sides).__name__)}; write side={wanted}")
        for name, side in sides.items():
            if not isinstance(side, Side):
                raise ModgraftError(
                    f"side input {name!r} is {an(type(side).__name__)}; write mg.Side(tensor, mask)"
                )
        device = device_of(self.model) if sides else None
        return {n: s if s.tensor.device == device else s.to(device) for n, s in sides.items()}

    # -- storing --------------------------------------------------------------------------------

    def save(
        self,
        names: str | Sequence[str] | None,
        folder: str | Path,
        *,
        format: str = "modgraft",
        **about: Any,
    ) -> Path:
        """Write modules to a folder; see :mod:`modgraft.store.folder`.

        A module that others are part of, as a mixture, is saved with them. A part of the host that
        trained with one (``train=["qa", "host.classifier"]``) goes into the folder too, and into
        the host that it is loaded into.

        Args:
            names: a module, several that travel together, or None: all, with the composition in
                force.
            folder: where to; what is there of other modules is replaced, other files stay.
            format: ``"modgraft"``, or another tool's: :mod:`modgraft.store.formats`.
            **about: what the card says of them: ``metrics={"accuracy": 0.9}``, ``task``, ``data``,
                ``licence``, ``description``, ``command``, ``base_model``.

        Raises:
            ModgraftError: for an unknown name or field, or a folder that holds other things, or
                that another process is writing to.
        """
        from modgraft.store.folder import save
        from modgraft.store.formats.base import named

        several = list(self.implants) + list(self._waiting) if names is None else names
        several = several.name if isinstance(several, Implant) else several
        one = isinstance(several, str)
        chosen = [several] if isinstance(several, str) else list(dict.fromkeys(several))
        if not chosen:
            raise ModgraftError("host.save: there is no module to save; name one, or implant one")
        for name in chosen:
            self._bring(name)
        path = folder_path(folder, "host.save")
        with self._guard.gate, writing(path):
            self._guard.check_paths(self)
            if format == "modgraft":
                return save(self, chosen, path, about, together=not one)
            if about:
                raise ModgraftError(f"format={format!r} has no place for {', '.join(about)}=")
            now = None if one else self.composition  # which a single module does not bring
            if now is not None and not {*chosen}.issuperset(map(module_of, now.names())):
                now = None  # nor do several that are not all of it
            if now is not None and (now.of_batch or any(w != 1 for w in now.weights().values())):
                raise ModgraftError(
                    f"format={format!r} has no place for the composition in force, {now}, whose "
                    f"weights several modules, or all, would bring: merge it into one module "
                    f"(mg.merge, modgraft merge), or save a module by itself: "
                    f"host.save({chosen[0]!r}, …)"
                )
            named(format).write(self, chosen, path)
            return path

    @overload
    def load(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        strict: bool = True,
        active: bool = True,
        lazy: Literal[False] = False,
    ) -> Implant: ...
    @overload
    def load(
        self, folder: str | Path, name: str | None = None, *, strict: bool = True, lazy: bool
    ) -> None: ...
    def load(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        strict: bool = True,
        active: bool | None = None,
        lazy: bool = False,
    ) -> Implant | None:
        """Implant saved modules; see `modgraft.store.folder` and `modgraft.store.hub.address`.

        Weights of the host that trained with them are written into this host; ``remove`` brings
        back those that they replace.

        Args:
            folder: where :meth:`save` put them, or an address: ``hub:NAME@VERSION``,
                ``hf:USER/REPO@REVISION``, a URL such as ``s3://bucket/qa``. Or a file of
                ``modgraft hub lock``: exactly the modules of a composition, which it puts in force.
            name: the name here of a module that was saved alone; None: the one it had. What was
                one module of PEFT and is several here is called ``name`` and ``name_…``.
            strict: whether the host must be the one it was trained in, weight for weight; its
                architecture must be the same in any case.
            active: whether it joins the composition in force, at its end; several bring the
                composition that they were saved with. None: unless it is ``lazy``.
            lazy: whether to read the card alone now, and to verify the tensors and implant them at
                the first use; the module joins no composition then, and several bring none.

        Returns:
            The handle of the module, of several that of the last one; with ``lazy``, None:
            ``host[name]`` is a first use.

        Raises:
            CheckpointError: for a folder that is damaged or none of these, or another host. The
                host is then as it was.
            ModgraftError: for an address whose module cannot be fetched, or ``lazy`` and
                ``active``.
        """
        from modgraft.store.folder import load, names_here, naming, read
        from modgraft.store.hub import lock
        from modgraft.store.hub.address import local
        from modgraft.store.same_host import checked

        if lazy and active:
            raise ModgraftError(
                "host.load: a module that is read at its first use (lazy=True) joins no "
                "composition now; leave out active=True, and name it where it is to act, in "
                "host.use(…)"
            )
        if active is not None and not isinstance(active, bool):
            raise ModgraftError(f"host.load: active={active!r} is none of True, False and None")
        active = active is not False
        if isinstance(folder, str | PathLike) and os.path.isfile(folder):  # noqa: PTH113, it never raises
            if name is not None or lazy:
                raise ModgraftError(
                    f"host.load: {folder} is a file, and no folder; a lock file names its modules "
                    f"and loads them at once: leave out name= and lazy="
                )
            with self._guard.gate.change(f"host.load({str(folder)!r})"):
                return lock.load(self, Path(folder), strict, active)[-1]
        path = local(folder, "host.load")
        with self._guard.gate.change(f"host.load({str(path)!r})"):
            found = read(path, self.model)
            if not lazy:
                return load(self, found, name, strict, active)[-1]
            found, _ = checked(self, found, strict)
            new = [names_here(found, name)[each] for each in found.card.names]
            with naming(path):
                for each in new:
                    self._check_new(each)
            self._waiting |= dict.fromkeys(new, partial(self._load, found, name, strict, new))
        return None

    def _load(self, found: Stored, name: str | None, strict: bool, names: Sequence[str]) -> None:
        """Implant what :meth:`load` has left for the first use."""
        from modgraft.store.folder import load

        others = {each: self._waiting.pop(each) for each in names if each in self._waiting}
        try:
            load(self, found, name, strict, active=False, told=True)
        except BaseException:
            self._waiting |= others
            raise

    def merge(self, composition: Composition | EllipsisType = ...) -> nn.Module:
        """Merge a composition into a copy of the model, which runs without modgraft.

        Args:
            composition: what to merge; left out, the one in force.

        Raises:
            ModgraftError: if the merge would not be exact, because a module is no change of
                weights, or changes a weight that another layer shares.
        """
        read = self.composition if composition is ... else self.read(composition)
        with self._guard.gate.change("host.merge(…)"), self._guard.state(self):
            self._guard.check_paths(self)
            return merged(self.model, self._implants, read)

    # -- looking --------------------------------------------------------------------------------

    def probe(self, batch: Mapping[str, Any], side: Mapping[str, Side] | None = None) -> Probe:
        """Run one batch, and say site by site whether the modules act as they are meant to.

        Every module is tried alone with random parameters, whether it is in force or not; the host
        is left as it was to the last bit. See :mod:`modgraft.host.probe`.

        Args:
            batch: keyword arguments for :meth:`forward`, with two different examples at least.
            side: side inputs by name, as there.

        Returns:
            What was found: ``print`` it; ``.faults`` is what is wrong, by site.

        Raises:
            ModgraftError: for a batch that shows nothing, or a host without modules.
        """
        if not isinstance(batch, Mapping):
            raise ModgraftError(
                f"host.probe takes a batch as host(**batch) does, a dictionary of tensors by name, "
                f"not a {type(batch).__name__}"
            )
        given, side = dict(batch), side if side is not None else batch.get("side")
        given.pop("side", None)
        self._bring_all()
        with self._guard.gate.change("host.probe(…)"):  # it fills the modules with other numbers
            self._guard.check_paths(self)
            return probe(
                self.model,
                self._implants,
                self.implants,
                given,
                lambda one, modules: self(**one, side=side, modules=modules),
                lambda: self._under(None),
                self._unfed(side or {}),
            )

    def _unfed(self, side: Mapping[str, Side]) -> dict[str, tuple[str, bool]]:
        """Return the modules whose side inputs are not given, with these and whether they act."""
        active = () if self.composition is None else self.composition.names()
        sources = self._context.side_sources.items()
        return {n: (s, n in active) for n, s in sources if s != EXAMPLE and s not in side}

    def plan(self, composition: Compositions | EllipsisType = ...) -> Page:
        """Show how a composition is computed at its sites; left out, the one in force."""
        read = self.composition if composition is ... else self.read(composition)
        return explain(self.model, read)

    def __repr__(self) -> str:
        return self._page()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return self._page()._repr_html_()

    def _page(self) -> Page:
        return describe(self.model, self._implants, self.composition, list(self._waiting))
