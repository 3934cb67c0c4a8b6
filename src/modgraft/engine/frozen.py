"""Keeps a frozen host where it is: what training moves besides parameters does not move.

A layer of running statistics whose parameters are frozen stays in evaluation mode, as the frozen
batch normalisation of detection models does: it computes in training what it computes afterwards.
What other layers write while they train (the mean of a codebook, a counter) is lent to each call as
a copy. Where the parameters train, both move as usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from modgraft.core.gate import Gate

_STATISTICS = (_NormBase, _SpectralNorm)
"""Layers that training moves, and that compute in evaluation mode from where they are."""

_LARGE = 2**20
"""Numbers in a buffer that is lent only if the first call moves it."""


class Frozen:
    """The layers of a model that training moves, beside their parameters.

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
        parts = {model: model}  # with parameters of its own, or around a layer that has none
        for layer in model.modules():
            self._find(layer, parts[layer])
            around = parts[layer] if next(layer.parameters(), None) is None else layer
            parts.update((child, around) for child in layer.children() if child not in parts)

    def _find(self, layer: nn.Module, around: nn.Module) -> None:
        """Find what training moves in ``layer``, which belongs to ``around``."""
        part = layer if any(p is not None for p in layer._parameters.values()) else around
        if not isinstance(layer, _STATISTICS):
            lasting = layer._buffers.keys() - layer._non_persistent_buffers_set
            self._buffers += [(layer, n, part) for n in lasting if layer._buffers[n] is not None]
        else:
            self._statistics.append((layer, part))

    def hold(self, model: nn.Module) -> None:
        """Put layers of running statistics into the mode of their model, frozen ones excepted."""
        now = [layer for layer in model.modules() if isinstance(layer, _STATISTICS)]
        if not {layer for layer, _ in self._statistics}.issuperset(now):
            self._look(model)  # some were replaced, by synchronised ones for instance
        for layer, part in self._statistics:
            layer.training = model.training and not _frozen(part)

    def _hold(self) -> None:
        for layer, part in self._statistics:
            if layer.training and _frozen(part):
                layer.training = False

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
            if own is not None and _frozen(part):
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
        if isinstance(layer, _STATISTICS):
            layer.training = model.training


def _frozen(part: nn.Module) -> bool:
    return not any(p.requires_grad for p in part.parameters())
