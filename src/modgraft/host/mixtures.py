"""What a host does for its mixtures: find their sites, route whole examples, add their losses."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.attempt import Attempt
from modgraft.computation.base import Computation
from modgraft.core.call import Call
from modgraft.core.embeddings import token_table
from modgraft.core.errors import CompositionError, ModgraftError, SideError
from modgraft.core.expression import Name, module_of
from modgraft.core.parse import parse
from modgraft.core.side import EXAMPLE, Side
from modgraft.core.sites import RESIDUAL, Site, find
from modgraft.engine.implant import Implant, Implants
from modgraft.engine.inputs.rows import IGNORED
from modgraft.routing.base import Member, Router
from modgraft.routing.mixture import Mixture


def mixed_sites(model: nn.Module, implants: Implants, mixture: Mixture) -> list[str]:
    """Return the paths of the layers at which the modules of ``mixture`` act.

    Raises:
        ModgraftError: for a name that is no module's, or a module that cannot be mixed.
    """
    paths: dict[str, None] = {}
    members = []
    for name in mixture.over:
        try:
            read = parse(name, implants.names)
        except CompositionError as error:
            raise CompositionError(f"Mixture({list(mixture.over)}): {error}") from error
        if not isinstance(read, Name) or read.name != name:
            raise ModgraftError(
                f"Mixture({list(mixture.over)}): {name!r} is a composition; a mixture is over "
                f"modules, {', '.join(repr(n) for n in read.names())}"
            )
        implant = implants[module_of(name)]
        members.append((name, implant.method.unwrapped))
        if getattr(implant.method.unwrapped, "positions", 0):
            raise ModgraftError(
                f"Mixture({list(mixture.over)}): {name!r} counts as positions, and what is chosen "
                f"by a router cannot move the text; mix prefixes without counted=True"
            )
        if mixture.router is not None:
            _check_admitted(model, mixture.router, name, implant.at_sites(name))
        for label in implant.paths:
            site = find(model, label)[0]
            weighed = mixture.level == "example" and mixture.aggregate.is_weighted_sum
            routed = site.residual and mixture.router is not None
            if routed or (site.parameter is not None and not weighed):
                or_else = "" if site.residual else ", or route examples, Soft(level='example')"
                raise ModgraftError(
                    f"Mixture({list(mixture.over)}): {name!r} acts at {label}, inside the layer or "
                    f"its residual, where it cannot be weighed; mix modules at layers' "
                    f"outputs{or_else}"
                )
            paths[f"{site.path}{RESIDUAL if site.residual else ''}"] = None
    mixture.check(members)
    return list(paths)


def _check_admitted(
    model: nn.Module, router: Router, name: str, places: Sequence[tuple[str, Computation]]
) -> None:
    for label, place in places:
        site = find(model, label)[0]
        why = router.objection(Member(place, site.part), site.module)
        if why is not None:
            raise ModgraftError(
                f"Mixture(router={router!r}): {name!r}, a {type(place).__name__} at {label}, "
                f"{why}; leave it out, or take router=Similarity(), which asks nothing of modules"
            )


def check_unmixed(implants: Implants, names: Sequence[str]) -> None:
    """Refuse to remove a module that a mixture chooses from."""
    for name, implant in implants.items():
        method: Any = implant.method
        if lost := [n for n in names if n in method.members]:
            what = "the mixture" if isinstance(method, Mixture) else f"the {type(method).__name__}"
            raise ModgraftError(
                f"{lost[0]!r} is in {what} {name!r}, which would choose among modules that "
                f"are not there; host.remove({name!r}) first"
            )


def join_prompts(implants: Implants, implant: Implant) -> None:
    """Connect a new ``Attempt`` with the prompts that it attends to.

    Raises:
        ModgraftError: for an unknown name, or a module that is no prompt of the same length.
    """
    method: Any = implant.method
    if not isinstance(method.unwrapped, Attempt):
        return
    if method.unwrapped is not method:
        raise ModgraftError(
            f"{type(method).__name__}({method.unwrapped!r}): an Attempt is over modules of the "
            f"host, and is implanted by itself"
        )
    method.check([(name, implants.computation(name)) for name in method.over])
    over = {name: implants.at_sites(name)[0][1] for name in method.over}
    (place,) = implant.places
    place.join(over)  # type: ignore[operator]


def routed(
    model: nn.Module, implants: Implants, call: Call, args: tuple, kwargs: dict[str, Any]
) -> Call:
    """Let the mixtures that choose once for the whole network make their choices.

    They choose before the host runs, so that a block that is recomputed in backward finds the same
    choices.

    Returns:
        ``call``, with the side input that examples are routed by where it was missing.

    Raises:
        SideError: where an example has no token that may be read, or the call has no text.
    """
    compiling = torch.compiler.is_dynamo_compiling()
    active = () if call.composition is None else call.composition.names()
    names = implants.names if compiling else active
    mixtures = [found for name in names for found in _mixtures(implants, name)]
    reads = [name for name, method in mixtures if method.side_source == EXAMPLE]
    reads += [name for name in names if isinstance(implants.computation(name), Attempt)]
    if not mixtures and not reads:
        return call
    if reads and EXAMPLE not in call.side:
        side = _example(model, reads[0], args, kwargs, strict=not compiling)
        if side is not None:
            call = replace(call, side={**call.side, EXAMPLE: side})
    like = next(model.parameters())
    for name, method in mixtures:
        if method.level == "task" or (method.level == "example" and EXAMPLE in call.side):
            acts: Any = implants.at_sites(name)[0][1]
            acts.mixture.choose(call, None, like, acts.task)
    return call


def _mixtures(implants: Implants, name: str) -> list[tuple[str, Mixture]]:
    """Return the mixture called ``name``, if it is one, and the mixtures among its modules."""
    method = implants.computation(name)
    if not isinstance(method, Mixture):
        return []
    return [(name, method), *(m for inner in method.over for m in _mixtures(implants, inner))]


def _example(
    model: nn.Module, name: str, args: tuple, kwargs: dict[str, Any], strict: bool
) -> Side | None:
    """Return the side input that examples are routed by: their tokens' embeddings, answers
    masked."""
    parameters = list(inspect.signature(type(model).forward).parameters)[1:]
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    ids = given.get("input_ids", args[0] if args else None)
    embeddings = given.get("inputs_embeds")
    if embeddings is None and isinstance(ids, Tensor) and not ids.is_floating_point():
        embeddings = token_table(model)(ids)
    if embeddings is None:
        if not strict:  # the module may not be in force
            return None
        raise SideError(
            f"{name!r} goes by the text of each example, and this call has none; pass "
            f"side={{'{EXAMPLE}': mg.Side(vectors[:, None])}}, [batch, 1, d], with d the width of "
            f"the host's embeddings, or that of Mixture(…, width=d)"
        )
    mask = given.get("attention_mask")
    seen = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
    if isinstance(mask, Tensor) and mask.shape == seen.shape:
        seen = mask.bool()
    labels = given.get("labels")
    causal = Site("", model, None, model).stepwise
    if causal and isinstance(labels, Tensor) and labels.shape == seen.shape:
        seen = seen & (labels == IGNORED)  # answers must not choose modules
        if strict and not bool(seen.any(1).all()):
            row = int((~seen.any(1)).nonzero()[0])
            raise SideError(
                f"{name!r} goes by what comes before the answer, and every token of example {row} "
                f"has a label or is masked; label the prompt {IGNORED}, or pass "
                f"side={{'{EXAMPLE}': mg.Side(vectors[:, None])}}"
            )
    return Side(embeddings.detach(), seen)
