"""Merges modules of one host into one module of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modgraft.computation.base import Computation, ParameterComposition
from modgraft.computation.dense_delta import DenseDelta
from modgraft.computation.lora import LoRA
from modgraft.computation.sparse import SparseDelta
from modgraft.core import expression as ex
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import bias_vector, weight_matrix
from modgraft.core.parts import Part
from modgraft.core.precision import wide
from modgraft.core.sites import Site, located
from modgraft.engine.implant import Implant
from modgraft.store.file import digest_of
from modgraft.store.merging.low_rank import Change, LowRank, dense, truncated
from modgraft.store.merging.methods import SOUP, Asked, asked
from modgraft.store.merging.soup import greedy
from modgraft.training.host_like import HostLike


def merge(
    host: HostLike,
    modules: Sequence[str | Implant],
    into: str,
    method: str = "average",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    validate: Callable[[HostLike], float] | None = None,
    **options: Any,
) -> Implant:
    """Merge changes of weights into one new module, which is trained, composed, saved as any.

    What is merged at each weight is Δ itself, whatever makes it (LoRA of any ranks, DoRA, Rescale,
    sparse changes), and the changes of biases. Where a module does not act, its Δ is 0. The new
    module is a ``LoRA`` where the result has a low rank or is given one, else a ``SparseDelta`` if
    most of it is zero, else a ``DenseDelta``.

    Args:
        host: theirs.
        modules: handles, or names as compositions use them: ``"qa"``, ``"h['fr']"``.
        into: the name of the new module, which is not put in force.
        method: ``average``, ``arithmetic``, ``ties``, ``dare``, ``slerp``, ``isotropic``, ``tsv``,
            ``knots`` (:mod:`modgraft.store.merging.methods`), or ``greedy_soup``.
        weights: one number for each module; None: 1.
        rank: the rank of the new module, whose Δ is then the nearest of that rank; None: Δ exactly.
        validate: the score of the host under the composition in force, for ``greedy_soup``: a
            module joins the average unless that gets worse by it.
        **options: those of the method, as ``density=0.2``.

    Returns:
        The new module's handle. Its ``provenance`` says what it was made of, and with ``rank`` the
        relative error, ‖Δ − BA‖ / ‖Δ‖ over all sites; it is saved with the module.

    Raises:
        ModgraftError: for a module that is no change of weights, an unknown method or option, a
            rank that a site has not, or a name in use. The host is then as it was.
    """
    names = [_name(host, each) for each in modules]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ModgraftError(f"{twice[0]!r} is to be merged twice; say weights= in place of that")
    made: dict[str, Any] = {}
    if method == SOUP:
        if validate is None or weights is not None or options:
            raise ModgraftError(
                f"method={SOUP!r} takes validate=, a function of the host that returns its score, "
                f"and no weights or options"
            )
        score = validate
        soup = greedy(names, lambda some: _scored(host, some, score))
        made = {"alone": soup.alone, "score": soup.score}
        names, how = soup.chosen, asked("average", len(soup.chosen), None, {})
    elif validate is not None:
        raise ModgraftError(f"validate= belongs to method={SOUP!r}, and not to {method!r}")
    else:
        how = asked(method, len(names), weights, options)
    with torch.no_grad():
        weighed = _weights(host, names)
        merged = [_merged(each, names, how) for each in weighed]
        written, error = _as_module(host, into, merged, rank)
    written.beside = frozenset().union(*(_implant(host, name).beside for name in names))
    written.provenance = {
        "method": method, "options": dict(how.options), "rank": rank, **made,
        "relative_error": error,
        "parents": [_parent(host, n, w) for n, w in zip(names, how.weights, strict=True)],
    }  # fmt: skip
    return written


def _name(host: HostLike, module: str | Implant) -> str:
    """Return the name of one module of a host, or of one task of a module."""
    said = module.expression() if isinstance(module, Implant) else module
    read = host.read(said)
    if not isinstance(read, ex.Name):
        raise ModgraftError(
            f"merge(host, [{module!r:.80}, …], …): one module or one task of it, as 'qa' or "
            f"\"h['fr']\"; weights= are given apart"
        )
    method = host._implants.computation(read.name)
    if not isinstance(method, ParameterComposition):
        raise ModgraftError(
            f"{read.name!r} cannot be merged: {type(method).__name__} is no change of weights; "
            f"leave it out, and compose it with the result"
        )
    return read.name


def _implant(host: HostLike, name: str) -> Implant:
    return host._implants[ex.module_of(name)]


def _scored(host: HostLike, names: Sequence[str], validate: Callable[[HostLike], float]) -> float:
    """Return the score of the average of some modules."""
    with host.using(" + ".join(f"{1 / len(names)!r}*{name}" for name in names)):
        return validate(host)


def _parent(host: HostLike, name: str, weight: float) -> dict[str, Any]:
    """Describe what was merged; the hash is that of the card of a folder with it alone."""
    own = _implant(host, name)
    tensors = {f"{own.name}:{key}": tensor for key, tensor in own.tensors().items()}
    kind = type(own.method).__name__
    return {"name": name, "type": kind, "weight": weight, "tensors": digest_of(tensors)}


def changes_of(host: HostLike, names: Sequence[str]) -> dict[str, list[Change | None]]:
    """Return the changes of some modules at each weight, by its label; None where one has none.

    Raises:
        ModgraftError: for a module that is no change of weights.
    """
    known = [_name(host, name) for name in names]
    return {each.site.label: each.changes for each in _weights(host, known)}


# -- what is merged ------------------------------------------------------------------------------


@dataclass
class _Weight:
    """One weight of the host, or one part of it, and its changes; None where a module has none."""

    site: Site
    changes: list[Change | None]
    biases: list[Tensor | None]


def _weights(host: HostLike, names: Sequence[str]) -> list[_Weight]:
    """Return every weight that any of the modules changes, with their changes.

    Parts of one weight stay apart, unless the modules divide it differently.
    """
    at: dict[tuple[str, str | None], list[tuple[int, Site, ParameterComposition]]] = {}
    for number, name in enumerate(names):
        for label, place in host._implants.at_sites(name):
            assert isinstance(place, ParameterComposition)  # noqa: S101
            site = located(host.model, [label])[0]
            at.setdefault((site.path, site.parameter), []).append((number, site, place))
    found = []
    for here in at.values():
        sites = {site.part: site for _, site, _ in here}
        as_whole = _overlap(list(sites.values()))
        by_part: dict[Part | None, _Weight] = {}
        for number, site, place in here:
            own = replace(site, part=None) if as_whole else site
            nothing = [None] * len(names)
            weight = by_part.setdefault(own.part, _Weight(own, [*nothing], [*nothing]))
            change, bias = _change(site, place)
            if as_whole and site.part is not None:
                change, bias = _padded(site.part, change, bias)
            weight.changes[number] = _added(weight.changes[number], change)
            if bias is not None:
                before = weight.biases[number]
                weight.biases[number] = bias if before is None else before + bias
        found += by_part.values()
    return found


def _overlap(sites: Sequence[Site]) -> bool:
    """Return whether selections of one weight have rows in common, and are not the same."""
    if len(sites) == 1:
        return False
    count = len(weight_matrix(sites[0].module, None, sites[0].parameter))
    if any(site.part is None for site in sites):
        return True
    rows = torch.cat([site.part.take(torch.arange(count), -1) for site in sites if site.part])
    return len(rows.unique()) < len(rows)


def _change(site: Site, place: ParameterComposition) -> tuple[Change, Tensor | None]:
    """Return Δ of a module at a site, and the change of the bias."""
    at = site.module, site.part, site.parameter
    factors = place.factors()
    bias = place.bias_delta(bias_vector(*at))
    if factors is None:
        return place.delta(wide(weight_matrix(*at))).detach(), bias
    left, right, scale = factors
    return LowRank(wide(scale * left.detach()), wide(right.detach())), bias


def _padded(part: Part, change: Change, bias: Tensor | None) -> tuple[Change, Tensor | None]:
    """Return the change of a part as one of the whole weight."""
    if isinstance(change, LowRank):
        change = LowRank(part.padded(change.left, -2), change.right)
    else:
        change = part.padded(change, -2)
    return change, None if bias is None else part.padded(bias, -1)


def _added(before: Change | None, change: Change) -> Change:
    if before is None:
        return change
    if isinstance(before, LowRank) and isinstance(change, LowRank):
        left, right = zip((before.left, before.right), (change.left, change.right), strict=True)
        return LowRank(torch.cat(left, -1), torch.cat(right, -2))
    return dense(before) + dense(change)


# -- one weight ----------------------------------------------------------------------------------


@dataclass
class _Result:
    site: Site
    change: Change
    bias: Tensor | None


def _merged(here: _Weight, names: Sequence[str], how: Asked) -> _Result:
    some = next(change for change in here.changes if change is not None)
    changes = [_nothing(some) if each is None else each for each in here.changes]
    bias = None
    if given := [each for each in here.biases if each is not None]:
        biases = [torch.zeros_like(given[0]) if each is None else each for each in here.biases]
        bias = dense(next(how.merge(f"{here.site.label}:bias", names, lambda: [biases])))
    label = here.site.label
    if len(some.shape) == 3 and not how.method.by_number:  # each expert's is a matrix
        count = some.shape[0]
        experts = [
            next(how.merge(f"{label}:{i}", names, lambda i=i: [[_expert(c, i) for c in changes]]))
            for i in range(count)
        ]
        return _Result(here.site, torch.stack([dense(each) for each in experts]), bias)
    return _Result(here.site, next(how.merge(label, names, lambda: [changes])), bias)


def _nothing(like: Change) -> Change:
    """Return Δ = 0, as factors of rank 0 beside factors."""
    if isinstance(like, LowRank):
        return LowRank(like.left[..., :0], like.right[..., :0, :])
    return torch.zeros_like(like)


def _expert(change: Change, i: int) -> Change:
    return LowRank(change.left[i], change.right[i]) if isinstance(change, LowRank) else change[i]


# -- the new module ------------------------------------------------------------------------------


def _as_module(
    host: HostLike, name: str, merged: Sequence[_Result], rank: int | None
) -> tuple[Implant, float]:
    """Implant what was merged, in the form that holds it; return it and the relative error."""
    for each in merged:
        parts = [each.change.left, each.change.right] if isinstance(each.change, LowRank) else []
        for tensor in [*parts, *([] if parts else [each.change]), each.bias]:
            if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                raise ModgraftError(
                    f"the merge at {each.site.label} holds NaN or infinity; a module among those "
                    f"merged has diverged, or a weight is too large"
                )
    error = 0.0
    least = min(merged, key=lambda each: min(each.change.shape[-2:]))
    most = min(least.change.shape[-2:])
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
            raise ModgraftError(
                f"rank={rank!r}: at {least.site.label} the weight is "
                f"{' × '.join(map(str, least.change.shape[-2:]))}, so the rank is 1 to {most}"
            )
        merged, error = _of_rank(merged, rank)
    merged = [_compressed(each) for each in merged]
    ranks = [each.change.rank for each in merged if isinstance(each.change, LowRank)]
    biased = [each.bias is not None for each in merged]
    low = len(ranks) == len(merged) and max(ranks) <= most and all(biased) == any(biased)
    if rank is not None or low:
        method: Computation = LoRA(rank=max(1, *ranks), bias=any(biased))
        fill: Callable[[Any, _Result], None] = _fill_lora
    else:
        method, fill = _whole(merged, any(biased))
    at = {each.site.label: each for each in merged}
    new = host.implant(name, method, list(at), active=False)
    for label, place in zip(new.paths, new.places, strict=True):
        each = at[label]
        fill(place, each)
        if each.bias is not None:
            place.b.copy_(each.bias)  # type: ignore[union-attr, operator]
    return new, error


def _of_rank(merged: Sequence[_Result], rank: int) -> tuple[list[_Result], float]:
    """Return the nearest changes of a rank, and the relative error over all."""
    found, sizes = [], torch.zeros(2, dtype=torch.float64)
    for each in merged:
        change, size = truncated(each.change, rank)
        found.append(replace(each, change=change))
        sizes += size.cpu()
    whole, left = sizes.tolist()
    return found, (left / whole) ** 0.5 if whole else 0.0


def _compressed(each: _Result) -> _Result:
    """Return factors that are no wider than the weight."""
    side = min(each.change.shape[-2:])
    if isinstance(each.change, LowRank) and each.change.rank > side:
        return replace(each, change=truncated(each.change, side)[0])
    return each


def _whole(
    merged: Sequence[_Result], biased: bool
) -> tuple[Computation, Callable[[Any, _Result], None]]:
    """Return a module for changes that have no low rank, and what fills it."""
    deltas = [dense(each.change) for each in merged]
    size = sum(delta.numel() for delta in deltas)
    used = sum(int(delta.count_nonzero()) for delta in deltas)
    if not biased and 2 * used < size and all(delta.dim() == 2 for delta in deltas):
        return SparseDelta(density=max(1, used) / size), _fill_sparse
    return DenseDelta(bias=biased), _fill_dense


def _fill_lora(place: Any, each: _Result) -> None:
    """Write factors into a LoRA of at least their rank; what is left of it does nothing yet."""
    change = each.change
    assert isinstance(change, LowRank)  # noqa: S101
    place.A[..., : change.rank, :] = change.right
    place.B[..., : change.rank] = change.left


def _fill_dense(place: Any, each: _Result) -> None:
    place.values.copy_(dense(each.change))


def _fill_sparse(place: Any, each: _Result) -> None:
    flat = dense(each.change).flatten()
    indices = flat.nonzero()[:, 0]
    place.keep(indices)
    place.values.copy_(flat[indices])
