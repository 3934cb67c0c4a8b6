"""Hypernetworks: the parameters of any other module, generated from a task embedding."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from modgraft.computation._checks import check_at_least_one, distinct_names
from modgraft.computation._redirect import ModuleTensors, redirect
from modgraft.computation.base import Computation, Wrapper
from modgraft.core.errors import ModgraftError
from modgraft.core.sites import Site


class Generator(nn.Module):
    """φ = H z + b for each tensor, z = [t; s], or z = W₂ relu(W₁ [t; s] + b₁) + b₂.

    Args:
        tasks: the number of tasks.
        embedding: the width e of t and of s.
        hidden: the rows of W₁; None: z = [t; s].
        start: for each head, by name, the tensor that it generates at the start.
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
        """Generate a tensor, flattened, for task number ``task`` and a site's embedding ``[e]``."""
        with torch.autocast(site.device.type, enabled=False):  # parameters are not activations
            z = self.project(torch.cat([self.tasks[task], site]))  # [2e], or [e]
            return self.heads[head](z)


class GeneratedTensors:
    """Reads the tensors that a generator makes for one task at one site."""

    def __init__(
        self, generator: Generator, place: nn.Module, task: int, shapes: Mapping[str, torch.Size]
    ) -> None:
        self.generator, self.place, self.task, self.shapes = generator, place, task, shapes

    def read(self, key: str) -> Tensor:
        """Return the tensor called ``key``, as in a ``state_dict``."""
        shape = self.shapes[key]
        return self.generator(self.task, self.place.site, _head(key, shape)).view(shape)


@final
class HyperNetwork(Wrapper):
    """φ_s = h([t; s]), the parameters of any module at site s for task t.

    A task embedding t ``[e]`` and a site embedding s ``[e]``, both learned, generate each parameter
    of the module by a linear map H and an offset b, as in Platanios et al. 2018 (arXiv:1808.08493):
    φ = H [t; s] + b. With ``hidden`` there are two layers before it, as in HyperFormer (Mahabadi et
    al. 2021, arXiv:2106.04489): φ = H (W₂ relu(W₁ [t; s] + b₁) + b₂) + b. One H serves the
    parameters of one name and shape at all sites. At the start H = 0 and b is the module's usual
    random start, so every task begins as the module itself would.

    For n generated numbers (each name and shape counted once) this learns (2e + 1)·n numbers, or
    (e + 1)·n with ``hidden``, however many tasks and sites there are, and e for each task and each
    site. The parameters are generated at every call. The composition names the task that acts,
    ``host.use("h['fr']")``. After training, :func:`modgraft.add_task` adds another.

    Args:
        module: any computation with parameters.
        tasks: the names of the tasks, one or more.
        embedding: e.
        hidden: the rows of W₁; None: no layers before H.

    Raises:
        ModgraftError: for no task or one named twice, a size below 1, a module without parameters,
            or a module that wraps another.
    """

    tasks: tuple[str, ...]
    embedding: int = 64
    hidden: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        call = f"HyperNetwork(tasks={self.tasks!r})"
        self.tasks = distinct_names(self.tasks, call, ", as tasks=('fr', 'de')")
        check_at_least_one("HyperNetwork", embedding=self.embedding, hidden=self.hidden)
        if isinstance(self.module, Wrapper):
            raise ModgraftError(
                f"HyperNetwork({self.module!r}, …): one generator serves all sites already; write "
                f"HyperNetwork({self.module.unwrapped!r}, tasks={self.tasks!r})"
            )

    def task_names(self, name: str) -> list[str]:
        return [f"{name}[{task!r}]" for task in self.tasks]

    def per_task(self) -> list[Computation]:
        return list(self.views)  # type: ignore[arg-type]

    def with_task(self, task: str) -> HyperNetwork:
        """Return the same hyper-parameters with ``task`` added as the last task."""
        return type(self)(**{**self.config(), "tasks": (*self.tasks, task)})

    def extend(
        self, places: Sequence[HyperNetwork], sites: Sequence[Site], start: int | None
    ) -> nn.Parameter:
        """Add the last of these tasks to ``places``, which were built without it.

        Their existing parameters stay as they are.

        Args:
            places: the network built for each site.
            sites: the site of each place.
            start: the number of the task whose embedding the new one copies; None: the mean of all.

        Returns:
            The new task's embedding ``[e]``.
        """
        generator: Any = places[0].generator
        known = torch.stack([t.detach() for t in generator.tasks])  # [tasks, e]
        new = nn.Parameter(known.mean(dim=0) if start is None else known[start].clone())
        views = self.module.build_all(sites)
        generator.tasks.append(new)
        for place, view in zip(places, views, strict=True):
            place.tasks = self.tasks
            place._add_view(view, generator)
        return new

    def _add_view(self, view: Computation, generator: Generator) -> None:
        """Add ``view``, the module as it acts here for the next task, with generated parameters."""
        views: Any = self.views
        if len(views):  # buffers are not generated: all tasks have the first one's
            redirect(view, [key for key, _ in view.named_buffers()], ModuleTensors(views[0]))
        shapes = {key: tensor.shape for key, tensor in view.named_parameters()}
        redirect(view, shapes, GeneratedTensors(generator, self, len(views), shapes))
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
        # copy before any view is redirected: a copy would take its tensors' source along
        views = [built, *(copy.deepcopy(built) for _ in self.tasks[1:])]
        generator = Generator(len(self.tasks), self.embedding, self.hidden, start)
        places = [type(self)(**self.config()) for _ in sites]
        for place, *of_site in zip(places, *views, strict=True):
            like = next(iter(start.values()))
            site = torch.randn(self.embedding, dtype=like.dtype, device=like.device)
            place.site = nn.Parameter(site / math.sqrt(2 * self.embedding))
            place.views = nn.ModuleList()
            for view in of_site:
                place._add_view(view, generator)
        places[0].generator = generator  # the first site owns it
        return list(places)


def _head(key: str, shape: torch.Size) -> str:
    """Return the name of a tensor's head, ``"down-weight-4x16"``: torch allows no dots in it."""
    return f"{key.replace('.', '-')}-{'x'.join(str(n) for n in shape)}"
