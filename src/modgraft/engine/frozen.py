"""Keeps a frozen host as it is, whatever its own forward writes to it.

Statistics and codebooks follow what a model sees in training; the teacher of BYOL or MoCo follows
the weights, and its forward writes it in evaluation too. In a host with modules that would carry
what they do into the host, where ``host.remove`` does not reach it, and other modules would see it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from modgraft.core.patterns import joined
from modgraft.core.tensors import is_plain, tensors_in
from modgraft.engine.writes import can_watch, kept, storage_of

STATISTICS = (_NormBase, _SpectralNorm)
"""Layers that training moves, and that compute in evaluation mode from where they are."""

_LARGE = 2**20
"""Numbers in a buffer that is lent only if the first call moves it."""

WRITES = (
    "The forward of this host writes to {what}. While modules are in force each call finds there "
    "what the host came with, and what it writes ends with it, so that the frozen host stays as it "
    "is; a forward that reads what an earlier one wrote there does not find it."
)

_FIRST = (
    " What this call has written, the first to do so, is still there, and may have the change of "
    "the modules in it: load the host's weights anew."
)


class Place(NamedTuple):
    """Where a model keeps a tensor.

    Attributes:
        of: the parameters or the buffers of a layer, by name.
        name: the tensor's, there.
        path: the tensor's, in the model.
        part: what is frozen or trains.
    """

    of: dict[str, Any]
    name: str
    path: str
    part: nn.Module

    @property
    def own(self) -> Tensor | None:
        """What is there."""
        return self.of.get(self.name)


class Frozen:
    """The tensors of a model that its forward may write to.

    - A layer of running statistics whose parameters are frozen stays in evaluation mode, as the
      frozen batch normalisation of detection models does: it computes in training what it computes
      afterwards.
    - What other layers keep in buffers (the mean of a codebook, a counter) is lent as a copy to
      each call in training, and to each call with modules in force.
    - So is a frozen weight that the forward writes to, with modules in force. Which weights these
      are, the first such call shows.

    Where the parameters train, all of them move as usual, and in a bare host what moves in
    evaluation.

    Args:
        model: the host's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._turn = threading.Lock()
        self._lent: list[tuple[Place, Tensor, Tensor]] = []
        self._calls = 0  # that have what is lent
        self._seen: set[bool] = set()  # whether the first call in training, in evaluation was seen
        self._written: set[str] = set()  # weights that the forward writes to
        self._still: set[tuple[str, bool]] = set()  # large buffers that it does not write to
        self._told: set[str] = set()
        self.look(model)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=threading.Lock())

    def look(self, model: nn.Module) -> None:
        """See what of the model its forward may move."""
        self._statistics = [
            (layer, part) for _, layer, part in parts_of(model) if isinstance(layer, STATISTICS)
        ]
        places = list(movable(model))
        self._buffers = [p for p in places if not isinstance(p.own, nn.Parameter)]
        self._weights = [p for p in places if isinstance(p.own, nn.Parameter)]
        self._hold()

    def hold(self, model: nn.Module) -> None:
        """Put layers of running statistics into the mode of their model, frozen ones excepted."""
        now = [layer for layer in model.modules() if isinstance(layer, STATISTICS)]
        if not {layer for layer, _ in self._statistics}.issuperset(now):
            self.look(model)  # some were replaced, by synchronised ones for instance
        for layer, part in self._statistics:
            layer.__dict__["training"] = model.training and not is_frozen(part)

    def _hold(self) -> None:
        for layer, part in self._statistics:
            if layer.training and is_frozen(part):
                layer.__dict__["training"] = False

    # -- a call

    def run(
        self,
        model: nn.Module,
        call: Callable[[], Any],
        training: bool,
        in_force: bool,
        snapshot: Callable[[], Callable[[], None]],
    ) -> Any:
        """Return ``call()``, in which what the host may write to itself is a copy.

        Args:
            model: the host's.
            call: runs the host.
            training: whether the host is in training mode.
            in_force: whether modules are.
            snapshot: returns what takes back all that ``call()`` leaves beside the host.
        """
        if not in_force:
            with self.lending(training, in_force=False):
                return call()
        if training in self._seen or not can_watch():
            return self._watching_versions(training, call)
        self._seen.add(training)
        take_back = snapshot()
        frozen = [(place, own) for place, own in self._own() if is_frozen(place.part)]
        with self.lending(training, in_force=True), kept(own for _, own in frozen) as written:
            out = call()
        found = [place for place, own in frozen if storage_of(own) in written]
        if not found:
            return out
        self._note(found)
        if not any(t.requires_grad for t in tensors_in(out)):
            return out
        take_back()  # what was written and taken back may be in the graph
        return self.run(model, call, training, in_force, snapshot)

    def _watching_versions(self, training: bool, call: Callable[[], Any]) -> Any:
        """Return ``call()``, and warn where it writes to weights as no call before it did."""
        own = self._own()
        before = [tensor._version for _, tensor in own]
        with self.lending(training, in_force=True):
            out = call()
        after = [tensor._version for _, tensor in own]
        if after != before:
            places = [p for (p, _), a, b in zip(own, before, after, strict=True) if a != b]
            new = [p for p in places if p.path not in self._written and is_frozen(p.part)]
            self._note(new, _FIRST)
        return out

    def _own(self) -> list[tuple[Place, Tensor]]:
        """Return the weights, each with its place."""
        return [(p, own) for p in self._weights if (own := p.own) is not None]

    def _note(self, weights: list[Place], more: str = "") -> None:
        """Note weights that the forward writes to."""
        paths = [place.path for place in weights]
        self._written |= set(paths)
        self._tell(paths, more)

    def _tell(self, paths: list[str], more: str = "") -> None:
        new = [path for path in paths if path not in self._told]
        if new:
            self._told |= set(new)
            warnings.warn(WRITES.format(what=", ".join(new)) + more, stacklevel=2)

    @contextmanager
    def lending(self, training: bool, in_force: bool) -> Iterator[None]:
        """Let a call of the host write to copies in a ``with`` block.

        Args:
            training: whether the host is in training mode.
            in_force: whether modules are in force.
        """
        self._hold()  # one may have been frozen, or put into training mode by itself
        if not (training or in_force) or not (self._buffers or self._written):
            yield
            return
        with self._turn:
            if not self._calls:
                self._lend(training)
            self._calls += 1
        try:
            yield
        finally:
            with self._turn:
                self._calls -= 1
                if not self._calls:
                    self._give_back(training)

    def _lend(self, training: bool) -> None:
        copies: dict[Tensor, Tensor] = {}  # tied weights have one
        for place in self._buffers:
            own = place.own
            still = (place.path, training) in self._still
            if own is not None and not still and is_frozen(place.part):
                copies[own] = own.clone()
                self._exchange(place, own, copies[own])
        for place, own in self._own() if self._written else ():
            if place.path in self._written and is_frozen(place.part):
                if own not in copies:
                    copies[own] = nn.Parameter(own.detach().clone(), requires_grad=False)
                self._exchange(place, own, copies[own])

    def _exchange(self, place: Place, own: Tensor, copy: Tensor) -> None:
        place.of[place.name] = copy
        self._lent.append((place, own, copy))

    def _give_back(self, training: bool) -> None:
        moved = []
        for place, own, copy in self._lent:
            if not isinstance(own, nn.Parameter):
                if place.own is not copy or not torch.equal(own, copy):
                    moved.append(place.path)
                elif own.numel() > _LARGE:
                    self._still.add((place.path, training))
            place.of[place.name] = own
        self._lent.clear()
        if not training:
            self._tell(moved)


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


def movable(model: nn.Module) -> Iterator[Place]:
    """Yield the tensors of ``model`` that its forward may write to, and that are saved.

    Running statistics are none of them, nor a table that shortens its own rows, by ``max_norm``.
    """
    for path, layer, part in parts_of(model):
        if isinstance(layer, torch.jit.ScriptModule):  # whose code keeps them elsewhere
            continue
        if not isinstance(layer, STATISTICS):
            for name, _ in kept_buffers(layer):
                yield Place(layer._buffers, name, joined(path, name), part)
        if getattr(layer, "max_norm", None) is None:
            for name, own in layer._parameters.items():
                if own is not None and is_plain(own) and not own.is_inference():
                    yield Place(layer._parameters, name, joined(path, name), part)


def kept_buffers(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a layer itself saves, by name."""
    passing = layer._non_persistent_buffers_set
    for name, own in layer._buffers.items():
        if own is not None and name not in passing and is_plain(own):
            yield name, own


def is_frozen(part: nn.Module) -> bool:
    """Return whether nothing in a part learns."""
    return not any(p.requires_grad for p in part.parameters())
