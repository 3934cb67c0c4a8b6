"""What a host does for its mixtures: where they go, what examples are routed by, their losses."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modgraft.computation.attempt import Attempt
from modgraft.computation.base import Computation
from modgraft.core.context import EXAMPLE, Call, Side
from modgraft.core.embeddings import token_table
from modgraft.core.errors import ModgraftError, SideError
from modgraft.core.expression import Expression, Name, module_of
from modgraft.core.parse import parse
from modgraft.core.sites import Site, find
from modgraft.engine.implant import Implant
from modgraft.engine.inputs.splice import IGNORED
from modgraft.routing.base import Member, Router
from modgraft.routing.losses import example_losses
from modgraft.routing.mixture import ROUTINGS, Mixture

if TYPE_CHECKING:
    from modgraft.host.host import Host


def mixed_sites(host: Host, mixture: Mixture) -> list[str]:
    """The paths where the modules of ``mixture`` are.

    Raises:
        ModgraftError: for a name that is none of a module, or a module that cannot be mixed.
    """
    paths: dict[str, None] = {}
    members = []
    for name in mixture.over:
        read = parse(name, host._context.weights)
        if not isinstance(read, Name) or read.name != name:
            raise ModgraftError(
                f"Mixture({list(mixture.over)}): {name!r} is a composition; a mixture is over "
                f"modules, {', '.join(repr(n) for n in read.names())}"
            )
        implant = host[module_of(name)]
        members.append((name, implant.method.inner))
        if mixture.router is not None:
            _check_admitted(host, mixture.router, name, implant.at_sites(name))
        for label in implant.paths:
            site = find(host.model, label)[0]
            if site.residual or site.parameter is not None:
                raise ModgraftError(
                    f"Mixture({list(mixture.over)}): {name!r} acts at {label}, inside the layer or "
                    f"its residual, where it cannot be weighed; mix modules at layers' outputs"
                )
            paths[site.path] = None
    mixture.check(members)
    return list(paths)


def _check_admitted(
    host: Host, router: Router, name: str, places: Sequence[tuple[str, Computation]]
) -> None:
    for label, place in places:
        site = find(host.model, label)[0]
        why = router.objection(Member(place, site.part), site.module)
        if why is not None:
            raise ModgraftError(
                f"Mixture(router={router!r}): {name!r}, a {type(place).__name__} at {label}, "
                f"{why}; leave it out, or take router=Similarity(), which asks nothing of modules"
            )


def check_unmixed(host: Host, names: Sequence[str]) -> None:
    """Refuse to take a module out that a mixture is over."""
    for name, implant in host.implants.items():
        method: Any = implant.method
        if lost := [n for n in names if n in method.members]:
            what = "the mixture" if isinstance(method, Mixture) else f"the {type(method).__name__}"
            raise ModgraftError(
                f"{lost[0]!r} is in {what} {name!r}, which would choose among modules that "
                f"are not there; host.remove({name!r}) first"
            )


def join_prompts(host: Host, implant: Implant) -> None:
    """Let a new ``Attempt`` attend to the prompts that it is over.

    Raises:
        ModgraftError: for names that are none of the host's, or of no prompts as long as its own.
    """
    method: Any = implant.method
    if not isinstance(method.inner, Attempt):
        return
    if method.inner is not method:
        raise ModgraftError(
            f"{type(method).__name__}({method.inner!r}): an Attempt is over modules of the host, "
            f"and is implanted by itself"
        )
    method.check([(name, host[module_of(name)].method.inner) for name in method.over])
    over = {name: host[module_of(name)].at_sites(name)[0][1] for name in method.over}
    (place,) = implant.places
    place.join(over)  # type: ignore[operator]


def routed(host: Host, call: Call, args: tuple, kwargs: dict[str, Any]) -> Call:
    """``call`` with the choices of the mixtures in force that are one for the whole network.

    They are made before the host runs: what it recomputes in backward finds them made.

    Raises:
        SideError: where nothing of an example may be read, or the host reads no text.
    """
    compiling = torch.compiler.is_compiling()
    names = host._context.weights if compiling else _names(call.composition)
    mixtures = [own for name in names for own in _mixtures(host, name)]
    reads = [name for name, method in mixtures if method.side_source == EXAMPLE]
    reads += [name for name in names if isinstance(host._acts(name), Attempt)]
    if not mixtures and not reads:
        return call
    if reads and EXAMPLE not in call.side:
        side = _example(host, reads[0], args, kwargs, strict=not compiling)
        if side is not None:
            call = replace(call, side={**call.side, EXAMPLE: side})
    like = next(host.model.parameters())
    for name, method in mixtures:
        if method.level == "task" or (method.level == "example" and EXAMPLE in call.side):
            acts: Any = host[module_of(name)].at_sites(name)[0][1]
            acts.mixture.choose(call, None, like, acts.task)
    return call


def _names(composition: Expression | None) -> Sequence[str]:
    return () if composition is None else composition.names()


def _mixtures(host: Host, name: str) -> list[tuple[str, Mixture]]:
    """The mixture called ``name`` and those it is over, if it is one."""
    method = host._acts(name)
    if not isinstance(method, Mixture):
        return []
    return [(name, method), *(own for inner in method.over for own in _mixtures(host, inner))]


def _example(
    host: Host, name: str, args: tuple, kwargs: dict[str, Any], strict: bool
) -> Side | None:
    """What examples are routed by: the embeddings of what may be read of each."""
    parameters = list(inspect.signature(type(host.model).forward).parameters)[1:]
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    ids = given.get("input_ids", args[0] if args else None)
    embeddings = given.get("inputs_embeds")
    if embeddings is None and isinstance(ids, Tensor) and not ids.is_floating_point():
        embeddings = token_table(host.model)(ids)
    if embeddings is None:
        if not strict:  # it may not be in force
            return None
        raise SideError(
            f"{name!r} routes examples, and this call has no text to route them by; pass "
            f"side={{'{EXAMPLE}': mg.Side(vectors[:, None])}}, [batch, 1, d], and say "
            f"Mixture(…, width=d)"
        )
    mask = given.get("attention_mask")
    seen = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
    if isinstance(mask, Tensor) and mask.shape == seen.shape:
        seen = mask.bool()
    labels = given.get("labels")
    causal = Site("", host.model, None, host.model).stepwise
    if causal and isinstance(labels, Tensor) and labels.shape == seen.shape:
        seen = seen & (labels == IGNORED)  # no answer chooses its own module
        if strict and not bool(seen.any(1).all()):
            row = int((~seen.any(1)).nonzero()[0])
            raise SideError(
                f"{name!r} routes examples by what comes before the answer, and every token of "
                f"example {row} has a label; label the prompt {IGNORED}, or pass "
                f"side={{'{EXAMPLE}': mg.Side(vectors[:, None])}}"
            )
    return Side(embeddings.detach(), seen)


def with_routing_losses(out: Any, call: Call, kwargs: dict[str, Any]) -> Any:
    """``out`` with what the routers of this call add to its loss.

    A balance loss is added as it is; a score-function estimator needs what came of each example,
    which is found from logits and labels where they are of the usual shapes.
    """
    loss = getattr(out, "loss", None)
    if not isinstance(loss, Tensor):
        return out
    each = example_losses(getattr(out, "logits", None), kwargs.get("labels"), loss)
    for mixture, routing in call.memo[ROUTINGS]:
        loss = loss + mixture.routing_loss(routing, each)
    out.loss = loss
    return out
