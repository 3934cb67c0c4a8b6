"""Find the sites of a host, where modules act, by role, path pattern, type or predicate.

A site is a sub-module, or one parameter of a sub-module with several (attention, an RNN).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from modgraft.core.errors import SiteError, warn
from modgraft.core.layers import (
    CONVOLUTIONS,
    LINEAR,
    WEIGHTED,
    is_stack,
    open_modules,
    weight_labels,
)
from modgraft.core.parts import Part, split_part
from modgraft.core.patterns import bare, joined, pattern, starred, wraps
from modgraft.core.roles import family_of, roles_of, same_input
from modgraft.core.widths import inner_width, own_width

RESIDUAL = "[residual]"
_WHOLE = Part(0, 0, 0)  # it comes before all parts

At = str | type[nn.Module] | Callable[[str, nn.Module], bool] | Sequence["At"]


@dataclass(frozen=True)
class Site:
    """One place in a host.

    Attributes:
        path: dotted path of the sub-module; ``""`` is the host itself.
        module: the sub-module there.
        part: which part of a fused projection's output; None: all of it.
        root: the host's model, whose config says what the sub-module alone does not.
        residual: whether effects enter the sub-module's residual input rather than its output; see
            :mod:`modgraft.engine.residual`.
        parameter: the name within the sub-module of the parameter that is meant,
            ``"in_proj_weight"``; None: the sub-module, and the one weight of a layer that has one.
        guessed: whether it was selected by a role that was guessed, in a host of no known family.
        shown: says how wide the output of a part is seen to be, where nothing else does.
    """

    path: str
    module: nn.Module
    part: Part | None = None
    root: nn.Module | None = field(default=None, repr=False)
    residual: bool = False
    parameter: str | None = None
    guessed: bool = field(default=False, compare=False)
    shown: Callable[[str], int | None] | None = field(default=None, compare=False, repr=False)

    @property
    def label(self) -> str:
        """The site as a selection, ``"h.0.attn.c_attn[0/3]"``."""
        whole = joined(bare(self.path), (self.parameter or "").removesuffix(".weight"))
        return f"{whole}{self.part or ''}{RESIDUAL if self.residual else ''}"

    @property
    def in_width(self) -> int:
        """The number of features of the input.

        Raises:
            SiteError: where the module is no linear layer.
        """
        width = getattr(self.module, "in_features", getattr(self.module, "nx", None))
        if not isinstance(width, int):
            raise self._widthless("input")
        return width

    @property
    def width(self) -> int:
        """The number of features of the output, or of the selected part of it.

        Raises:
            SiteError: where neither the module nor what it is made of says.
        """
        full = own_width(self.module) or inner_width(self._around())
        if full is None and self.shown is not None:
            full = self.shown(self.path)
        if full is None:
            raise self._widthless("output")
        return self.part.size(full) if self.part else full

    @property
    def channels_first(self) -> bool:
        """Whether the output is a feature map ``[B, C, …]`` rather than ``[B, …, d]``."""
        last = self.module
        while isinstance(last, nn.Sequential) and len(last):
            known = [child for child in last if own_width(child) is not None]
            if not known:
                break
            last = known[-1]
        return isinstance(last, (*CONVOLUTIONS, nn.BatchNorm2d))

    @property
    def embeds(self) -> bool:
        """Whether this layer embeds the host's input."""
        if isinstance(self.module, nn.Embedding):
            return True
        if self.root is None:
            return False
        known = roles_of(self.root).patterns.items()
        some = [p for role, paths in known if role.endswith("embedding") for p in paths]
        return any(pattern(each, numbers=True).matches(self.path) for each in some)

    @property
    def time_first(self) -> bool:
        """Whether the output is known to be ``[n, B, d]`` rather than ``[B, n, d]``."""
        layer = self.module
        if isinstance(layer, nn.Transformer):
            layer = layer.encoder
        if isinstance(layer, nn.TransformerEncoder | nn.TransformerDecoder):
            layer = layer.layers[0]
        if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            layer = layer.self_attn
        return isinstance(layer, nn.MultiheadAttention | nn.RNNBase) and not layer.batch_first

    @property
    def stepwise(self) -> bool:
        """Whether tokens come one by one here, so that none may see a later one.

        What attends decides, in the nearest model around the site: an eye's tokens see each other,
        though the language model that it belongs to generates.
        """
        around = self._around()
        model = next((m for m in around if getattr(m, "base_model_prefix", None) is not None), None)
        model = around[-1] if model is None else model
        names = "is_causal", "is_decoder"  # some decoders set the second alone
        flags = [getattr(m, name, None) for m in model.modules() for name in names]
        said = [flag for flag in flags if isinstance(flag, bool)]
        if said:
            return any(said)
        if getattr(getattr(model, "config", None), "is_decoder", False):
            return True
        family = family_of(model)
        if family is not None:
            return bool(family.decoder)
        can = getattr(around[-1], "can_generate", None)
        return bool(can and can())

    def _around(self) -> list[nn.Module]:
        """Return the sub-module and what it is in, up to the host's model."""
        if self.root is None or self.module is self.root:
            return [self.module]
        names = self.path.split(".")
        above = [
            self.root.get_submodule(".".join(names[:n])) for n in range(len(names) - 1, -1, -1)
        ]
        return [self.module, *above]

    def _widthless(self, end: str) -> SiteError:
        return SiteError(
            f"cannot tell how wide the {end} of {self.path or 'the host'} "
            f"({type(self.module).__name__}) is; choose a layer that knows, such as nn.Linear"
        )


def find(model: nn.Module, at: At, *, expect: int | None = None) -> list[Site]:
    """Select sites.

    Args:
        model: the host's model.
        at: a role (``"query"``), a path pattern (``"decoder.*.SelfAttention.{q,v}"``, in which
            ``*`` is anything) of sub-modules or, if it matches none, of parameters
            (``"attn.in_proj_weight[0/3]"``), a type (``nn.Linear``), a predicate on path and
            module, or a list of these. A name that is a path and a role means the path.
            With ``[residual]`` at its end, a role or pattern means the residual inputs of the same
            sub-modules.
        expect: how many sites there must be.

    Returns:
        The sites in the order of ``model.named_modules()``, each once.

    Raises:
        SiteError: if nothing matches, or not as many as expected; it lists what there is.

    Warns:
        UserWarning: if ``nn.Linear`` leaves out the weights of experts, which are no layers.
    """
    several: Sequence[Any] = at if isinstance(at, list | tuple) else [at]
    if not several:
        raise SiteError("at=[] selects nothing; write a role, a path, or a list of some")
    found = {site.label: site for each in several for site in _find_one(model, each)}
    if any(isinstance(each, type) and issubclass(each, LINEAR) for each in several):
        _warn_of_experts(model, found)
    order = {path: i for i, (path, _) in enumerate(open_modules(model))}
    sites = sorted(
        found.values(), key=lambda s: (order[s.path], s.parameter or "", s.part or _WHOLE)
    )
    if expect is not None and len(sites) != expect:
        raise SiteError(
            f"{at!r} matches {len(sites)} sites where {expect} were expected: "
            f"{', '.join(s.label for s in sites[:12])}{' …' if len(sites) > 12 else ''}"
        )
    return sites


def located(model: nn.Module, labels: Sequence[str]) -> list[Site]:
    """Return the sites of exact labels, as :attr:`Site.label` writes them; nothing is a pattern.

    Raises:
        SiteError: for a label that is none here, that is two things, or that comes twice.
    """
    modules = {bare(path): (path, module) for path, module in open_modules(model)}
    sites = [_located(model, modules, label) for label in labels]
    if len(set(labels)) < len(sites):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise SiteError(f"the site {twice!r:.80} is named twice")
    return sites


def _located(model: nn.Module, modules: Mapping[str, tuple[str, nn.Module]], label: str) -> Site:
    found = []
    for text in dict.fromkeys((label, label.removesuffix(RESIDUAL))):
        for layer, part in dict.fromkeys(((bare(text), None), _split(bare(text)))):
            above, _, name = layer.rpartition(".")
            site = None
            if layer in modules:
                site = _site(model, *modules[layer], part)
            elif above in modules and modules[above][1]._parameters.get(name) is not None:
                site = _site(model, *modules[above], part, name)
            if site is not None:
                found.append(replace(site, residual=text != label))
    if len(found) > 1:  # a layer may be called c[0/2], beside one called c
        raise SiteError(f"the site {label!r:.80} is two things here; call the layer otherwise")
    if not found:
        raise SiteError(
            f"the site {label!r:.80} is not in this {type(model).__name__}: it has no such layer "
            f"or parameter{_compiled(model)}"
        )
    return found[0]


def _split(text: str) -> tuple[str, Part | None]:
    try:
        return split_part(text)
    except SiteError:  # no part; a layer may be called so
        return text, None


def _warn_of_experts(model: nn.Module, found: Mapping[str, Site]) -> None:
    """Say which weights of experts a selection of linear layers leaves out."""
    modules = open_modules(model)
    left = [
        label
        for path, module in modules
        for label, _ in weight_labels(path, module)
        if label not in found and is_stack(module, label.rpartition(".")[2])
    ]
    if left:
        some = ", ".join(map(repr, dict.fromkeys(map(starred, left))))
        warn(
            f"linear layers are selected, and {len(left)} weights of experts, which are parameters "
            f"and no layers, are left out; at=[nn.Linear, {some}] takes them too",
        )


def one_input(model: nn.Module) -> list[list[nn.Module]]:
    """Return the groups of layers that share an input (query, key and value), in a known
    architecture."""
    groups: dict[tuple[int, str], list[nn.Module]] = {}
    for number, patterns in enumerate(same_input(model)):
        for site in _sites_of(model, patterns):
            groups.setdefault((number, site.path.rpartition(".")[0]), []).append(site.module)
    return list(groups.values())


def _find_one(model: nn.Module, at: At) -> list[Site]:
    if isinstance(at, str) and at.endswith(RESIDUAL):
        return [replace(s, residual=True) for s in _find_one(model, at.removesuffix(RESIDUAL))]
    if isinstance(at, str):
        return _find_named(model, at)
    if not callable(at) or isinstance(at, nn.Module):
        raise SiteError(
            f"a selection is a role, a path pattern, a type, a predicate or a list, not {at!r:.80}"
        )
    modules = dict(open_modules(model))
    holds = (lambda _, module: isinstance(module, at)) if isinstance(at, type) else at
    sites = [_site(model, path, module) for path, module in modules.items() if holds(path, module)]
    if sites:
        return sites
    if isinstance(at, type):
        kinds = sorted({type(m).__name__ for m in modules.values()})
        raise SiteError(
            f"no {at.__name__} in the host; it is made of {', '.join(kinds)}{_compiled(model)}"
        )
    raise SiteError(
        f"the predicate {at!r} holds for none of {len(modules)} sub-modules{_compiled(model)}"
    )


def _find_named(model: nn.Module, at: str) -> list[Site]:
    """Find the sites of a path pattern, or of a role where no path is called so."""
    sites = _match(model, at)
    if sites:
        return sites
    roles = roles_of(model)
    sites = _sites_of(model, roles.patterns.get(at, ()))
    if not sites:
        raise _no_match(model, at)
    return [replace(site, guessed=True) for site in sites] if roles.guessed else sites


def _sites_of(model: nn.Module, patterns: Sequence[str]) -> list[Site]:
    """Find the sites of a role: where PEFT wraps a layer, that layer, beside what PEFT adds."""
    found = [site for each in patterns for site in _match(model, each, numbers=True)]
    for at, site in enumerate(found):
        inner = getattr(site.module, "base_layer", None)
        if isinstance(inner, WEIGHTED):
            found[at] = replace(site, path=joined(site.path, "base_layer"), module=inner)
    return found


def _match(model: nn.Module, selection: str, numbers: bool = False) -> list[Site]:
    """Find the sub-modules that a pattern means, or if it means none, the parameters."""
    text, part = split_part(selection)
    wanted = pattern(text, numbers)
    means = {p: m for p, m in open_modules(model) if wanted.matches(p) or wanted.matches(bare(p))}
    inner = {p: m for p, m in means.items() if not wraps(m)}  # what torch has wrapped something in
    found = [_site(model, p, m, part) for p, m in (inner or means).items()]
    if found:
        return found
    named = [
        (path, module, name, value)
        for path, module in open_modules(model)
        for name, value in module._parameters.items()
        if wanted.matches(joined(path, name))
    ]
    found = [_site(model, p, m, part, name) for p, m, name, v in named if v is not None]
    if named and not found:
        raise _absent(named[0][0], named[0][1], named[0][2], selection)
    return found


def _site(
    model: nn.Module,
    path: str,
    module: nn.Module,
    part: Part | None = None,
    name: str | None = None,
) -> Site:
    """Return the site at a sub-module, or at its parameter ``name``."""
    if name == "weight" and isinstance(module, WEIGHTED):
        name = None
    above, _, last = path.rpartition(".")
    if last == "out_proj" and name in (None, "bias"):
        attention = model.get_submodule(above)
        if isinstance(attention, nn.MultiheadAttention):  # it reads the weight, and never calls it
            return Site(above, attention, part, model, parameter=f"out_proj.{name or 'weight'}")
    return Site(path, module, part, model, parameter=name)


def _absent(path: str, module: nn.Module, name: str, asked: str) -> SiteError:
    labels, why = weight_labels(path, module), ""
    if isinstance(module, nn.MultiheadAttention):
        k, v = module.kdim, module.vdim
        kept = "one weight" if module._qkv_same_embed_dim else "three weights"
        why = f" (embed_dim={module.embed_dim}, kdim={k}, vdim={v}: they are kept in {kept})"
    some = ", ".join(f"{label!r}{f' ({what})' if what else ''}" for label, what in labels)
    here = f"; write at={labels[0][0]!r}; its weights are {some}" if labels else ""
    return SiteError(f"{asked!r}: this {type(module).__name__} has no {name}{why}{here}")


def matches(selection: str, site: Site) -> bool:
    """Return whether a pattern matches the path of ``site``, with its part or without."""
    wanted = pattern(selection)
    return any(wanted.matches(text) for text in (site.label, site.path))


def _no_match(model: nn.Module, at: str) -> SiteError:
    roles = roles_of(model)
    known = roles.patterns
    paths = [p for p, _ in open_modules(model) if p]
    weights = [label for p, m in open_modules(model) for label, _ in weight_labels(p, m)]
    near = get_close_matches(at, [*paths, *weights], n=3, cutoff=0.4) or paths[:3]
    near_roles = get_close_matches(at, [role for role in known if role != at], n=1)
    hint = f"did you mean at={near_roles[0]!r}? " if near_roles else ""
    if at in known:
        hint = f"This {type(model).__name__} has no such part; "
    return SiteError(
        f"{at!r} matches no site. {hint}{roles}; paths near it: {', '.join(near)}{_compiled(model)}"
    )


def _compiled(model: nn.Module) -> str:
    """Say which parts of a model have no sites, because TorchScript has compiled them."""
    compiled = dict(model.named_modules()).keys() - dict(open_modules(model)).keys()
    tops = sorted(path for path in compiled if path.rpartition(".")[0] not in compiled)
    if not tops:
        return ""
    return (
        f"; {', '.join(tops)}: compiled by TorchScript (torch.jit), so that nothing in it is a "
        f"site; make the host of the modules from before torch.jit.script or trace"
    )
