"""Attention layers that accept more keys and values, and the shape of these."""

from __future__ import annotations

from inspect import isfunction, unwrap

from torch import nn

from modgraft.core.errors import SiteError
from modgraft.core.sites import Site

# the names that models give to the width of a head, the number of heads, and the key projection
_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")
_COUNTS = ("num_key_value_heads", "num_heads", "n_heads", "num_attention_heads")
_KEYS = ("k_proj", "key", "k")


def attends(module: nn.Module) -> bool:
    """Return whether ``module`` asks transformers' registry for its attention function."""
    functions = [f for cls in type(module).__mro__ for f in vars(cls).values() if isfunction(f)]
    return any("get_interface" in unwrap(f).__code__.co_names for f in functions)


def key_value_shape(method: str, site: Site) -> tuple[int, int]:
    """Return how many heads the keys of an attention layer have, and how wide each is.

    Raises:
        SiteError: if the site is no attention layer that accepts more keys and values.
    """
    module = site.module
    if not attends(module):
        raise SiteError(_refusal(method, site))
    if site.part is not None:
        raise SiteError(
            f"{method} at {site.label}: an attention layer is taken as a whole, at={site.path!r}"
        )
    width = next((w for name in _WIDTHS if isinstance(w := getattr(module, name, None), int)), None)
    width = width or _config_width(module)
    if not width:
        raise SiteError(f"{method} at {site.label}: {type(module).__name__} has no head width")
    children = dict(module.named_children())
    layer = next((children[name] for name in _KEYS if name in children), None)
    if isinstance(total := getattr(layer, "out_features", None), int):
        if total % width:
            raise SiteError(
                f"{method} at {site.label}: {total} key features are not heads of {width} features "
                f"each; {type(module).__name__} keeps its keys in a way that it cannot follow"
            )
        return total // width, width
    for source in (module, getattr(module, "config", None)):
        for name in _COUNTS:
            if isinstance(count := getattr(source, name, None), int):
                return count, width
    raise SiteError(f"{method} at {site.label}: {type(module).__name__} has no number of heads")


def _config_width(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    hidden = getattr(config, "hidden_size", None)
    heads = getattr(config, "num_attention_heads", None)
    return hidden // heads if hidden and heads else None


def _refusal(method: str, site: Site) -> str:
    """Say why ``site`` is refused, and name an attention layer in it, around it, or anywhere."""
    what = (
        f"{method} acts on attention layers that ask transformers' registry for their function, "
        f"and {site.label or 'the host'} ({type(site.module).__name__}) does not"
    )
    paths = [p for p, m in (site.root or site.module).named_modules() if attends(m)]
    near = [p for p in paths if p.startswith(f"{site.path}.") or site.path.startswith(f"{p}.")]
    if near or paths:
        return f"{what}; at={(near or paths)[0]!r}, for instance"
    if isinstance(site.module, nn.MultiheadAttention):
        return f"{what}: it computes its attention by itself; use LoRA or Adapter there"
    return f"{what}, nor does any other layer of this host; use LoRA or Adapter there"
