"""Guards the calls of a host: each sees one state of it, from its beginning to its end.

- No module comes or goes while a call runs: :class:`Gate`.
- The layers with modules stand where they stood when these were implanted: :class:`Places`.
- What a frozen host writes to itself stays as it was:
  :class:`~modgraft.engine.frozen.Frozen`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from operator import is_

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from modgraft.core.errors import ModgraftError
from modgraft.core.expression import Expression
from modgraft.core.layers import WEIGHTED
from modgraft.core.offloaded import REMEDY
from modgraft.core.plain import full_name
from modgraft.engine.frozen import STATISTICS, Frozen
from modgraft.engine.plan import Entry
from modgraft.engine.state import STATE, State


class Guard:
    """What the calls of one host may rely on.

    Args:
        host: the host, whose model is ``host.model``.
    """

    def __init__(self, host: nn.Module) -> None:
        self.gate = Gate()
        self._places = Places()
        self._places.update(host)
        self._frozen = Frozen(host.get_submodule("model"))

    def look(self, host: nn.Module) -> None:
        """See where modules are, and what of the host its forward may move."""
        self._places.update(host)
        self._frozen.look(host.get_submodule("model"))

    @property
    def layers(self) -> list[nn.Module]:
        """The layers with modules."""
        return self._places.layers

    def hold(self, model: nn.Module) -> None:
        """Put layers of running statistics into the mode of ``model``, frozen ones excepted."""
        self._frozen.hold(model)

    def trains(self, layer: nn.Module, model: nn.Module) -> bool:
        """Return whether a layer of ``model`` is in training mode, or is held out of it here."""
        return layer.training or (model.training and isinstance(layer, STATISTICS))

    def check_kinds(self) -> None:
        """Refuse to take modules off layers that are of another class since.

        Raises:
            ModgraftError: with the layer's path and the remedy.
        """
        self._places.check_kinds()

    def check_paths(self, host: nn.Module) -> None:
        """Refuse to go by the names of layers that stand elsewhere than they did.

        Raises:
            ModgraftError: with the layer's path and the remedy.
        """
        self._places.check(host)
        model = host.get_submodule("model")
        for layer in self.layers:
            state: State = layer.__dict__[STATE]
            there = _at(model, state.path)
            if there is layer:
                continue
            spread = isinstance(there, DataParallel | DistributedDataParallel)
            if spread or _at(model, full_name(model, state.path)) is not layer:
                name = next(iter(state.entries), "")
                raise ModgraftError(
                    f"{state.path}, the {type(layer).__name__} that {name!r} acts in, was moved or "
                    f"wrapped after that, and this name means something else now. Change the model "
                    f"first and implant then: host.remove({name!r}), and implant it anew"
                )

    @contextmanager
    def state(self, host: nn.Module) -> Iterator[None]:
        """Keep the host's modules and layers as they are in a ``with`` block.

        Raises:
            ModgraftError: where a layer was replaced, resized, or moved alone.
        """
        with self.gate:
            self._places.check(host)
            try:
                yield
            except (RuntimeError, LookupError, AttributeError) as error:
                self._places.explain(error)
                raise

    def check_ran(self, composition: Expression | None) -> None:
        """Refuse a composition that had no effect at a layer, at the end of a call.

        Raises:
            ModgraftError: with the layer's path and the remedy.
        """
        self._places.check_ran(composition)

    def keeping(self, host: nn.Module, in_force: bool) -> AbstractContextManager[None]:
        """Keep what is frozen as it is in a ``with`` block, which runs the host.

        Args:
            host: the host.
            in_force: whether modules are.

        Raises:
            ModgraftError: where the block has written to a frozen weight.
        """
        model = host.get_submodule("model")
        training = host.training or model.training
        in_force = in_force and not self.gate.is_changing()  # a probe puts back what is written
        return self._frozen.keeping(model, training, in_force)

    def copies(self) -> dict[str, Tensor]:
        """Return copies of what compiled code may write to, by their paths in the model.

        Whether modules are in force, and which weights are written to, it cannot ask.
        """
        return self._frozen.copies()

    def entering(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what lets a block that begins now find its buffers again, run once more later."""
        return self._frozen.entering()

    @contextmanager
    def later(self, host: nn.Module, in_force: bool) -> Iterator[None]:
        """Do all of this for a part of a call that runs later, in a ``with`` block."""
        with self.state(host), self.keeping(host, in_force):
            yield


class Gate:
    """Calls enter it, ``with gate:``; a change waits for those inside, and holds off the others.

    What waited while a change was made goes before the next one.

    A call within a call, in the same thread, enters at once. A copy of a host has a gate of its
    own.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._inside: dict[int, int] = {}  # how many calls of each thread are inside
        self._queued = 0  # calls that wait
        self._first = 0  # of these, how many go before the next change
        self._waiting = 0  # changes under way, and those that wait
        self._changing: int | None = None  # the thread whose change is under way

    def __reduce__(self) -> tuple[Callable[[], Gate], tuple[()]]:
        return Gate, ()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._turn:
            if self._waiting and me not in self._inside and me != self._changing:
                self._wait()
            self._inside[me] = self._inside.get(me, 0) + 1

    def __exit__(self, *_: object) -> None:
        me = threading.get_ident()
        with self._turn:
            left = self._inside.pop(me) - 1
            if left:
                self._inside[me] = left
            elif self._waiting:
                self._turn.notify_all()

    def is_changing(self) -> bool:
        """Return whether this thread's change is under way."""
        return self._changing == threading.get_ident()

    def _wait(self) -> None:
        self._queued += 1
        try:
            while self._waiting and not self._first:
                self._turn.wait()
            self._first = max(0, self._first - 1)
        finally:
            self._queued -= 1
            self._first = min(self._first, self._queued)
            self._turn.notify_all()

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Wait for the calls inside to end, and hold off others in a ``with`` block.

        Args:
            what: the change, for the error.

        Raises:
            ModgraftError: inside a call of this thread, which would wait for itself.
        """
        me = threading.get_ident()
        if self.is_changing():  # a part of another change
            yield
            return
        with self._turn:
            if me in self._inside:
                raise ModgraftError(
                    f"{what} within a call of this host, as in a hook or a callback: a call sees "
                    f"one state of the host from its beginning to its end; do it when it has ended"
                )
            self._waiting += 1
            try:
                while self._inside or self._first or self._changing is not None:
                    self._turn.wait()
            except BaseException:  # Ctrl-C while waiting
                self._leave()
                raise
            self._changing = me
        try:
            yield
        finally:
            with self._turn:
                self._changing = None
                self._first = self._queued  # change after change would let no call in
                self._leave()

    def _leave(self) -> None:
        self._waiting -= 1
        self._turn.notify_all()


Owners = list[tuple[str, nn.Module]]
"""Layers that have a parameter, with their paths."""


class Places:
    """The layers of a host that have modules, each where it stands in the tree ``host.model``."""

    def __init__(self) -> None:
        self._children: list[dict[str, nn.Module | None]] = []  # of the modules above
        self._names: list[str] = []
        self._modules: list[nn.Module] = []
        self._shapes: dict[nn.Module, dict[str, list[int]]] = {}  # of the layers' own weights
        self._kinds: list[type] = []  # the layers' classes
        self._empty: list[tuple[nn.Module, Entry]] = []  # modules without data, as on meta
        self._tied: list[tuple[nn.Module, Owners]] = []  # layers, and who has their weights too

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kinds": []}  # classes that are made here cannot be pickled

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that have modules."""
        return list(self._shapes)

    def update(self, host: nn.Module) -> None:
        """Note every step on the ways from the host to its layers, and their weights' shapes."""
        above: dict[nn.Module, tuple[nn.Module, str]] = {}
        steps: dict[nn.Module, tuple[nn.Module, str]] = {}
        shapes = {}
        above[host.get_submodule("model")] = host, "model"
        for module in host.get_submodule("model").modules():
            for name, child in module.named_children():
                above.setdefault(child, (module, name))
            if STATE not in module.__dict__:
                continue
            shapes[module] = self._shapes.get(module) or _shapes(module)
            step = module
            while step is not host and step not in steps:
                steps[step] = above[step]
                step = above[step][0]
        self._children = [parent._modules for parent, _ in steps.values()]
        self._names = [name for _, name in steps.values()]
        self._modules, self._shapes = list(steps), shapes
        self._tied = _tied(host.get_submodule("model"), shapes)
        self._kinds = list(map(type, shapes))
        self._empty = [
            (layer, entry)
            for layer in shapes
            for entry in layer.__dict__[STATE].every()
            if isinstance(entry.module, nn.Module)
            and any(p.is_meta for p in entry.module.parameters())
        ]

    def check(self, host: nn.Module) -> None:
        """Refuse a call when a layer with modules is no longer part of the model.

        A layer that was only wrapped, for checkpointing for instance, is found again.

        Raises:
            ModgraftError: with the layer's path and the remedy.
        """
        # C over whole lists: this is asked at every call
        self.check_kinds()
        for layer, entry in self._empty:  # torch multiplies a tensor by one without data unasked
            _compare(f"{entry.name!r} at {layer.__dict__[STATE].path}", layer, entry.module)
        if all(map(is_, map(dict.get, self._children, self._names), self._modules)):
            return
        found = set(host.get_submodule("model").modules())
        for layer in self.layers:
            if layer not in found:
                state = layer.__dict__[STATE]
                names = ", ".join(map(repr, state.entries))
                raise ModgraftError(
                    f"{state.path or 'the model'}, the {type(layer).__name__} that {names} acts "
                    f"in, is no longer part of the host's model: it was replaced, as "
                    f"resize_token_embeddings does. Change the model first and implant then: "
                    f"host.remove({next(iter(state.entries))!r}), and implant it anew"
                )
        self.update(host)

    def check_ran(self, composition: Expression | None) -> None:
        """Refuse a composition that acts at a layer that never runs and whose weight nobody reads
        there: others have the weight too, and are run with it as it is.

        Raises:
            ModgraftError: with their paths.
        """
        for layer, others in self._tied if composition is not None else ():
            state: State = layer.__dict__[STATE]
            acts = [m.__dict__[STATE].entries for _, m in others if STATE in m.__dict__]
            names = [
                name
                for name in composition.names()  # type: ignore[union-attr]
                if name in state.entries and not any(name in entries for entries in acts)
            ]
            if names and not (state.called or state.read):
                paths = [path for path, _ in others]
                raise ModgraftError(
                    f"{', '.join(map(repr, names))} had no effect at {state.path}: this "
                    f"{type(layer).__name__} never runs, and its weight is that of "
                    f"{', '.join(paths)} too, which run with it as it is; "
                    f"host.remove({names[0]!r}), and implant it at={paths[:2]!r}"
                )

    def check_kinds(self) -> None:
        """Refuse layers that are of another class since a module was implanted."""
        if all(map(is_, map(type, self._shapes), self._kinds)):  # none: not looked yet
            return
        for layer, kind in zip(self._shapes, self._kinds, strict=True):
            if type(layer) is not kind and STATE in layer.__dict__:  # not taken off for a while
                state: State = layer.__dict__[STATE]
                raise ModgraftError(
                    f"{state.path or 'the model'} is of another class since "
                    f"{', '.join(map(repr, state.entries))} was implanted, as a parametrisation or "
                    f"fully_shard makes it: {type(layer).__name__}. Take that off again, change "
                    f"the model first and implant then"
                )

    def explain(self, error: Exception) -> None:
        """Say why a call has failed with ``error``, where the host was changed under its modules.

        Raises:
            ModgraftError: with the layer's path and the remedy.
        """
        for layer, was in self._shapes.items():
            state: State = layer.__dict__[STATE]
            for entry in state.every():
                at = f"{entry.name!r} at {state.path or 'the model'}"
                if (now := _shapes(layer)) != was:
                    raise ModgraftError(
                        f"{at}: the {type(layer).__name__} had {was} when it was implanted and has "
                        f"{now} now; resize the model first and implant then: "
                        f"host.remove({entry.name!r}), and implant it anew"
                    ) from error
                _compare(at, layer, entry.module, error)


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _tied(model: nn.Module, layers: Iterable[nn.Module]) -> list[tuple[nn.Module, Owners]]:
    """Return those of ``layers`` that have a parameter in common with other layers of the model,
    and these."""
    owners: dict[int, Owners] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values() if isinstance(module, WEIGHTED) else ():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((path, module))
    found = []
    for layer in layers:
        own = [id(p) for p in layer._parameters.values() if p is not None]
        others = [each for key in own for each in owners.get(key, ()) if each[1] is not layer]
        if others:
            found.append((layer, others))
    return found


def _shapes(layer: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in layer._parameters.items() if p is not None}


def _compare(at: str, layer: nn.Module, module: object, error: Exception | None = None) -> None:
    """Refuse a module on another device than its layer, or of another type where types met."""
    theirs = next((p for p in layer.parameters() if p.is_floating_point()), None)
    own = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if own is None or theirs is None:
        return
    if theirs.is_meta and not own.is_meta:
        raise ModgraftError(
            f"{at}: the weights of this {type(layer).__name__} are offloaded, and are there only "
            f"while it runs; {REMEDY}"
        ) from error
    if own.is_meta and not theirs.is_meta:
        raise ModgraftError(
            f"{at} has no data, since the layer was on the meta device when it was implanted; "
            f"host.remove it and implant it anew, now that the layer has weights"
        ) from error
    types = "type" in str(error)  # torch's words: the same dtype, a scalar type
    if own.device != theirs.device or (types and own.dtype != theirs.dtype):
        raise ModgraftError(
            f"{at} is {own.dtype} on {own.device}, and the layer {theirs.dtype} on "
            f"{theirs.device}: one of them was moved alone; move both, "
            f"host.to({str(theirs.device)!r}, {theirs.dtype})"
        ) from error
