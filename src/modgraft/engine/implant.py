"""The modules implanted in a host: :class:`Implant`, one of them, and :class:`Implants`, all."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.base import Computation
from modgraft.core import expression as ex
from modgraft.core.context import Context
from modgraft.core.errors import CompositionError, ModgraftError, UnknownNameError, an
from modgraft.core.parse import parse
from modgraft.core.sites import Site
from modgraft.engine.frozen import STATISTICS, is_frozen, kept_buffers, parts_of
from modgraft.routing.mixture import Mixture
from modgraft.routing.stats import Usage


class Implant(nn.Module, ex.Composable):
    """A module φ at all its sites, which is named, trained and saved as a whole: a host's handle.

    Attributes:
        name: its name in compositions.
        method: the computation as the user wrote it, without parameters.
        paths: the labels of its sites, in order.
        places: the built computations, one a site.
        beside: the names of the host's weights that trained with it, such as a head's, and of the
            buffers that moved with them; they are saved beside it.
        replaced: those tensors as they were before the module was loaded with its own, by name.
        trained_in: the fingerprint of the host it was trained in, if that is not this one.
        provenance: where it comes from, such as the modules that it was merged from; it is saved.
    """

    def __init__(self, name: str, method: Computation, sites: Sequence[Site]) -> None:
        super().__init__()
        self.name = name
        self.describe(method)
        self.paths = tuple(sys.intern(site.label) for site in sites)  # many modules have the same
        self.places = nn.ModuleList(method.build_all(sites))
        self.beside: frozenset[str] = frozenset()
        self.replaced: dict[str, Tensor] = {}
        self.trained_in: dict[str, Any] | None = None
        self.provenance: dict[str, Any] = {}

    @property
    def method(self) -> Computation:
        """The computation as the user wrote it."""
        return self._method[0]

    def describe(self, method: Computation) -> None:
        """Replace :attr:`method`, after what was built from it has changed."""
        self._method = (method,)  # in a tuple: it is a description, not a child with parameters

    @property
    def names(self) -> list[str]:
        """Its names in compositions: its name, or ``"name['task']"`` for each of its tasks."""
        return self.method.task_names(self.name)

    def expression(self) -> ex.Expression:
        """Return it as an operand of a composition: ``host["fr"] >> host["qa"]``.

        Raises:
            CompositionError: for a module of several tasks; ``host["h"]["fr"]`` selects one.
        """
        if len(self.names) > 1:
            raise CompositionError(
                f"{self.name!r} has {len(self.names)} tasks, and this does not say which; write "
                f"host[{self.name!r}][{self.names[0][len(self.name) + 1 : -1]}], or another of "
                f"{', '.join(self.names)}"
            )
        return ex.Name(self.names[0], handle=self)

    def __getitem__(self, task: str) -> ex.Expression:
        """Select one task of a module that has several."""
        name = f"{self.name}[{task!r}]"
        if name not in self.names:
            raise CompositionError(
                f"{self.name!r} has no task {task!r}; compositions call it {', '.join(self.names)}"
            )
        return ex.Name(name, handle=self)

    def stats(self, *, reset: bool = False) -> list[Usage]:
        """Count what the routers of a mixture have chosen, a row for each router.

        Args:
            reset: whether to start counting anew.

        Raises:
            ModgraftError: for a module that is no mixture.
        """
        if not isinstance(self.method, Mixture) or self.method.router is None:
            raise ModgraftError(
                f"{self.name!r} is {an(type(self.method).__name__)}; no router in it"
            )
        places, paths = list(self.places), self.paths
        if self.method.level != "token":  # one choice for the whole network
            places, paths = places[:1], ("",)
        found = []
        for path, place in zip(paths, places, strict=True):
            found.append(place.counter.usage(path, tuple(self.method.over)))  # type: ignore[union-attr]
            if reset:
                place.counter.reset()  # type: ignore[union-attr]
        return found

    def at_sites(self, name: str) -> list[tuple[str, Computation]]:
        """Return the built computations of ``name``, one of :attr:`names`, by the site's label."""
        index = self.names.index(name)
        return [
            (label, place.per_task()[index])  # type: ignore[operator]
            for label, place in zip(self.paths, self.places, strict=True)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the module by ``"<site>:<name>"``."""
        return {
            f"{path}:{key}": tensor
            for path, place in zip(self.paths, self.places, strict=True)
            for key, tensor in place.state_dict().items()
        }

    @property
    def size(self) -> int:
        """The number of its parameters."""
        return sum(p.numel() for p in self.parameters())

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.name!r}, {len(self.paths)} sites, {self.size:,} parameters"


class Implants(Mapping[str, Implant]):
    """The modules implanted in a host, by name.

    A view of ``host.implants``, and not that itself: a module may have any name, also that of a
    method of this class.
    """

    def __init__(self, modules: nn.ModuleDict, context: Context) -> None:
        self._modules, self._context = modules, context

    @property
    def names(self) -> Mapping[str, object]:
        """The names that a composition may use: a module's, or one for each of its tasks."""
        return self._context.names

    def __getitem__(self, name: str) -> Implant:
        if not isinstance(name, str):
            raise CompositionError(f"a module is named by a string, and {name!r} is none")
        if name not in self:
            read = parse(name, self.names)  # raises with the nearest name
            one = ex.module_of(read.names()[0])
            raise CompositionError(f"{str(read)!r} is a composition; a module is host[{one!r}]")
        return self._modules[name]  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return name in self._modules  # type: ignore[operator]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def put_beside(self, implant: Implant, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Write what of the host trained with ``implant`` into ``model``, by name."""
        others = self._beside(implant)
        for name in tensors.keys() - others.keys() - implant.beside:
            implant.replaced[name] = tensor_at(model, name).detach().clone()
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor_at(model, name).copy_(tensor)
        implant.beside |= tensors.keys()

    def take_back(self, implant: Implant, model: nn.Module) -> None:
        """Undo :meth:`put_beside`, where no other module has the same beside it."""
        others = self._beside(implant)
        with torch.no_grad():
            for name, before in implant.replaced.items():
                if name in others:
                    others[name].replaced[name] = before
                else:
                    tensor_at(model, name).copy_(before)

    @contextmanager
    def taken_back_for_now(self, model: nn.Module) -> Iterator[None]:
        """Give ``model`` what it had before modules brought theirs, in a ``with`` block."""
        first: dict[str, Tensor] = {}
        for implant in self.values():
            first = {**implant.replaced, **first}
        brought = {name: tensor_at(model, name).detach().clone() for name in first}
        with torch.no_grad():
            try:
                for name, before in first.items():
                    tensor_at(model, name).copy_(before)
                yield
            finally:
                for name, own in brought.items():
                    tensor_at(model, name).copy_(own)

    def _beside(self, implant: Implant) -> dict[str, Implant]:
        """Return the weights and buffers of the host that trained with others: name → module."""
        others = [other for other in self.values() if other is not implant]
        return {name: other for other in reversed(others) for name in other.beside}

    def computation(self, name: str) -> Computation:
        """Return the computation, without parameters, that ``name`` in a composition means."""
        return self[ex.module_of(name)].method.unwrapped

    def at_sites(self, name: str) -> list[tuple[str, Computation]]:
        """Return the built computations that ``name`` in a composition means, by site's label."""
        return self[ex.module_of(name)].at_sites(name)


def learner(model: nn.Module, name: str, implants: Container[str]) -> nn.Module | None:
    """Find the part of a model that ``train=name`` means.

    ``"host"`` means all of it, ``"host.head"`` the sub-module at that path; None is returned for
    any other name, which is an implanted module's.

    Raises:
        UnknownNameError: if nothing is at that path, or the name is that of a part of the model.
    """
    if name != "host" and not name.startswith("host."):
        own = _meant(model, name)
        if own and name.partition(".")[0] not in implants:
            raise UnknownNameError(
                f"train={name!r}: no module is implanted under this name; the host's own part is "
                f"train={'host.' + own[0]!r}"
            )
        return None
    try:
        if name.endswith("."):
            raise AttributeError("no part of the host has an empty name")
        return model.get_submodule(name.removeprefix("host").removeprefix("."))
    except AttributeError as error:
        children = ", ".join(f"'host.{child}'" for child, _ in model.named_children())
        raise UnknownNameError(f"train={name!r}: {error}; there are {children}") from error


def _meant(model: nn.Module, name: str) -> list[str]:
    """Return the paths of what ``name`` may mean in a model: its end, with another beginning, or
    with one of its weights."""
    paths = [path for path, _ in model.named_modules() if path]
    exact = [path for path in paths if f".{path}".endswith(f".{name}")]
    words = name.split(".")[-2:]
    return exact or [w for w in reversed(words) if len(words) > 1 and w in paths]


def learning_parts(model: nn.Module) -> frozenset[str]:
    """Return the names of what trains in ``model``, unless all of its weights do.

    Those are the weights that require a gradient, and the buffers that move with them. A part that
    trains with a module, such as a head, belongs to it; a host that trains as a whole is another
    host.
    """
    if all(p.requires_grad for p in model.parameters()):
        return frozenset()
    weights = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    return weights.union(name for name, _, learns in moving_buffers(model) if learns)


def moving_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the buffers that belong to weights of ``model``, and whether these learn.

    They are what a layer with weights saves besides them, as a batch normalisation its running
    statistics; one without weights moves with the part that it is in.
    """
    for path, layer, part in parts_of(model):
        if part is layer:
            learns = any(p is not None and p.requires_grad for p in layer._parameters.values())
        elif isinstance(layer, STATISTICS):
            learns = not is_frozen(part)
        else:
            continue
        for name, buffer in kept_buffers(layer):
            if 0 not in buffer.stride():  # a view of one number many times cannot be written to
                yield f"{path}.{name}" if path else name, buffer, learns


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """Return the weight or the buffer of ``model`` of that name."""
    path, _, own = name.rpartition(".")
    buffer = model.get_submodule(path)._buffers.get(own)
    return model.get_parameter(name) if buffer is None else buffer


def check_learns(name: str, part: nn.Module) -> nn.Module:
    """Return ``part``, which ``train=name`` means, if it can learn.

    Raises:
        ModgraftError: if it has no parameters.
    """
    if next(part.parameters(), None) is None:
        what, hint = type(part).__name__, ""
        if isinstance(part, Implant):
            what = part.method
            hint = " The form of a Prompt that learns is SoftPrompt(init=text, tokenizer=tokenizer)"
        raise ModgraftError(
            f"train={name!r}: {what} has no parameters, so nothing of it can be trained; leave it "
            f"out of train=.{hint}"
        )
    return part


_NO_IMPLANTS = nn.ModuleDict()  # an instance has attributes that its class has not


def check_name(name: str) -> None:
    """Refuse a name that a module cannot have.

    Raises:
        ModgraftError: for a name that cannot stand in an expression, or that is an attribute of
            every ``nn.Module``, since a module is an attribute of ``host.implants``.
    """
    ex.check_name(name)
    if hasattr(_NO_IMPLANTS, name):
        raise ModgraftError(
            f"{name!r} cannot name a module: every nn.Module has an attribute of that name; take "
            f"another, such as {name + '_1'!r}"
        )


def check_module(module: Any) -> None:
    """Refuse an object that cannot be implanted.

    Raises:
        ModgraftError: for anything but an instance of a computation.
    """
    if not isinstance(module, Computation):
        known = isinstance(module, type) and issubclass(module, Computation)
        call = f"{module.__name__}(…)" if known else "a computation such as LoRA(rank=8)"
        raise ModgraftError(f"{call} is implanted, not {module!r}")
