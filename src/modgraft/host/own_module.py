"""A module by itself out of one whose tensors are generated or shared."""

from __future__ import annotations

import torch

from modgraft.computation._redirect import ModuleTensors
from modgraft.core import expression as ex
from modgraft.core.errors import ModgraftError
from modgraft.core.parse import parse
from modgraft.engine.implant import Implant
from modgraft.host.host import Host


def own_module(host: Host, name: str, into: str) -> Implant:
    """Implant what acts under ``name`` as an ordinary module with tensors of its own.

    One task of a ``HyperNetwork`` becomes a module that can be shared without the network, and a
    ``Shared`` one gets tensors at each site, which can be trained apart. Both compute what they
    computed before.

    Args:
        host: where it is implanted.
        name: ``"h['fr']"`` for a task, ``"m"`` for a module; it stays as it is.
        into: the name of the new one, which is not put in force. It is what
            ``host.save(into, …)`` shares.

    Raises:
        ModgraftError: for an expression, a task left open, or a name in use.
    """
    read = parse(name, host.implants.names)
    if not isinstance(read, ex.Name):
        raise ModgraftError(
            f"own_module(host, {name!r}, …): one module or one task of it, as \"h['fr']\""
        )
    implant = host[ex.module_of(read.name)]
    labels = list(implant.paths)
    at = None if labels == [""] else labels
    made = host.implant(into, implant.method.inner, at, active=False)
    for (_, view), place in zip(host.implants.at_sites(read.name), made.places, strict=True):
        tensors = ModuleTensors(view)
        with torch.no_grad():
            if stored := {key: tensors.read(key) for key in place.state_dict()}:
                place.resize_to(stored)  # type: ignore[operator]
            for key, tensor in place.state_dict().items():
                tensor.copy_(stored[key])
    return made
