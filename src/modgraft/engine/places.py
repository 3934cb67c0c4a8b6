"""Sees a host change under its modules: a layer that is replaced, resized, or moved alone."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_

from torch import nn

from modgraft.core.errors import ModgraftError
from modgraft.engine.state import STATE, State


class Places:
    """The layers of a host that have modules, each where it stands in the tree ``host.model``."""

    def __init__(self) -> None:
        self._children: list[dict[str, nn.Module | None]] = []  # of the modules above
        self._names: list[str] = []
        self._modules: list[nn.Module] = []
        self._shapes: dict[nn.Module, dict[str, list[int]]] = {}  # of the layers' own weights

    @property
    def layers(self) -> Iterable[nn.Module]:
        """The layers."""
        return self._shapes.keys()

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

    def check(self, host: nn.Module) -> None:
        """Refuse a call when a layer with modules is no longer part of the model.

        A layer that was only wrapped, for checkpointing for instance, is found again.

        Raises:
            ModgraftError: with the layer's path and the remedy.
        """
        # C over whole lists: this is asked at every call
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

    def explain(self, error: Exception) -> None:
        """Say why a call has failed with ``error``, where the host was changed under its modules.

        Raises:
            ModgraftError: with the layer's path and the remedy.
        """
        for layer, was in self._shapes.items():
            state: State = layer.__dict__[STATE]
            for entry in (entry for some in state.entries.values() for entry in some):
                at = f"{entry.name!r} at {state.path or 'the model'}"
                if (now := _shapes(layer)) != was:
                    raise ModgraftError(
                        f"{at}: the {type(layer).__name__} had {was} when it was implanted and has "
                        f"{now} now; resize the model first and implant then: "
                        f"host.remove({entry.name!r}), and implant it anew"
                    ) from error
                _compare(at, layer, entry.module, error)


def _shapes(layer: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in layer._parameters.items() if p is not None}


def _compare(at: str, layer: nn.Module, module: object, error: Exception) -> None:
    """Refuse a module on another device than its layer, or of another type where types met."""
    theirs = next((p for p in layer.parameters() if p.is_floating_point()), None)
    own = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if own is None or theirs is None:
        return
    types = "type" in str(error)  # torch's words: the same dtype, a scalar type
    if own.device != theirs.device or (types and own.dtype != theirs.dtype):
        raise ModgraftError(
            f"{at} is {own.dtype} on {own.device}, and the layer {theirs.dtype} on "
            f"{theirs.device}: one of them was moved alone; move both, "
            f"host.to({str(theirs.device)!r}, {theirs.dtype})"
        ) from error
