"""Checks of arguments, sites and inputs that several methods need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from modgraft.core.errors import ModgraftError, SiteError
from modgraft.core.layers import (
    WEIGHTED,
    feature_axis,
    is_stack,
    stored,
    weight_labels,
    weight_matrix,
)
from modgraft.core.sharded import check_whole
from modgraft.core.sites import Site


def check_at_least_one(method: str, **values: int | None) -> None:
    """Check that each of a method's options, by name, is at least 1, or None.

    Raises:
        ModgraftError: for the first that is not.
    """
    for name, value in values.items():
        if value is not None and value < 1:
            what = name if len(name) == 1 or "_" in name else f"the {name}"
            raise ModgraftError(f"{method}({name}={value}): {what} is at least 1")


def distinct_names(names: Sequence[str], call: str, example: str) -> tuple[str, ...]:
    """Return ``names`` as a tuple.

    Raises:
        ModgraftError: for no name, a name given twice, or anything but a sequence of names.
    """
    found = () if isinstance(names, str) else tuple(names)
    named = all(isinstance(name, str) and name for name in found)
    if not found or not named or len(set(found)) != len(found):
        raise ModgraftError(f"{call}: one or more different names{example}")
    return found


def check_output(name: str, y: Tensor, d: int) -> None:
    """Check that an output is as wide as the module was built for.

    Raises:
        ModgraftError: if ``y`` is not ``[B, …, d]``.
    """
    if y.is_complex():
        raise ModgraftError(
            f"{name} maps real numbers, and this site puts out {y.dtype}; choose a site after it "
            f"where they are real, or change its weight, by LoRA"
        )
    if y.dim() < 2 or y.shape[-1] != d:
        remedy = "choose a layer that knows its width, such as nn.Linear"
        if y.shape == (d,):
            remedy = "call the host with a batch"
        raise ModgraftError(
            f"{name} was built for an output [B, …, {d}] and this site puts out {list(y.shape)}; "
            f"{remedy}"
        )


def real_width(name: str, site: Site) -> int:
    """Return the width of a site's output, which a method of real numbers maps.

    Raises:
        SiteError: where it cannot be told, or the output is complex.
    """
    if isinstance(site.module, WEIGHTED) and stored(site.module, None).is_complex():
        raise SiteError(
            f"{name} at {site.label}: this {type(site.module).__name__} puts out complex numbers, "
            f"and {name} maps real ones; LoRA changes its weight"
        )
    return site.width


def check_parallel(name: str, site: Site) -> None:
    """Check, as far as the layer tells, that a site's input has the shape of its output.

    Raises:
        ModgraftError: if the input is token ids, or has another width than the output.
    """
    module, in_width = site.module, None
    if isinstance(module, nn.Embedding):
        raise ModgraftError(
            f"{name} at {site.label}: its input is token ids, and {name} reads [B, n, d]; use "
            f"Adapter there, which reads the output"
        )
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        in_width = module.in_channels
    elif hasattr(module, "in_features") or hasattr(module, "nx"):
        in_width = site.in_width
    if in_width is not None and in_width != site.width:
        raise ModgraftError(
            f"{name} at {site.label}: its input is {in_width} wide and its output {site.width}; "
            f"choose a site that keeps its width, at='feedforward' or at='attention' for instance"
        )


def check_input(name: str, y: Tensor, x: Tensor | None) -> Tensor:
    """Return ``x`` if it is a floating-point tensor of the shape of ``y``.

    Raises:
        ModgraftError: if it is not.
    """
    if x is None or not x.is_floating_point() or x.shape != y.shape:
        found = "no tensor" if x is None else f"{x.dtype} {list(x.shape)}"
        raise ModgraftError(
            f"{name} reads a site's input of the shape of its output, {list(y.shape)}, and the "
            f"first tensor that this site is called with is {found}; choose a site that takes one, "
            f"or use the method that reads the output"
        )
    return x


def check_weight(method: str, site: Site, experts: bool = False) -> None:
    """Refuse a site that is not one weight matrix, or a part that its weight does not have.

    Args:
        method: the method's name.
        site: the site.
        experts: whether the method changes a stack of matrices, one an expert, too.

    Raises:
        SiteError: with what to select instead, at a layer with several weights.
    """
    layer, kind = site.module, type(site.module).__name__
    if site.parameter is None and not isinstance(layer, WEIGHTED):
        raise _several(method, site)
    weight = stored(layer, site.parameter)
    check_whole(weight, site.label)
    if not (weight.is_complex() or weight.is_floating_point()) or weight.itemsize < 2:
        raise SiteError(
            f"{method} at {site.label}: its weight is {weight.dtype}, codes that this {kind} reads "
            f"numbers from, and a change of numbers cannot be added to them. Put a layer with a "
            f"weight in torch.bfloat16 or float32 there first, or take a module that acts on the "
            f"output, such as Adapter"
        )
    stack = site.parameter is not None and is_stack(layer, site.parameter)
    if stack and not experts:
        raise SiteError(
            f"{method} at {site.label}: these are the weights of {len(weight)} experts, and "
            f"{method} changes one matrix [out, in]; LoRA(rank=8) changes each of them"
        )
    if site.parameter is not None and not (weight.dim() == 2 or stack):
        if weight.dim() == 3 and experts:  # each of its matrices is changed
            return
        hint = "; LoRA(rank=8) changes each matrix of a stack" if weight.dim() == 3 else ""
        raise SiteError(
            f"{method} at {site.label}: this parameter is {list(weight.shape)}, and {method} "
            f"changes weights [out, in]{hint}"
        )
    if site.part is not None:
        _check_part(method, site, site.part.pieces)


def _check_part(method: str, site: Site, count: int) -> None:
    """Refuse one of ``count`` parts of a weight that has no such parts."""
    layer, kind = site.module, type(site.module).__name__
    rows = weight_matrix(layer, None, site.parameter).shape[-2]
    whole = site.label.rpartition("[")[0]
    if isinstance(layer, nn.Embedding):
        raise SiteError(f"{method} at {site.label}: a table has no parts; write at={whole!r}")
    if rows % count:
        better = next((n for n in (3, 2) if rows % n == 0 and n != count), None)
        parts = f"at='{whole}[0/{better}]', or the whole, " if better else ""
        raise SiteError(
            f"{method} at {site.label}: this {kind} has {rows} outputs, which is not {count} equal "
            f"parts ({rows} / {count} = {rows / count:.4g}); write {parts}at={whole!r}"
        )
    if getattr(layer, "groups", 1) > 1:
        raise SiteError(
            f"{method} at {site.label}: a convolution of {layer.groups} groups is in parts "
            f"already; write at={whole!r}"
        )


def check_features(method: str, site: Site) -> None:
    """Refuse a site whose output has no features, or no such part of them.

    Raises:
        SiteError: with the corrected call.
    """
    kind = type(site.module).__name__
    if site.parameter is not None:
        raise SiteError(
            f"{method} at {site.label}: a {kind} reads this parameter itself, and no activation "
            f"passes there that {method} could change; act on the layer's output, "
            f"at={site.path!r}, or take a parameter module such as LoRA(rank=8)"
        )
    if site.part is None:
        return
    whole, count = site.label.rpartition("[")[0], site.part.pieces
    full = replace(site, part=None).width
    if full % count or (site.channels_first and feature_axis(site.module) == -1):
        raise SiteError(
            f"{method} at {site.label}: this {kind} puts out {full} features, which is not {count} "
            f"equal parts; write at={whole!r}"
        )


def _several(method: str, site: Site) -> SiteError:
    kind, labels = type(site.module).__name__, weight_labels(site.path, site.module)
    if not labels:
        if kind in [k.__name__ for k in WEIGHTED]:  # another class of that name, a quantised one
            kind = f"{type(site.module).__module__}.{kind}"
        return SiteError(
            f"{method} at {site.label or 'the host itself'}: a {kind} has no weight that a "
            f"parameter module can change; it acts on "
            f"{', '.join(k.__name__ for k in WEIGHTED)}, and on parameters [out, in] by their "
            f"names; Adapter acts on what any layer puts out"
        )
    some = ", ".join(f"{label!r}{f' ({what})' if what else ''}" for label, what in labels[:8])
    if len(labels) == 1:
        return SiteError(
            f"{method} at {site.label or 'the host itself'}: a {kind} reads its weight itself, and "
            f"is not called as a linear layer; name the weight: at={labels[0][0]!r}"
        )
    return SiteError(
        f"{method} at {site.label or 'the host itself'}: a {kind} has several weights, "
        f"{some}{' …' if len(labels) > 8 else ''}; say which: at={labels[0][0]!r}"
    )
