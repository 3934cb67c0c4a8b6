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
from contextlib import contextmanager, nullcontext
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from modgraft.core.errors import ModgraftError, some, warn
from modgraft.core.patterns import joined
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
    "is to follow what trains, as a moving average does, let it: {part}.requires_grad_(True); "
    "where the host prepares itself in its first call, make that one bare: host(…, modules=None)"
)

_PUT_BACK = "It was put back"
_STILL_THERE = "What was written now is still there: load the host's weights anew"


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
      each call in training, and to each call with modules in force. Calls that are lent any wait
      for each other.
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
        self._still: set[tuple[str, bool]] = set()  # buffers that the host does not write to
        self._writes_same = False  # whether the host writes to weights what is there
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
        buffers = [place for place in self._places if not isinstance(place.own, nn.Parameter)]
        self._buffers = [place for place in buffers if id(place.of) not in held]
        self._lendable = {place.path for place in self._buffers}
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
        if not in_force:
            with self.lending(training, in_force):
                yield
            return
        self._hold()
        lent = self._to_lend(training)
        with self._turn if lent else nullcontext():
            if self._lent:  # a call within a call
                yield
                return
            own = [place.own for place in self._places]
            counts = _writes(own)
            kind = training, torch.is_grad_enabled()
            number = 3 * self._calls[kind] + 4  # a power of 4 at the 1st, 5th, 21st, 85th …
            watch = (number & (number - 1) == 0 or self._writes_same) and can_watch()
            put_back = attributes_of(model.modules()) if watch else None
            watching = kept(self._frozen(own)) if watch else nullcontext(Written())
            with self._lending(lent, training), watching as written:
                yield
            self._judge(own, counts, written, put_back)
            self._calls[kind] += 1  # one that fails is none

    @contextmanager
    def lending(self, training: bool, in_force: bool) -> Iterator[None]:
        """Let a ``with`` block write to copies of frozen buffers, and say where it has.

        Args:
            training: whether the host is in training mode.
            in_force: whether modules are.
        """
        self._hold()  # one may have been frozen, or put into training mode by itself
        lent = self._to_lend(training) if training or in_force else []
        with self._turn if lent else nullcontext(), self._lending(lent, training):
            yield

    def copies(self, training: bool) -> dict[str, Tensor]:
        """Return copies of the buffers that a call may write to, by path, for compiled code."""
        own = {place.path: place.own for place in self._to_lend(training)}
        return {path: tensor.clone() for path, tensor in own.items() if tensor is not None}

    def _to_lend(self, training: bool) -> list[Place]:
        """Return the places of buffers that a call gets copies of."""
        still = self._still
        return [p for p in self._buffers if (p.path, training) not in still and is_frozen(p.part)]

    @contextmanager
    def _lending(self, places: list[Place], training: bool) -> Iterator[None]:
        if self._lent or not places:  # a call within a call, or nothing that could move
            yield
            return
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
            place.of[place.name] = copy
            self._lent.append((place, own, copy))
        try:
            yield
        finally:
            moved = self._give_back(training)
        if not training:
            self._tell(moved)

    def _tell(self, moved: list[str]) -> None:
        if new := [path for path in moved if path not in self._told]:
            self._told |= set(new)
            warn(_LENT.format(what=some(new)))

    def _give_back(self, training: bool) -> list[str]:
        """Put buffers back, and return the paths of those whose copies were written to."""
        moved = []
        for place, own, copy in self._lent:
            if place.own is not copy or not (own is None or copy is None or same(own, copy)):
                moved.append(place.path)
            elif not training or (own is not None and own.numel() > _LARGE):
                self._still.add((place.path, training))
            place.of[place.name] = own
        self._lent.clear()
        return moved

    def _frozen(self, own: list[Tensor | None]) -> list[Tensor]:
        """Return those tensors that are frozen."""
        frozen = [t for p, t in zip(self._places, own, strict=True) if is_frozen(p.part)]
        return [t for t in frozen if t is not None and not t.is_inference()]

    def _judge(
        self,
        own: list[Tensor | None],
        counts: list[int],
        written: Written,
        put_back: Callable[[], None] | None,
    ) -> None:
        """Put back what a call has replaced, and refuse what it has written.

        Args:
            own: what was in each place before the call.
            counts: of the writes to these, then.
            written: what was written to, and is put back.
            put_back: the same for attributes; None: the call was not watched.

        Raises:
            ModgraftError: with the paths of what is frozen, and the remedy.
        """
        now = [place.own for place in self._places]
        if not written.to and all(map(is_, own, now)) and counts == _writes(now):
            return
        back, there, lent = [], [], []
        for place, tensor, count in zip(self._places, own, counts, strict=True):
            new, storage = place.own, None if tensor is None else storage_of(tensor)
            if new is tensor and storage not in written.to and _writes([new]) == [count]:
                continue
            if not is_frozen(place.part) or any(t is not None and t.is_meta for t in (tensor, new)):
                continue  # an offloaded weight comes and goes
            if new is not tensor:
                place.of[place.name] = tensor
                if tensor is None or new is None or not same(tensor, new):
                    (lent if place.path in self._lendable else back).append(place)
            elif storage in written.changed:
                back.append(place)
            elif put_back is None:
                there.append(place)
            else:
                self._writes_same = True
        self._still -= {(place.path, mode) for place in lent for mode in (True, False)}
        self._tell([place.path for place in lent])
        if found := [*there, *back]:
            if put_back is not None:
                put_back()
            raise ModgraftError(_refusal(found, _STILL_THERE if there else _PUT_BACK))


def _refusal(places: list[Place], now: str) -> str:
    """Say that a host writes to what is frozen, what became of that now, and what to do."""
    layer = places[0].path.rpartition(".")[0]
    part = f"host.model.get_submodule({layer!r})" if layer else "host.model"
    return _REFUSED.format(what=some([place.path for place in places]), now=now, part=part)


def what_moves(model: nn.Module, written: Container[int]) -> list[str]:
    """Say what it means for modules that a forward of ``model`` writes to some storages."""
    own = [p for p in movable(model) if p.own is not None and storage_of(p.own) in written]
    frozen = [p for p in own if isinstance(p.own, nn.Parameter) and is_frozen(p.part)]
    buffers = [p.path for p in own if not isinstance(p.own, nn.Parameter)]
    notes = [_LENT.format(what=some(buffers))] if buffers else []
    return [*notes, *([_refusal(frozen, "Such a call is refused")] if frozen else [])]


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


def _writes(tensors: list[Tensor | None]) -> list[int]:
    """Return how often each tensor was written to, by PyTorch's count; some have none."""
    return [-1 if t is None or t.is_inference() else t._version for t in tensors]


def _view_as(tensor: Tensor, storage: UntypedStorage) -> Tensor:
    """Return what ``tensor`` is of its own memory, of ``storage``."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
