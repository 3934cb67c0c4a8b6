"""Turn a module whose tensors are generated or shared into an ordinary one."""

from __future__ import annotations

import torch

from modgraft.computation._redirect import ModuleTensors
from modgraft.core import expression as ex
from modgraft.core.errors import ModgraftError
from modgraft.core.parse import parse
from modgraft.engine.implant import Implant
from modgraft.host.host import Host


def own_module(host: Host, name: str, into: str) -> Implant:
    """Implant a copy of a module that has its tensors itself, at each of its sites.

    One task of a ``HyperNetwork`` becomes a module that can be given away without the network; a
    ``Shared`` module gets tensors for each site, which can then be trained apart. The copy computes
    the same.

    Args:
        host: where it is implanted.
        name: ``"h['fr']"`` for a task, ``"m"`` for a module; it stays as it is.
        into: the name of the new module, which is not put in force; ``host.save(into, …)`` saves
            it.

    Raises:
        ModgraftError: for an expression, a task left open, or a name in use.
    """
    host._bring(name)
    read = parse(name, host._implants.names)
    if not isinstance(read, ex.Name):
        raise ModgraftError(
            f"own_module(host, {name!r}, …): one module or one task of it, as \"h['fr']\""
        )
    implant = host[ex.module_of(read.name)]
    labels = list(implant.paths)
    at = None if labels == [""] else labels
    copy = host.implant(into, implant.method.unwrapped, at, active=False)
    for (_, view), place in zip(host._implants.at_sites(read.name), copy.places, strict=True):
        tensors = ModuleTensors(view)
        with torch.no_grad():
            if stored := {key: tensors.read(key) for key in place.state_dict()}:
                place.resize_to(stored)  # type: ignore[operator]
            for key, tensor in place.state_dict().items():
                tensor.copy_(stored[key])
    return copy
