"""Keeps a frozen host as it is, whatever its own forward writes to it.

Statistics and codebooks follow what a model sees in training; the teacher of BYOL or MoCo follows
the weights, and its forward writes it in evaluation too. In a host with modules that would carry
what they do into the host, where ``host.remove`` does not reach it, and other modules would see it.
So a call writes to copies of buffers, and one that writes to frozen weights is refused.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from modgraft.core.errors import ModgraftError, listed, warn
from modgraft.core.patterns import joined
from modgraft.core.sharded import is_sharded
from modgraft.core.tensors import is_plain
from modgraft.engine.writes import Written, attributes_of, can_watch, kept, same, storage_of

STATISTICS = (_NormBase, _SpectralNorm)
"""Layers that training moves, and that compute in evaluation mode from where they are."""

_LARGE = 2**20
"""Numbers in a buffer of which training gets a copy only where it is known to write to it."""

_LENT = (
    "The forward of this host writes to {what}. While modules are in force each call finds there "
    "what the host came with, and what it writes ends with it, so that the frozen host stays as it "
    "is; a forward that reads what an earlier one wrote there does not find it."
)

_REFUSED = (
    "the forward of this host writes to {what}, frozen as it is: with modules in force what it "
    "writes may have their change in it, and would stay when they are removed. {now}. Where this "
    "is to follow what trains, as a moving average does, let it: {part}.requires_grad_(True), or "
    "fit(train=[…, {fit!r}]); where the host prepares itself in its first call, make that one "
    "bare: host(…, modules=None)"
)

_PUT_BACK = "It was put back"
_STILL_THERE = "What was written now is still there: load the host's weights anew"


class Place(NamedTuple):
    """Where a model keeps a tensor.

    Attributes:
        tensors: the layer's dictionary that holds it, of its parameters or of its buffers.
        name: the tensor's name in that dictionary.
        path: its name in the model.
        part: the part of the model by which it is decided whether it is frozen.
    """

    tensors: dict[str, Any]
    name: str
    path: str
    part: nn.Module

    @property
    def own(self) -> Tensor | None:
        """What is there."""
        return self.tensors.get(self.name)


class Frozen:
    """The tensors of a model that its forward may write to.

    - A layer of running statistics whose parameters are frozen stays in evaluation mode, as the
      frozen batch normalisation of detection models does: it computes in training what it computes
      afterwards.
    - What other layers keep in buffers (the mean of a codebook, a counter) is lent as a copy to
      each call in training, and to each call with modules in force. Calls of a host that has such
      buffers wait for each other.
    - A call with modules in force that leaves anything else in a frozen weight, or in the tensor
      that a buffer's copy was made of, is refused. In the 1st, 5th, 21st, 85th … call each write is
      watched and put back. In the others PyTorch's count of writes is compared, which one through
      ``.data`` does not change.

    Where the parameters train, all of them move as usual, and in a bare host what moves in
    evaluation.

    Args:
        model: the host's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._turn = threading.RLock()
        self._lent: list[tuple[Place, Tensor | None, Tensor | None]] = []
        self._calls: Counter[tuple[bool, bool]] = Counter()  # in training, and with gradients
        self._still: set[tuple[str, bool]] = set()  # large buffers that the host does not write to
        self._watches = False  # whether each call is watched: one has written what was there
        self._told: set[str] = set()
        self.look(model)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=threading.RLock())

    def look(self, model: nn.Module) -> None:
        """See what of the model its forward may move."""
        self._statistics = [
            (layer, part) for _, layer, part in parts_of(model) if isinstance(layer, STATISTICS)
        ]
        self._places = list(movable(model))
        held = {id(layer._buffers) for layer, _ in self._statistics}
        weights = {storage_of(p.own) for p in self._places if isinstance(p.own, nn.Parameter)}
        self._buffers = [
            place
            for place in self._places
            if not isinstance(place.own, nn.Parameter)
            and id(place.tensors) not in held
            and (place.own is None or storage_of(place.own) not in weights)
        ]
        self._hold()

    def hold(self, model: nn.Module) -> None:
        """Put layers of running statistics into the mode of their model, frozen ones excepted."""
        self.look(model)  # some may be new, as synchronised ones
        for layer, part in self._statistics:
            layer.__dict__["training"] = model.training and not is_frozen(part)

    def _hold(self) -> None:
        for layer, part in self._statistics:
            if layer.training and is_frozen(part):
                layer.__dict__["training"] = False

    # -- a call

    @contextmanager
    def keeping(self, model: nn.Module, training: bool, in_force: bool) -> Iterator[None]:
        """Keep what is frozen as it is in a ``with`` block, which runs the host.

        Args:
            model: the host's.
            training: whether the host is in training mode.
            in_force: whether modules are.

        Raises:
            ModgraftError: with modules in force, where the block has written to what is frozen.
        """
        self._hold()  # one may have been frozen, or put into training mode by itself
        kind = training, torch.is_grad_enabled()
        number = 3 * self._calls[kind] + 4  # a power of 4 in the 1st, 5th, 21st, 85th …
        watch = in_force and (self._watches or number & (number - 1) == 0) and can_watch()
        with self._turn if watch or self._buffers else nullcontext():
            if self._lent:  # a call within a call
                yield
                return
            if watch:
                self.look(model)  # a part may be new
            lent = self._to_lend(training) if training or in_force else []
            if not in_force:
                with self._lending(lent, training):
                    yield
                return
            call = _Call(model, self._places, watch)
            try:
                with self._lending(lent, training), call.watching():
                    yield
            except BaseException as error:
                if refusal := call.refusal():
                    error.add_note(refusal)
                raise
            if refusal := call.refusal():
                raise ModgraftError(refusal)
            self._calls[kind] += 1  # one that fails is none
            self._watches |= call.has_written

    def _to_lend(self, training: bool) -> list[Place]:
        """Return the places of buffers that a call gets copies of."""
        still = self._still
        return [p for p in self._buffers if (p.path, training) not in still and is_frozen(p.part)]

    @contextmanager
    def _lending(self, places: list[Place], training: bool) -> Iterator[None]:
        """Let a ``with`` block write to copies, and say in evaluation where it has."""
        users = Counter(storage_of(own) for place in places if (own := place.own) is not None)
        copies: dict[int, UntypedStorage] = {}
        for place in places:
            own = copy = place.own
            if own is not None and users[storage_of(own)] > 1:  # which share their numbers
                memory = own.untyped_storage()
                copies[storage_of(own)] = copies.get(storage_of(own)) or memory.clone()
                copy = _view_as(own, copies[storage_of(own)])
            elif own is not None:
                copy = own.clone()
            place.tensors[place.name] = copy
            self._lent.append((place, own, copy))
        try:
            yield
        finally:
            moved = self._give_back(training)
        if not training and (new := [path for path in moved if path not in self._told]):
            self._told |= set(new)
            warn(_LENT.format(what=listed(new, 5)))

    def _give_back(self, training: bool) -> list[str]:
        """Put buffers back, and return the paths of those whose copies were written to."""
        moved = []
        for place, own, copy in self._lent:
            if place.own is not copy or not (own is None or copy is None or same(own, copy)):
                moved.append(place.path)
            elif own is not None and own.numel() > _LARGE:
                self._still.add((place.path, training))
            place.tensors[place.name] = own
        self._lent.clear()
        return moved

    def entering(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what lets a block that begins now find its buffers again, run once more later."""
        now = [(place, own.clone()) for place, *_ in self._lent if (own := place.own) is not None]

        @contextmanager
        def again() -> Iterator[None]:
            with self._turn if now else nullcontext():
                before = [place.own for place, _ in now]
                for place, value in now:
                    place.tensors[place.name] = value.clone()
                try:
                    yield
                finally:
                    for (place, _), own in zip(now, before, strict=True):
                        place.tensors[place.name] = own

        return again

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the buffers that are frozen, by path, for compiled code.

        It drops those that it does not write to.
        """
        own = {place.path: place.own for place in self._buffers if is_frozen(place.part)}
        return {path: tensor.clone() for path, tensor in own.items() if tensor is not None}


class _Call:
    """What a call with modules in force finds in a model that is frozen, and leaves there.

    Args:
        model: the host's.
        places: of the tensors that it may write to.
        watch: whether each write is seen, and put back.

    Attributes:
        has_written: whether it has written what was there.
    """

    def __init__(self, model: nn.Module, places: list[Place], watch: bool) -> None:
        self._model, self._places = model, places
        self._own = [place.own for place in places]
        self._counts = _writes(self._own)
        self._put_back = attributes_of(model.modules()) if watch else None
        self._written = Written()
        self.has_written = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put back what a ``with`` block writes to frozen tensors, if it is watched."""
        if self._put_back is None:
            yield
            return
        own = [(t, is_frozen(p.part)) for p, t in zip(self._places, self._own, strict=True)]
        trains = {storage_of(t) for t, frozen in own if t is not None and not frozen}
        frozen = [
            t for t, f in own if f and t is not None and not (t.is_inference() or is_sharded(t))
        ]
        with kept(t for t in frozen if storage_of(t) not in trains) as self._written:
            yield

    def refusal(self) -> str:
        """Put back what was replaced, and say what was written to; "": nothing that is frozen."""
        back, there = self._other_places(), []
        for place, tensor in self._touched():
            new = place.own
            place.tensors[place.name] = tensor  # which tells whether the part is frozen
            if not is_frozen(place.part) or _is_elsewhere(tensor) or _is_elsewhere(new):
                place.tensors[place.name] = new
            elif new is not tensor:
                if tensor is None or new is None or not same(tensor, new):
                    back.append(place)
            elif tensor is not None and storage_of(tensor) in self._written.changed:
                back.append(place)
            elif self._put_back is None:
                there.append(place)
            else:
                self.has_written = True
        if not (found := [*there, *back]):
            return ""
        if self._put_back is not None:
            self._put_back()
        return _refusal(found, _STILL_THERE if there else _PUT_BACK)

    def _touched(self) -> list[tuple[Place, Tensor | None]]:
        """Return the places whose tensors were written to or exchanged, each with its own."""
        now = [place.own for place in self._places]
        written = self._written.to
        if not written and all(map(is_, self._own, now)) and self._counts == _writes(now):
            return []
        rows = zip(self._places, self._own, now, self._counts, _writes(now), strict=True)
        return [
            (place, own)
            for place, own, new, before, after in rows
            if own is not new or before != after or (own is not None and storage_of(own) in written)
        ]

    def _other_places(self) -> list[Place]:
        """Return the places that are new, or in a part that was exchanged, if it is watched."""
        if self._put_back is None:
            return []
        known = {place.path: id(place.tensors) for place in self._places}
        found = [
            place for place in movable(self._model) if known.get(place.path) != id(place.tensors)
        ]
        return [place for place in found if is_frozen(place.part)]


def _refusal(places: list[Place], now: str) -> str:
    """Say that a host writes to what is frozen, what became of that now, and what to do."""
    part = places[0].path.rpartition(".")[0]
    what = f"host.model.get_submodule({part!r})" if part else "host.model"
    fit = f"host.{part}" if part else "host"
    paths = listed([place.path for place in places], 5)
    return _REFUSED.format(what=paths, now=now, part=what, fit=fit)


def what_moves(model: nn.Module, written: Container[int]) -> tuple[list[str], list[str]]:
    """Say what it means for modules that a forward of ``model`` writes to some storages.

    Returns:
        What is to be known, and what is refused.
    """
    own = [p for p in movable(model) if p.own is not None and storage_of(p.own) in written]
    weights = [p for p in own if isinstance(p.own, nn.Parameter) and is_frozen(p.part)]
    buffers = [p.path for p in own if not isinstance(p.own, nn.Parameter)]
    notes = [_LENT.format(what=listed(buffers, 5))] if buffers else []
    return notes, [_refusal(weights, "Such a call is refused")] if weights else []


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

    A buffer that is None as yet is one. A table that shortens its own rows, by ``max_norm``, is
    none.
    """
    for path, layer, part in parts_of(model):
        if isinstance(layer, torch.jit.ScriptModule):  # whose code keeps them elsewhere
            continue
        for name, own in layer._buffers.items():
            passing = name in layer._non_persistent_buffers_set
            if not passing and (own is None or is_plain(own)):
                yield Place(layer._buffers, name, joined(path, name), part)
        if getattr(layer, "max_norm", None) is None:
            for name, own in layer._parameters.items():
                if own is None or own.is_inference():
                    continue
                if is_plain(own) or is_sharded(own):  # which is whole while its layer runs
                    yield Place(layer._parameters, name, joined(path, name), part)


def kept_buffers(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a layer itself saves, by name."""
    passing = layer._non_persistent_buffers_set
    for name, own in layer._buffers.items():
        if own is not None and name not in passing and is_plain(own):
            yield name, own


def is_frozen(part: nn.Module) -> bool:
    """Return whether nothing of a part's own learns, or of what it holds if it has nothing."""
    own = [p for p in part._parameters.values() if p is not None]
    return not any(p.requires_grad for p in (own or part.parameters()))


def _writes(tensors: list[Tensor | None]) -> list[int]:
    """Return how often each tensor was written to, by PyTorch's count; some have none."""
    return [-1 if t is None or t.is_inference() else t._version for t in tensors]


def _is_elsewhere(tensor: Tensor | None) -> bool:
    """Return whether a tensor is there, or there as a whole, only while its layer runs."""
    return tensor is not None and (tensor.is_meta or is_sharded(tensor))


def _view_as(tensor: Tensor, storage: UntypedStorage) -> Tensor:
    """Return what ``tensor`` is of its own memory, of ``storage``."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
