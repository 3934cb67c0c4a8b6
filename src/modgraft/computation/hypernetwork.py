"""Hypernetworks: the tensors of any other module, generated from a task embedding."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from modgraft.computation._redirect import ModuleTensors, redirect
from modgraft.computation.base import Computation, Wrapper
from modgraft.core.errors import ModgraftError
from modgraft.core.sites import Site


class Generator(nn.Module):
    """φ = H z + b for each tensor, z = [t; s], or z = W₂ relu(W₁ [t; s] + b₁) + b₂.

    Args:
        tasks: how many.
        embedding: the width e of t and of s.
        hidden: the rows of W₁; None: z = [t; s].
        start: by head, the tensor that it generates at the start.
    """

    def __init__(
        self, tasks: int, embedding: int, hidden: int | None, start: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        like = next(iter(start.values()))
        kind = {"device": like.device, "dtype": like.dtype}
        drawn = torch.randn(tasks, embedding, **kind) / math.sqrt(2 * embedding)
        self.tasks = nn.ParameterList(nn.Parameter(row.clone()) for row in drawn)  # each [e]
        self.project = nn.Sequential()
        width = 2 * embedding
        if hidden is not None:
            self.project.append(nn.Linear(width, hidden, **kind))
            self.project.append(nn.ReLU())
            self.project.append(nn.Linear(hidden, embedding, **kind))
            width = embedding
        self.heads = nn.ModuleDict()
        for head, tensor in start.items():
            linear = nn.Linear(width, tensor.numel(), **kind)
            with torch.no_grad():
                linear.weight.zero_()
                linear.bias.copy_(tensor.flatten())
            self.heads[head] = linear

    def forward(self, task: int, site: Tensor, head: str) -> Tensor:
        """What ``head`` makes for a task, by its number, and a site's embedding ``[e]``, flat."""
        with torch.autocast(site.device.type, enabled=False):  # parameters are not activations
            z = self.project(torch.cat([self.tasks[task], site]))  # [2e], or [e]
            return self.heads[head](z)


class Generated:
    """Lends the tensors that are generated for one task at one site."""

    def __init__(
        self, generator: Generator, place: nn.Module, task: int, shapes: Mapping[str, torch.Size]
    ) -> None:
        self.generator, self.place, self.task, self.shapes = generator, place, task, shapes

    def read(self, key: str) -> Tensor:
        """The tensor called ``key``, as in a ``state_dict``."""
        shape = self.shapes[key]
        return self.generator(self.task, self.place.site, _head(key, shape)).view(shape)


@final
class HyperNetwork(Wrapper):
    """φ_s = h([t; s]), the tensors of any module at site s for task t; as its module at birth.

    A task embedding t ``[e]`` and a site embedding s ``[e]``, both learned, generate each tensor of
    the module by a linear map H and an offset b, that of Platanios et al. 2018 (arXiv:1808.08493):
    φ = H [t; s] + b. With ``hidden`` there are two layers before it, as in HyperFormer (Mahabadi et
    al. 2021, arXiv:2106.04489): φ = H (W₂ relu(W₁ [t; s] + b₁) + b₂) + b. One H serves a tensor of
    one name and shape at all sites. H = 0 at the start and b is what the module draws for itself,
    so that each task begins as the module does.

    For n numbers to be generated this learns (2e + 1)·n, or (e + 1)·n with ``hidden``, however many
    the tasks and sites are (n counts a name and shape once), and e for each task and each site; it
    generates anew at every call. Which task acts is said in the composition:
    ``host.use("h['fr']")``. After training, :func:`modgraft.add_task` adds one.

    Args:
        module: any computation with parameters.
        tasks: their names, one or more.
        embedding: e.
        hidden: the rows of W₁.

    Raises:
        ModgraftError: for tasks that are no different names, a size below 1, or a module without
            parameters, or over another.
    """

    tasks: tuple[str, ...]
    embedding: int = 64
    hidden: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        tasks = () if isinstance(self.tasks, str) else tuple(self.tasks)
        named = all(isinstance(task, str) and task for task in tasks)
        if not tasks or not named or len(set(tasks)) != len(tasks):
            raise ModgraftError(
                f"HyperNetwork(tasks={self.tasks!r}): one or more different names, as "
                f"tasks=('fr', 'de')"
            )
        self.tasks = tasks
        if self.embedding < 1 or (self.hidden is not None and self.hidden < 1):
            raise ModgraftError(
                f"HyperNetwork(embedding={self.embedding}, hidden={self.hidden}): both are at "
                f"least 1, or hidden=None"
            )
        if isinstance(self.module, Wrapper):
            raise ModgraftError(
                f"HyperNetwork({self.module!r}, …): one generator serves all sites already; write "
                f"HyperNetwork({self.module.inner!r}, tasks={self.tasks!r})"
            )

    def task_names(self, name: str) -> list[str]:
        return [f"{name}[{task!r}]" for task in self.tasks]

    def per_task(self) -> list[Computation]:
        return list(self.views)  # type: ignore[arg-type]

    def and_task(self, task: str) -> HyperNetwork:
        """The same hyper-parameters with one task more, the last."""
        return type(self)(**{**self.config(), "tasks": (*self.tasks, task)})

    def extend(
        self, places: Sequence[HyperNetwork], sites: Sequence[Site], start: int | None
    ) -> nn.Parameter:
        """Give ``places``, built at ``sites`` without it, the last of these tasks.

        No tensor of theirs is touched.

        Args:
            places: in their order.
            sites: where they are.
            start: the number of the task whose embedding the new one begins as; None: the mean.

        Returns:
            The new embedding ``[e]``.
        """
        generator: Any = places[0].generator
        known = torch.stack([t.detach() for t in generator.tasks])  # [tasks, e]
        new = nn.Parameter(known.mean(dim=0) if start is None else known[start].clone())
        views = self.module.build_all(sites)
        generator.tasks.append(new)
        for place, view in zip(places, views, strict=True):
            place.tasks = self.tasks
            place.take(view, generator)
        return new

    def take(self, view: Computation, generator: Generator) -> None:
        """Let ``view`` act here for the next task, with tensors that ``generator`` makes."""
        views: Any = self.views
        if len(views):  # what is not generated is one for all tasks
            redirect(view, [key for key, _ in view.named_buffers()], ModuleTensors(views[0]))
        shapes = {key: tensor.shape for key, tensor in view.named_parameters()}
        redirect(view, shapes, Generated(generator, self, len(views), shapes))
        views.append(view)

    def build_all(self, sites: Sequence[Site]) -> list[Computation]:
        built = self.module.build_all(sites)
        start: dict[str, Tensor] = {}
        for view in built:
            for key, tensor in view.named_parameters():
                start.setdefault(_head(key, tensor.shape), tensor.detach())
        if not start:
            raise ModgraftError(
                f"HyperNetwork({self.module!r}, …): it has no parameters that could be generated; "
                f"implant {self.module!r} itself"
            )
        # all copies are made while a view still has its tensors, and no lender to copy with it
        views = [built, *(copy.deepcopy(built) for _ in self.tasks[1:])]
        generator = Generator(len(self.tasks), self.embedding, self.hidden, start)
        places = [type(self)(**self.config()) for _ in sites]
        for place, *of_site in zip(places, *views, strict=True):
            like = next(iter(start.values()))
            site = torch.randn(self.embedding, dtype=like.dtype, device=like.device)
            place.site = nn.Parameter(site / math.sqrt(2 * self.embedding))
            place.views = nn.ModuleList()
            for view in of_site:
                place.take(view, generator)
        places[0].generator = generator  # the first site owns it
        return list(places)


def _head(key: str, shape: torch.Size) -> str:
    """The name of the head for a tensor, ``"down-weight-4x16"``: a module's name has no dots."""
    return f"{key.replace('.', '-')}-{'x'.join(str(n) for n in shape)}"
