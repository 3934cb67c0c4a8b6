"""Guards the calls of a host: each sees one state of it, from its beginning to its end.

- No module comes or goes while a call runs: :class:`Gate`.
- The layers with modules stand where they stood when these were implanted: :class:`Places`.
- What training moves beside parameters stays where it is, in a host that is frozen:
  :class:`Frozen`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrizations import _SpectralNorm

from modgraft.core.errors import ModgraftError
from modgraft.core.offloaded import REMEDY
from modgraft.core.plain import full_name
from modgraft.core.tensors import is_plain
from modgraft.engine.state import STATE, State

STATISTICS = (_NormBase, _SpectralNorm)
"""Layers that training moves, and that compute in evaluation mode from where they are."""

_LARGE = 2**20
"""Numbers in a buffer that is lent only if the first call moves it."""


class Guard:
    """What the calls of one host may rely on.

    Args:
        host: the host, whose model is ``host.model``.
    """

    def __init__(self, host: nn.Module) -> None:
        self.gate = Gate()
        self._places = Places()
        self.look(host)

    def look(self, host: nn.Module) -> None:
        """See where modules are, and what of the host training would move."""
        self._places.update(host)
        self._frozen = Frozen(host.get_submodule("model"), self.gate)

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

    @contextmanager
    def call(self, host: nn.Module) -> Iterator[None]:
        """Keep them as they are for a call of the host, which may write to copies of its buffers.

        Raises:
            ModgraftError: as :meth:`state` does.
        """
        training = host.training or host.get_submodule("model").training
        with self.state(host), self._frozen.call(training):
            yield


class Gate:
    """Calls enter it, ``with gate:``; a change waits for those inside, and holds off the others.

    What waited while a change was made goes before the next one.

    A call within a call, in the same thread, enters at once. A copy of a host has a gate of its
    own.

    Attributes:
        turn: the lock for what takes no longer than an assignment.
    """

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self._inside: dict[int, int] = {}  # how many calls of each thread are inside
        self._queued = 0  # calls that wait
        self._first = 0  # of these, how many go before the next change
        self._waiting = 0  # changes under way, and those that wait
        self._changing: int | None = None  # the thread whose change is under way

    def __reduce__(self) -> tuple[Callable[[], Gate], tuple[()]]:
        return Gate, ()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self.turn:
            if self._waiting and me not in self._inside and me != self._changing:
                self._wait()
            self._inside[me] = self._inside.get(me, 0) + 1

    def __exit__(self, *_: object) -> None:
        me = threading.get_ident()
        with self.turn:
            left = self._inside.pop(me) - 1
            if left:
                self._inside[me] = left
            elif self._waiting:
                self.turn.notify_all()

    def _wait(self) -> None:
        self._queued += 1
        try:
            while self._waiting and not self._first:
                self.turn.wait()
            self._first = max(0, self._first - 1)
        finally:
            self._queued -= 1
            self._first = min(self._first, self._queued)
            self.turn.notify_all()

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """Wait for the calls inside to end, and hold off others in a ``with`` block.

        Args:
            what: the change, for the error.

        Raises:
            ModgraftError: inside a call of this thread, which would wait for itself.
        """
        me = threading.get_ident()
        if self._changing == me:  # a part of another change
            yield
            return
        with self.turn:
            if me in self._inside:
                raise ModgraftError(
                    f"{what} within a call of this host, as in a hook or a callback: a call sees "
                    f"one state of the host from its beginning to its end; do it when it has ended"
                )
            self._waiting += 1
            try:
                while self._inside or self._first or self._changing is not None:
                    self.turn.wait()
            except BaseException:  # Ctrl-C while waiting
                self._leave()
                raise
            self._changing = me
        try:
            yield
        finally:
            with self.turn:
                self._changing = None
                self._first = self._queued  # change after change would let no call in
                self._leave()

    def _leave(self) -> None:
        self._waiting -= 1
        self.turn.notify_all()


class Places:
    """The layers of a host that have modules, each where it stands in the tree ``host.model``."""

    def __init__(self) -> None:
        self._children: list[dict[str, nn.Module | None]] = []  # of the modules above
        self._names: list[str] = []
        self._modules: list[nn.Module] = []
        self._shapes: dict[nn.Module, dict[str, list[int]]] = {}  # of the layers' own weights
        self._kinds: list[type] = []  # the layers' classes

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kinds": []}  # classes that are made here cannot be pickled

    @property
    def layers(self) -> list[nn.Module]:
        """The layers."""
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
        self._kinds = list(map(type, shapes))

    def check(self, host: nn.Module) -> None:
        """Refuse a call when a layer with modules is no longer part of the model.

        A layer that was only wrapped, for checkpointing for instance, is found again.

        Raises:
            ModgraftError: with the layer's path and the remedy.
        """
        # C over whole lists: this is asked at every call
        self.check_kinds()
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

    def check_kinds(self) -> None:
        """Refuse layers that are of another class since a module was implanted."""
        if all(map(is_, map(type, self._shapes), self._kinds)):  # none: not looked yet
            return
        for layer, kind in zip(self._shapes, self._kinds, strict=True):
            if type(layer) is not kind and STATE in layer.__dict__:  # not taken off for a while
                state: State = layer.__dict__[STATE]
                raise ModgraftError(
                    f"{state.path or 'the model'} is of another class since "
                    f"{', '.join(map(repr, state.entries))} was implanted, as a parametrisation "
                    f"makes it: {type(layer).__name__}. Take that off again, change the model "
                    f"first and implant then"
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


def _shapes(layer: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in layer._parameters.items() if p is not None}


def _compare(at: str, layer: nn.Module, module: object, error: Exception) -> None:
    """Refuse a module on another device than its layer, or of another type where types met."""
    theirs = next((p for p in layer.parameters() if p.is_floating_point()), None)
    own = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if own is None or theirs is None:
        return
    if theirs.is_meta:
        raise ModgraftError(
            f"{at}: the weights of this {type(layer).__name__} are offloaded, and are there only "
            f"while it runs; {REMEDY}"
        ) from error
    types = "type" in str(error)  # torch's words: the same dtype, a scalar type
    if own.device != theirs.device or (types and own.dtype != theirs.dtype):
        raise ModgraftError(
            f"{at} is {own.dtype} on {own.device}, and the layer {theirs.dtype} on "
            f"{theirs.device}: one of them was moved alone; move both, "
            f"host.to({str(theirs.device)!r}, {theirs.dtype})"
        ) from error


class Frozen:
    """The layers of a model that training moves, beside their parameters.

    A layer of running statistics whose parameters are frozen stays in evaluation mode, as the
    frozen batch normalisation of detection models does: it computes in training what it computes
    afterwards. What other layers write while they train (the mean of a codebook, a counter) is lent
    to each call as a copy. Where the parameters train, both move as usual.

    Args:
        model: the host's.
        gate: the host's.
    """

    def __init__(self, model: nn.Module, gate: Gate) -> None:
        self._gate = gate
        self._lent: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._calls = 0  # that have what is lent
        self._look(model)
        self._hold()

    def _look(self, model: nn.Module) -> None:
        self._statistics: list[tuple[nn.Module, nn.Module]] = []
        self._buffers: list[tuple[nn.Module, str, nn.Module]] = []
        for _, layer, part in parts_of(model):
            if isinstance(layer, STATISTICS):
                self._statistics.append((layer, part))
            else:
                self._buffers += [(layer, name, part) for name, _ in kept_buffers(layer)]

    def hold(self, model: nn.Module) -> None:
        """Put layers of running statistics into the mode of their model, frozen ones excepted."""
        now = [layer for layer in model.modules() if isinstance(layer, STATISTICS)]
        if not {layer for layer, _ in self._statistics}.issuperset(now):
            self._look(model)  # some were replaced, by synchronised ones for instance
        for layer, part in self._statistics:
            layer.__dict__["training"] = model.training and not is_frozen(part)

    def _hold(self) -> None:
        for layer, part in self._statistics:
            if layer.training and is_frozen(part):
                layer.__dict__["training"] = False

    def call(self, training: bool) -> AbstractContextManager[None]:
        """Return the context of one call of the host, in which what it may write is a copy.

        Args:
            training: whether the host is in training mode.
        """
        self._hold()  # one may have been frozen, or put into training mode by itself
        return self._lending() if training and self._buffers else nullcontext()

    @contextmanager
    def _lending(self) -> Iterator[None]:
        with self._gate.turn:
            if not self._calls:
                self._lend()
            self._calls += 1
        try:
            yield
        finally:
            with self._gate.turn:
                self._calls -= 1
                if not self._calls:
                    self._give_back()

    def _lend(self) -> None:
        for layer, name, part in self._buffers:
            own = layer._buffers.get(name)
            if own is not None and is_frozen(part):
                copy = own.clone()
                layer._buffers[name] = copy
                self._lent.append((layer, name, own, copy))

    def _give_back(self) -> None:
        still = set()
        for layer, name, own, copy in self._lent:
            moved = layer._buffers.get(name) is not copy or not torch.equal(own, copy)
            if own.numel() > _LARGE and not moved:
                still.add((layer, name))
            layer._buffers[name] = own
        self._lent.clear()
        if still:
            self._buffers = [each for each in self._buffers if each[:2] not in still]


def let_go(model: nn.Module) -> None:
    """Put layers of running statistics into the mode of ``model``, which is no host's any more."""
    for layer in model.modules():
        if isinstance(layer, STATISTICS):
            layer.training = model.training


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield the path of each layer, the layer, and the part whose training moves its buffers.

    That is the layer itself, or where it has no parameters of its own, what is around it.
    """
    around = {model: model}
    for path, layer in model.named_modules():
        own = any(p is not None for p in layer._parameters.values())
        yield path, layer, layer if own else around[layer]
        inner = around[layer] if next(layer.parameters(), None) is None else layer
        around.update((child, inner) for child in layer.children() if child not in around)


def kept_buffers(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a layer itself saves, by name."""
    passing = layer._non_persistent_buffers_set
    for name, own in layer._buffers.items():
        if own is not None and name not in passing and is_plain(own):
            yield name, own


def is_frozen(part: nn.Module) -> bool:
    """Return whether nothing in a part learns."""
    return not any(p.requires_grad for p in part.parameters())
