"""Merges modules of one host into one module of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from modgraft.core.parts import Part, share
from modgraft.core.precision import wide
from modgraft.core.sites import Site, located
from modgraft.engine.implant import Implant
from modgraft.store.file import digest_of
from modgraft.store.merging.low_rank import Change, LowRank, dense, total, truncated
from modgraft.store.merging.soup import greedy
from modgraft.store.merging.table import SOUP, Asked, asked
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
            rank that a site has not, or that a LoRA cannot have because biases change and a site
            has none, or a name in use. The host is then as it was.
    """
    if not hasattr(host, "implants"):
        raise ModgraftError(f"merge(host, …) takes a modgraft.Host, not a {type(host).__name__}")
    if isinstance(modules, str | Implant):
        raise ModgraftError(f"merge(host, {modules!r:.80}, …): give a list of modules")
    names = [_name(host, each) for each in modules]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ModgraftError(f"{twice[0]!r} is to be merged twice; give it twice the weight instead")
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
    with host.using(" + ".join(f"{1 / len(names)!r}*{name}" for name in names)), torch.no_grad():
        return validate(host)


def _parent(host: HostLike, name: str, weight: float) -> dict[str, Any]:
    """Describe what was merged; the hash is that of the card of a folder with it alone."""
    own = _implant(host, name)
    tensors = {f"{own.name}:{key}": tensor for key, tensor in own.tensors().items()}
    kind = type(own.method).__name__
    return {"name": name, "type": kind, "weight": weight, "tensors": digest_of(tensors)}


def changes_of(host: HostLike, names: Sequence[str]) -> dict[str, list[Change | None]]:
    """Return the changes of some modules at each weight, by its label; None where one has none.

    Those of a bias stand under ``LABEL:bias``.

    Raises:
        ModgraftError: for a module that is no change of weights.
    """
    known = [_name(host, name) for name in names]
    found: dict[str, list[Change | None]] = {}
    for each in _weights(host, known):
        found[each.site.label] = each.changes
        if any(bias is not None for bias in each.biases):
            found[f"{each.site.label}:bias"] = list(each.biases)
    return found


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
        as_whole = _overlap({site.part: site for _, site, _ in here})
        by_part: dict[Part | None, _Weight] = {}
        for number, site, place in here:
            own = replace(site, part=None) if as_whole else site
            nothing = [None] * len(names)
            weight = by_part.setdefault(own.part, _Weight(own, [*nothing], [*nothing]))
            change, bias = _change(site, place, as_whole)
            before = weight.changes[number]  # of another part, by the same module
            weight.changes[number] = change if before is None else total([before, change], [1, 1])
            if bias is not None:
                before = weight.biases[number]
                weight.biases[number] = bias if before is None else before + bias
        found += by_part.values()
    return found


def _overlap(sites: Mapping[Part | None, Site]) -> bool:
    """Return whether selections of one weight have rows in common, and are not the same."""
    site = next(iter(sites.values()))
    rows = torch.arange(weight_matrix(site.module, None, site.parameter).shape[-2])
    taken = torch.cat([share(rows, part, -1) for part in sites])
    return len(taken.unique()) < len(taken)


def _change(
    site: Site, place: ParameterComposition, as_whole: bool
) -> tuple[Change, Tensor | None]:
    """Return Δ of a module at a site, of its part or of the whole weight, and that of the bias."""
    at = site.module, site.part, site.parameter
    bias = place.bias_delta(bias_vector(*at))
    part = site.part if as_whole else None
    if part is not None and bias is not None:
        bias = part.padded(bias, -1)
    if (factors := place.factors()) is not None:
        left, right, scale = factors
        left = wide(scale * left)
        return LowRank(left if part is None else part.padded(left, -2), wide(right)), bias
    delta = place.delta(wide(weight_matrix(*at)))
    return delta if part is None else part.padded(delta, -2), bias


# -- one weight ----------------------------------------------------------------------------------


@dataclass
class _Merged:
    """One weight, its new change, and that of its bias."""

    site: Site
    change: Change
    bias: Tensor | None


def _merged(here: _Weight, names: Sequence[str], how: Asked) -> _Merged:
    label = here.site.label
    changes, biases = _filled(here.changes), _filled(here.biases)
    shape = changes[0].shape
    if len(shape) == 3 and how.of_matrices:  # each expert's is a matrix
        experts = [
            _one(f"{label}:{i}", names, how, [change[i] for change in changes])
            for i in range(shape[0])
        ]
        change: Change = torch.stack([dense(each) for each in experts])
    else:
        change = _one(label, names, how, changes)
    bias = dense(_one(f"{label}:bias", names, how, biases)) if biases else None
    return _Merged(here.site, change, bias)


def _filled(changes: Sequence[Change | None]) -> list[Change]:
    """Return changes with 0 in place of None, beside factors as factors of rank 0."""
    some = next((change for change in changes if change is not None), None)
    if some is None:
        return []
    nothing = total([some], [0.0])
    if isinstance(nothing, LowRank):
        nothing = LowRank(nothing.left[..., :0], nothing.right[..., :0, :])
    return [nothing if change is None else change for change in changes]


def _one(name: str, names: Sequence[str], how: Asked, changes: Sequence[Change]) -> Change:
    """Merge one tensor that is in memory.

    Raises:
        ModgraftError: for a result that holds NaN or infinity.
    """
    change = next(how.merge(name, names, changes[0].shape, lambda: [changes]))
    parts = [change.left, change.right] if isinstance(change, LowRank) else [change]
    if not all(part.isfinite().all() for part in parts):
        raise ModgraftError(
            f"the merge at {name} holds NaN or infinity; a module among those merged has "
            f"diverged, or a weight is too large"
        )
    return change


# -- the new module ------------------------------------------------------------------------------


def _as_module(
    host: HostLike, name: str, merged: Sequence[_Merged], rank: int | None
) -> tuple[Implant, float]:
    """Implant what was merged, in the form that holds it; return it and the relative error."""
    least = min(merged, key=lambda each: min(each.change.shape[-2:]))
    most = min(least.change.shape[-2:])
    if rank is not None and (type(rank) is not int or not 1 <= rank <= most):
        raise ModgraftError(
            f"rank={rank!r:.80}: at {least.site.label} the weight is "
            f"{' × '.join(map(str, least.change.shape[-2:]))}, so the rank is 1 to {most}"
        )
    made, sizes = [], torch.zeros(2, dtype=torch.float64)
    for each in merged:
        side = rank or min(each.change.shape[-2:])
        change = each.change
        if rank is not None or (isinstance(change, LowRank) and change.rank > side):
            change, size = truncated(change, side)
            sizes += size.cpu()
        made.append(replace(each, change=change))
    whole, lost = sizes.tolist()
    at = {each.site.label: each for each in made}
    if rank is not None and (bare := _without_bias(made)) is not None:
        raise ModgraftError(
            f"rank={rank}: biases change too, and {bare} has none, where no LoRA that changes "
            f"biases can be; leave out rank=, which gives a DenseDelta, or merge what is at layers "
            f"with a bias apart from the rest"
        )
    new = host.implant(name, _method(made, most), list(at), active=False)
    for label, place in zip(new.paths, new.places, strict=True):
        _fill(new.method, place, at[label])
    return new, (lost / whole) ** 0.5 if whole else 0.0


def _without_bias(merged: Sequence[_Merged]) -> str | None:
    """Return a site that has no bias, where biases of others change; None where there is none."""
    if all(each.bias is None for each in merged):
        return None
    sites = [each.site for each in merged]
    bare = (s.label for s in sites if bias_vector(s.module, s.part, s.parameter) is None)
    return next(bare, None)


def _method(merged: Sequence[_Merged], most: int) -> Computation:
    """Return the method that holds changes, the smallest one."""
    biased = any(each.bias is not None for each in merged)
    ranks = [each.change.rank for each in merged if isinstance(each.change, LowRank)]
    low = len(ranks) == len(merged) and max(ranks) <= most
    if low and _without_bias(merged) is None:
        return LoRA(rank=max(1, *ranks), bias=biased)
    size = sum(each.change.shape.numel() for each in merged)
    used = sum(int(dense(each.change).count_nonzero()) for each in merged)
    if biased or 2 * used > size or any(len(each.change.shape) > 2 for each in merged):
        return DenseDelta(bias=biased)
    return SparseDelta(density=max(1, used) / size)


def _fill(method: Computation, place: Any, merged: _Merged) -> None:
    """Write a change into a module; what is left of a larger rank does nothing yet."""
    change = merged.change
    if isinstance(method, LoRA) and isinstance(change, LowRank):
        place.A[..., : change.rank, :] = change.right
        place.B[..., : change.rank] = change.left
    elif isinstance(method, SparseDelta):
        flat = dense(change).flatten()
        place.keep(flat.nonzero()[:, 0])
        place.values.copy_(flat[flat != 0])
    else:
        place.values.copy_(dense(change))
    if merged.bias is not None:
        place.b.copy_(merged.bias)
