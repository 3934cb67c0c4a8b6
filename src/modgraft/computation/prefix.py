"""Prefix tuning: trained keys and values at every attention layer."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from modgraft.computation._redirect import ModuleTensors, redirect
from modgraft.computation.base import Computation, KeyValueComposition
from modgraft.core.attention import asks_registry
from modgraft.core.embeddings import not_given
from modgraft.core.errors import ModgraftError, SiteError
from modgraft.core.side import Side
from modgraft.core.sites import Site

# the names that models give to the width of a head, the number of heads, and the key projection
_WIDTHS = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_COUNTS = ("kv_heads", "num_key_value_heads", "num_heads", "n_heads", "num_attention_heads")
_KEYS = ("k_proj", "key", "k")


@final
class Prefix(KeyValueComposition):
    """softmax(Q [P_k; K]ᵀ·s) [P_v; V] with φ = (P_k, P_v) at every attention layer.

    Prefix tuning (Li & Liang 2021, arXiv:2101.00190): P_k and P_v ``[k, heads, d]`` go before the
    keys and values of a layer, s is the layer's scale, and every query sees them. The text keeps
    its positions: the first token stays at position 0, prefix keys are not rotated, and T5's
    relative bias is zero for them; so a prefix uses up none of the host's positions. With
    ``counted`` the text's positions begin after the prefix, as in PEFT, where it is a KV cache. The
    attention weights that the layer returns have k more columns.

    Args:
        length: k.
        reparametrise: the hidden width h of the paper's section 4.3: P is then an MLP's output,
            (P_k, P_v) = W_2 tanh(W_1 E + b_1) + b_2. E ``[k, e]`` (e the host's width) and W_1
            ``[h, e]`` are shared by all sites and stored at the first; each site has a separate
            W_2. The MLP is saved, so that training can resume; ``mg.fold_prefix`` replaces it by
            the prefix it computes.
        counted: whether the k vectors count as positions, before those of the text.

    Raises:
        ModgraftError: for a length or a width below 1, a site that is no attention layer of
            transformers, or ``counted`` in a host whose positions nobody can give it.
    """

    length: int = 10
    reparametrise: int | None = None
    counted: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ModgraftError(
                f"Prefix(length={self.length}): a prefix has at least 1 vector, Prefix(length=1)"
            )
        if self.reparametrise is not None and self.reparametrise < 1:
            raise ModgraftError(
                f"Prefix(reparametrise={self.reparametrise}): the MLP's hidden width is at least "
                f"1; for a prefix without one leave it out, Prefix(length={self.length})"
            )

    def build(self, site: Site) -> None:
        self.heads, self.width, self.value_width = key_value_shape("Prefix", site)
        why = not_given(site.root or site.module) if self.counted else None
        if why is not None:
            raise ModgraftError(
                f"Prefix(counted=True) at {site.label}: {why}, so the text's positions cannot "
                f"begin after the prefix; use Prefix(length={self.length})"
            )
        if self.reparametrise is None:
            self.keys = nn.Parameter(torch.empty(self.length, self.heads, self.width))
            self.values = nn.Parameter(torch.empty(self.length, self.heads, self.value_width))
            for tensor in (self.keys, self.values):
                nn.init.normal_(tensor, std=0.02)
        else:
            self.embedding = nn.Parameter(torch.randn(self.length, site.width))
            self.hidden = nn.Linear(site.width, self.reparametrise)
            both = self.width + self.value_width
            self.out = nn.Linear(self.reparametrise, self.heads * both)

    @property
    def positions(self) -> int:
        return self.length if self.counted else 0

    def share_with(self, first: Computation) -> None:
        """Read E and W_1 of the MLP from the first site."""
        if self.reparametrise is not None:
            redirect(self, ["embedding", "hidden.weight", "hidden.bias"], ModuleTensors(first))

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return P_k and P_v, each ``[k, heads, d]``, computed by the MLP if there is one."""
        if self.reparametrise is None:
            return self.keys, self.values
        both = self.out(torch.tanh(self.hidden(self.embedding)))  # [k, heads·(d_k + d_v)]
        keys, values = both.split([self.heads * w for w in (self.width, self.value_width)], -1)
        return keys.unflatten(-1, (self.heads, -1)), values.unflatten(-1, (self.heads, -1))

    def keys_values(self, batch: int, side: Side | None) -> tuple[Tensor, Tensor]:
        keys, values = (t.transpose(0, 1).expand(batch, -1, -1, -1) for t in self.plain())
        return keys, values  # [B, heads, k, d]


def key_value_shape(method: str, site: Site) -> tuple[int, int, int]:
    """Return how many heads the keys of an attention layer have, and how wide keys and values are.

    Raises:
        SiteError: if the site is no attention layer that accepts more keys and values.
    """
    module = site.module
    if not asks_registry(module):
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
        return total // width, width, width
    for source in (module, getattr(module, "config", None)):
        for name in _COUNTS:
            if isinstance(count := getattr(source, name, None), int):
                values = getattr(module, "v_head_dim", None)  # where they are made of a latent
                return count, width, values if isinstance(values, int) else width
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
    paths = [p for p, m in (site.root or site.module).named_modules() if asks_registry(m)]
    near = [p for p in paths if p.startswith(f"{site.path}.") or site.path.startswith(f"{p}.")]
    if near or paths:
        return f"{what}; at={(near or paths)[0]!r}, for instance"
    if isinstance(site.module, nn.MultiheadAttention):
        return f"{what}: it computes its attention by itself; use LoRA or Adapter there"
    return f"{what}, nor does any other layer of this host; use LoRA or Adapter there"
