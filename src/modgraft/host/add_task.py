"""Add a task to a hypernetwork after the others have been learned."""

from __future__ import annotations

import torch
from torch import nn

from modgraft.computation.hypernetwork import HyperNetwork
from modgraft.core.errors import ModgraftError, UnknownNameError, an
from modgraft.host.host import Host


def add_task(host: Host, name: str, task: str, like: str | None = None) -> nn.Parameter:
    """Add the embedding of a new task to a ``HyperNetwork``.

    The other tasks compute the same as before, bit for bit. The new one, ``"h['it']"`` in a
    composition, is not put in force. If its embedding alone learns, the other tasks stay the same
    in training as well::

        new = add_task(host, "h", "it")
        host["h"].requires_grad_(False)
        new.requires_grad_(True)
        host.fit(loader, steps=100)  # batches {…, "modules": "h['it']"}

    Args:
        host: where it is implanted.
        name: the hypernetwork's.
        task: the new task's name.
        like: the task whose embedding the new one starts from; None: the mean of all.

    Returns:
        The embedding ``[e]``.

    Raises:
        ModgraftError: for another module, a task in use or without a name, or an unknown ``like``.
    """
    implant = host[name]
    method, call = implant.method, f"add_task(host, {name!r}, {task!r})"
    if not isinstance(method, HyperNetwork):
        raise ModgraftError(
            f"{call}: {name!r} is {an(type(method).__name__)}, which has no tasks; "
            f"mg.HyperNetwork({method!r}, tasks=({task!r},)) has"
        )
    if not isinstance(task, str) or not task:
        raise ModgraftError(f"{call}: a task is a name, as add_task(host, {name!r}, 'it')")
    if task in method.tasks:
        raise ModgraftError(
            f"{call}: {name!r} has that task; its tasks are {', '.join(method.tasks)}"
        )
    if like is not None and like not in method.tasks:
        raise UnknownNameError(
            f"{call}: like={like!r} is no task of {name!r}; its tasks are {', '.join(method.tasks)}"
        )
    sites = [host.sites(label)[0] for label in implant.paths]
    start = None if like is None else method.tasks.index(like)
    grown = method.with_task(task)
    with host._guard.gate.change(call), torch.inference_mode(False):
        new = grown.extend(list(implant.places), sites, start)  # type: ignore[arg-type]
        implant.describe(grown)
        host._graft(implant, sites, implant.names[-1:])
        host._reader.forget()
        host._context.switch(host.composition)
    return new
