"""Find the sites of a host, where modules act, by role, path pattern, type or predicate.

A site is a sub-module, or one parameter of a sub-module with several (attention, an RNN).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from modgraft.core.architectures import base_path, family_of
from modgraft.core.errors import SiteError

RESIDUAL = "[residual]"
# the layers that are linear in one weight: there the sub-module and its weight are the same site
WEIGHTED = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

At = str | type[nn.Module] | Callable[[str, nn.Module], bool] | Sequence["At"]


@dataclass(frozen=True)
class Site:
    """One place in a host.

    Attributes:
        path: dotted path of the sub-module; ``""`` is the host itself.
        module: the sub-module there.
        part: ``(i, n)`` for the i-th of n equal parts of a fused projection's output, else None.
        root: the host's model, whose config says what the sub-module alone does not.
        residual: whether effects enter the sub-module's residual input rather than its output; see
            :mod:`modgraft.engine.residual`.
        parameter: the name within the sub-module of the parameter that is meant,
            ``"in_proj_weight"``; None: the sub-module, and the one weight of a layer that has one.
    """

    path: str
    module: nn.Module
    part: tuple[int, int] | None = None
    root: nn.Module | None = None
    residual: bool = False
    parameter: str | None = None

    @property
    def label(self) -> str:
        """The site as a selection, ``"h.0.attn.c_attn[0/3]"``."""
        whole = joined(self.path, (self.parameter or "").removesuffix(".weight"))
        part = f"[{self.part[0]}/{self.part[1]}]" if self.part else ""
        return whole + part + (RESIDUAL if self.residual else "")

    @property
    def in_width(self) -> int:
        """The number of features of the input.

        Raises:
            SiteError: where the module is no linear layer.
        """
        match self.module:
            case nn.Linear(in_features=width):
                return width
            case Conv1D(nx=width):
                return width
        raise self._widthless("input")

    @property
    def width(self) -> int:
        """The number of features of the output, or of the selected part of it.

        Raises:
            SiteError: where neither the module nor its model's config says.
        """
        full = _out_width(self.module) or _config_width(self.module) or _config_width(self.root)
        if full is None:
            raise self._widthless("output")
        return full // self.part[1] if self.part else full

    @property
    def channels_first(self) -> bool:
        """Whether the output is a feature map ``[B, C, …]`` rather than ``[B, …, d]``."""
        last = self.module
        while isinstance(last, nn.Sequential) and len(last):
            known = [child for child in last if _out_width(child) is not None]
            if not known:
                break
            last = known[-1]
        return isinstance(last, (*_CONVOLUTIONS, nn.BatchNorm2d))

    @property
    def embeds(self) -> bool:
        """Whether this layer embeds the host's input."""
        if isinstance(self.module, nn.Embedding):
            return True
        family = None if self.root is None else family_of(self.root)
        if self.root is None or family is None or "embedding" not in family.roles:
            return False
        return self.path in [site.path for site in _find_one(self.root, "embedding")]

    @property
    def time_first(self) -> bool:
        """Whether the output is known to be ``[n, B, d]`` rather than ``[B, n, d]``."""
        layer = self.module
        if isinstance(layer, nn.TransformerEncoder | nn.TransformerDecoder):
            layer = layer.layers[0]
        if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            layer = layer.self_attn
        return isinstance(layer, nn.MultiheadAttention | nn.RNNBase) and not layer.batch_first

    @property
    def stepwise(self) -> bool:
        """Whether the host generates token by token here, so that no token sees a later one."""
        config = getattr(self.root, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            return "encoder" not in self.path.split(".")
        if getattr(config, "is_decoder", False):
            return True
        family = None if self.root is None else family_of(self.root)
        if family is not None:
            return "encoder.output" not in family.roles
        can = getattr(self.root, "can_generate", None)
        return bool(can and can())

    def _widthless(self, end: str) -> SiteError:
        return SiteError(
            f"cannot tell how wide the {end} of {self.path or 'the host'} "
            f"({type(self.module).__name__}) is; choose a layer that knows, such as nn.Linear"
        )


def _out_width(module: nn.Module) -> int | None:
    match module:
        case nn.Linear(out_features=width) | Conv1D(nf=width) | nn.Embedding(embedding_dim=width):
            return int(width)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return int(module.out_channels)
        case nn.MultiheadAttention(embed_dim=width):
            return int(width)
        case nn.RNNBase():
            return (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
        case nn.TransformerEncoderLayer() | nn.TransformerDecoderLayer():
            return module.linear2.out_features
        case nn.TransformerEncoder() | nn.TransformerDecoder():
            return _out_width(module.layers[0])
        case nn.BatchNorm2d(num_features=width):
            return int(width)
        case nn.LayerNorm(normalized_shape=shape):
            return int(shape[-1])
        case nn.Sequential():
            widths = [w for child in module if (w := _out_width(child)) is not None]
            return widths[-1] if widths else None
    direct = dict(module.named_parameters(recurse=False))
    if direct.keys() == {"weight"} and direct["weight"].dim() == 1:  # any class of RMSNorm
        return direct["weight"].shape[0]
    return None


def _config_width(module: nn.Module | None) -> int | None:
    return getattr(getattr(module, "config", None), "hidden_size", None)


def find(model: nn.Module, at: At, *, expect: int | None = None) -> list[Site]:
    """Select sites.

    Args:
        model: the host's model.
        at: a role (``"query"``), a path pattern (``"decoder.*.SelfAttention.{q,v}"``, in which
            ``*`` is anything) of sub-modules or, if it matches none, of parameters
            (``"attn.in_proj_weight[0/3]"``), a type (``nn.Linear``), a predicate on path and
            module, or a list of these. ``"block"`` means the role where the architecture is known.
            With ``[residual]`` at its end, a role or pattern means the residual inputs of the same
            sub-modules.
        expect: how many sites there must be.

    Returns:
        The sites in the order of ``model.named_modules()``, each once.

    Raises:
        SiteError: if nothing matches, or not as many as expected; it lists what there is.
    """
    several: Sequence[Any] = at if isinstance(at, list | tuple) else [at]
    found = {site.label: site for each in several for site in _find_one(model, each)}
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    sites = sorted(
        found.values(), key=lambda s: (order[s.path], s.parameter or "", s.part or (0, 0))
    )
    if expect is not None and len(sites) != expect:
        raise SiteError(
            f"{at!r} matches {len(sites)} sites where {expect} were expected: "
            f"{', '.join(s.label for s in sites[:12])}{' …' if len(sites) > 12 else ''}"
        )
    return sites


def one_input(model: nn.Module) -> list[list[nn.Module]]:
    """Return the groups of layers that share an input (query, key and value), in a known
    architecture."""
    family = family_of(model)
    if family is None:
        return []
    base = base_path(model)
    return [
        [layer for name in names if (layer := getattr(above.module, name, None)) is not None]
        for pattern, names in family.one_input
        for above in _match(model, joined(base, pattern), r"\d+")
    ]


def _find_one(model: nn.Module, at: At) -> list[Site]:
    if isinstance(at, str) and at.endswith(RESIDUAL):
        return [replace(s, residual=True) for s in _find_one(model, at.removesuffix(RESIDUAL))]
    if isinstance(at, str):
        return _find_named(model, at)
    if not callable(at):
        raise SiteError(
            f"a selection is a role, a path pattern, a type, a predicate or a list, not {at!r}"
        )
    modules = dict(model.named_modules())
    holds = (lambda _, module: isinstance(module, at)) if isinstance(at, type) else at
    sites = [_site(model, path, module) for path, module in modules.items() if holds(path, module)]
    if sites:
        return sites
    if isinstance(at, type):
        kinds = sorted({type(m).__name__ for m in modules.values()})
        raise SiteError(f"no {at.__name__} in the host; it is made of {', '.join(kinds)}")
    raise SiteError(f"the predicate {at!r} holds for none of {len(modules)} sub-modules")


def _find_named(model: nn.Module, at: str) -> list[Site]:
    """Find the sites of a role, or of a path pattern if there is no such role."""
    family = family_of(model)
    if family is not None and at in family.roles:
        sites = _match(model, joined(base_path(model), family.roles[at]), r"\d+")
    else:
        sites = _match(model, at, ".*")
    if not sites:
        raise _no_match(model, at)
    return sites


def _match(model: nn.Module, pattern: str, star: str) -> list[Site]:
    part, whole = None, pattern
    if fused := re.fullmatch(r"(.*)\[(\d+)/(\d+)\]", pattern):
        pattern, part = fused[1], (int(fused[2]), int(fused[3]))
        if not part[0] < part[1]:
            last = f"; the last is {pattern}[{part[1] - 1}/{part[1]}]" if part[1] else ""
            raise SiteError(f"{whole!r}: the {part[1]} parts count from 0{last}")
    regex = re.compile(_regex(pattern, star))
    found = [_site(model, p, m, part) for p, m in model.named_modules() if regex.fullmatch(p)]
    if found:
        return found
    named = [
        (path, module, name, value)
        for path, module in model.named_modules()
        for name, value in module._parameters.items()
        if regex.fullmatch(joined(path, name))
    ]
    found = [_site(model, p, m, part, name) for p, m, name, v in named if v is not None]
    if named and not found:
        raise _absent(named[0][0], named[0][1], named[0][2], whole)
    return found


def _site(
    model: nn.Module,
    path: str,
    module: nn.Module,
    part: tuple[int, int] | None = None,
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


def joined(path: str, name: str) -> str:
    """Join two parts of a dotted path, of which either may be empty."""
    return f"{path}.{name}" if path and name else path or name


def weight_labels(path: str, module: nn.Module) -> list[tuple[str, str]]:
    """Return the selections of each weight of a layer with several, with the weight's role or
    ``""``."""
    matrices = [n for n, p in module._parameters.items() if p is not None and p.dim() == 2]
    if not isinstance(module, nn.MultiheadAttention) or len(matrices) not in (1, 3):
        return [(joined(path, name), "") for name in matrices]
    names = [f"{matrices[0]}[{i}/3]" for i in range(3)] if len(matrices) == 1 else matrices
    said = zip([*names, "out_proj"], ["query", "key", "value", "output"], strict=True)
    return [(joined(path, name), what) for name, what in said]


def _absent(path: str, module: nn.Module, name: str, asked: str) -> SiteError:
    labels, why = weight_labels(path, module), ""
    if isinstance(module, nn.MultiheadAttention):
        k, v = module.kdim, module.vdim
        kept = "one weight" if module._qkv_same_embed_dim else "three weights"
        why = f" (embed_dim={module.embed_dim}, kdim={k}, vdim={v}: they are kept in {kept})"
    some = ", ".join(f"{label!r}{f' ({what})' if what else ''}" for label, what in labels)
    here = f"; write at={labels[0][0]!r}; its weights are {some}" if labels else ""
    return SiteError(f"{asked!r}: this {type(module).__name__} has no {name}{why}{here}")


def matches(pattern: str, site: Site) -> bool:
    """Return whether ``pattern`` matches the path of ``site``, with its part or without."""
    regex = re.compile(_regex(pattern, ".*"))
    return any(regex.fullmatch(text) for text in (site.label, site.path))


def _regex(pattern: str, star: str) -> str:
    out, depth = "", 0
    for char in pattern:
        if char == "*":
            out += star
        elif char == "{":
            out, depth = out + "(?:", depth + 1
        elif char == "}" and depth:
            out, depth = out + ")", depth - 1
        elif char == "," and depth:
            out += "|"
        else:
            out += re.escape(char)
    if depth:
        raise SiteError(f"the pattern {pattern!r} opens a brace it does not close")
    return out


def _no_match(model: nn.Module, at: str) -> SiteError:
    family = family_of(model)
    paths = [p for p, _ in model.named_modules() if p]
    if family is None:
        roles = (
            f"{type(model).__name__} is of no known family, so it has paths and types but no roles"
        )
    else:
        roles = f"its roles: {', '.join(family.roles)}"
    weights = [label for p, m in model.named_modules() for label, _ in weight_labels(p, m)]
    near = get_close_matches(at, [*paths, *weights], n=3, cutoff=0.4) or paths[:3]
    near_roles = get_close_matches(at, list(family.roles), n=1) if family else []
    hint = f"did you mean at={near_roles[0]!r}? " if near_roles else ""
    return SiteError(f"{at!r} matches no site. {hint}{roles}; paths near it: {', '.join(near)}")
