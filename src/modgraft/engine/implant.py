"""The handle of an implanted module: what ``host[name]`` is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from modgraft.computation.base import Computation
from modgraft.core import expression as ex
from modgraft.core.errors import CompositionError, ModgraftError, UnknownNameError
from modgraft.core.sites import Site
from modgraft.routing.mixture import Mixture
from modgraft.routing.stats import Usage


class Implant(nn.Module, ex.Composable):
    """A module φ over all its sites: what is named, trained, saved and shared as a whole.

    Attributes:
        name: its name in compositions.
        method: the computation as the user wrote it, without parameters.
        paths: the labels of its sites, in order.
        places: the built computations, one a site.
    """

    def __init__(self, name: str, method: Computation, sites: Sequence[Site]) -> None:
        super().__init__()
        self.name = name
        self.describe(method)
        self.paths = tuple(site.label for site in sites)
        self.places = nn.ModuleList(method.build_all(sites))

    @property
    def method(self) -> Computation:
        """The computation as the user wrote it."""
        return self._method[0]

    def describe(self, method: Computation) -> None:
        """Say that :attr:`method` is ``method``, as what is built has come to be."""
        self._method = (method,)  # in a tuple: it is a description, not a child with parameters

    @property
    def names(self) -> list[str]:
        """What compositions call it: its name, or ``"name['task']"`` for each of its tasks."""
        return self.method.task_names(self.name)

    def expression(self) -> ex.Expression:
        """It, in a composition: ``host["fr"] >> host["qa"]``.

        Raises:
            CompositionError: for one of several tasks; ``host["h"]["fr"]`` says which.
        """
        if len(self.names) > 1:
            raise CompositionError(
                f"{self.name!r} has {len(self.names)} tasks, and this does not say which; write "
                f"host[{self.name!r}][{self.names[0][len(self.name) + 1 : -1]}], or another of "
                f"{', '.join(self.names)}"
            )
        return ex.Name(self.names[0], of=self)

    def __getitem__(self, task: str) -> ex.Expression:
        """One task of a module that has several."""
        name = f"{self.name}[{task!r}]"
        if name not in self.names:
            raise CompositionError(
                f"{self.name!r} has no task {task!r}; compositions call it {', '.join(self.names)}"
            )
        return ex.Name(name, of=self)

    def stats(self, *, reset: bool = False) -> list[Usage]:
        """What the routers of a mixture have chosen, a row for each of them.

        Args:
            reset: whether the count begins again after it.

        Raises:
            ModgraftError: for a module that is no mixture.
        """
        if not isinstance(self.method, Mixture) or self.method.router is None:
            raise ModgraftError(f"{self.name!r} is a {type(self.method).__name__}; no router in it")
        own = [self.places[0]] if self.method.level != "token" else list(self.places)
        paths = [""] if self.method.level != "token" else self.paths
        found = []
        for path, place in zip(paths, own, strict=True):
            found.append(place.counter.usage(path, tuple(self.method.over)))  # type: ignore[union-attr]
            if reset:
                place.counter.reset()  # type: ignore[union-attr]
        return found

    def at_sites(self, name: str) -> list[tuple[str, Computation]]:
        """What acts under ``name``, one of :attr:`names`, by the label of the site."""
        index = self.names.index(name)
        return [
            (label, place.per_task()[index])  # type: ignore[operator]
            for label, place in zip(self.paths, self.places, strict=True)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the module by ``"<site>:<name>"``."""
        return {
            f"{path}:{key}": tensor
            for path, place in zip(self.paths, self.places, strict=True)
            for key, tensor in place.state_dict().items()
        }

    @property
    def size(self) -> int:
        """How many parameters it has."""
        return sum(p.numel() for p in self.parameters())

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.name!r}, {len(self.paths)} sites, {self.size:,} parameters"


def learner(model: nn.Module, name: str) -> nn.Module | None:
    """The part of a host that ``train=name`` means: ``"host"`` is all of it, ``"host.head"`` what
    is at that path; None for another name, a module's.

    Raises:
        UnknownNameError: if nothing is at that path.
    """
    if name != "host" and not name.startswith("host."):
        return None
    try:
        return model.get_submodule(name.removeprefix("host").removeprefix("."))
    except AttributeError as error:
        children = ", ".join(f"'host.{child}'" for child, _ in model.named_children())
        raise UnknownNameError(f"train={name!r}: {error}; there are {children}") from error


def check_learns(name: str, part: nn.Module) -> nn.Module:
    """``part`` itself, which ``train=name`` means.

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


def check_name(name: str) -> None:
    """Refuse what cannot name a module.

    Raises:
        ModgraftError: for what cannot stand in an expression, and for a name that every
            ``nn.Module`` has an attribute of, since an implant is kept under its own name.
    """
    ex.check_name(name)
    if hasattr(nn.ModuleDict, name):
        raise ModgraftError(
            f"{name!r} cannot name a module: every nn.Module has an attribute of that name; take "
            f"another, such as {name + '_1'!r}"
        )


def check_module(module: Any) -> None:
    """Refuse what cannot be implanted.

    Raises:
        ModgraftError: for what is no computation by its hyper-parameters.
    """
    if not isinstance(module, Computation):
        known = isinstance(module, type) and issubclass(module, Computation)
        call = f"{module.__name__}(…)" if known else "a computation such as LoRA(rank=8)"
        raise ModgraftError(f"{call} is implanted, not {module!r}")
