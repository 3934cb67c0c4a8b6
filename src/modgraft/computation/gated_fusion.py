"""Gated fusion of a side input, as in multimodal chain of thought."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from modgraft.computation._checks import check_output, real_width
from modgraft.computation.base import FunctionComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.side import Side
from modgraft.core.sites import Site


class Maps(NamedTuple):
    """The attention and the gate of a fusion, for inspection.

    Attributes:
        attention: ``[B, n, m]``, each text token's weights over the side input's vectors.
        attended: ``[B, n, d]``, A.
        gate: ``[B, n, d]`` in (0, 1), G.
    """

    attention: Tensor
    attended: Tensor
    gate: Tensor


@final
class GatedFusion(FunctionComposition):
    """H' = (1 − G) ⊙ H + G ⊙ A, with A = softmax(H Vᵀ/√d) V and G = σ(H W_l + A W_v).

    H ``[B, n, d]`` is the site's output, V = features·W_h ``[B, m, d]`` comes from the side input.
    Multimodal chain of thought (Zhang et al. 2023, arXiv:2302.00923). The paper gives the equations
    above; in the code released with it, A is the output of a whole attention block of one head with
    four biased projections, and G one biased linear layer on [H; A].

    The output stays unchanged for an example whose mask is False everywhere.

    Args:
        source: the name of the side input.
        dim: the width of its features.
        form: ``"paper"`` or ``"released"``.

    Raises:
        ModgraftError: for an unknown form, a site whose output is a map, or features that are not
            ``dim`` wide.
    """

    source: str = "image"
    dim: int = 256
    form: Literal["paper", "released"] = "paper"

    def __post_init__(self) -> None:
        if self.form not in ("paper", "released"):
            raise ModgraftError(f"GatedFusion(form={self.form!r}): 'paper' or 'released'")
        if self.dim < 1:
            raise ModgraftError(f"GatedFusion(dim={self.dim}): the features have a positive width")

    @property
    def side_source(self) -> str:
        return self.source

    def build(self, site: Site) -> None:
        if site.channels_first:
            raise ModgraftError(
                f"GatedFusion at {site.label}: it attends from each of the tokens [B, n, d], and a "
                f"{type(site.module).__name__} puts out a map [B, C, …]; choose a site behind "
                f"which the map is tokens"
            )
        d, released = real_width("GatedFusion", site), self.form == "released"
        self.W_h = nn.Linear(self.dim, d, bias=released)
        if released:
            self.attention = nn.MultiheadAttention(d, num_heads=1, batch_first=True)
            self.gate = nn.Linear(2 * d, d)
        else:
            self.W_l = nn.Linear(d, d, bias=False)
            self.W_v = nn.Linear(d, d, bias=False)

    def maps(self, h: Tensor, side: Side) -> Maps:
        """Return attention, attended features and gate for H ``[B, n, d]``."""
        if side.tensor.shape[-1] != self.dim:
            raise ModgraftError(
                f"side input {self.source!r} is {side.tensor.shape[-1]} wide where this fusion "
                f"was made for {self.dim}; use GatedFusion(dim={side.tensor.shape[-1]}) or the "
                f"features it was trained on"
            )
        seen = side.seen()
        # a row that is all hidden would be NaN, so it sees everything; forward() discards it
        hidden = ~(seen | ~seen.any(dim=1, keepdim=True))  # [B, m]
        v = self.W_h(side.tensor.to(h.dtype))  # [B, m, d]
        if self.form == "released":
            attended, attention = self.attention(h, v, v, key_padding_mask=hidden)
            gate = torch.sigmoid(self.gate(torch.cat([h, attended], dim=-1)))
        else:
            scores = h @ v.transpose(1, 2) / math.sqrt(h.shape[-1])  # [B, n, m]
            attention = scores.masked_fill(hidden[:, None], -torch.inf).softmax(dim=-1)
            attended = attention @ v  # [B, n, d]
            gate = torch.sigmoid(self.W_l(h) + self.W_v(attended))
        return Maps(attention, attended, gate)

    def forward(self, y: Tensor, x: Tensor | None, side: Side | None) -> Tensor:
        if side is None:
            raise ModgraftError(f"a fusion needs the side input {self.source!r}")
        if y.dim() != 3:
            raise ModgraftError(
                f"GatedFusion acts on tokens [B, n, d], and this site puts out {list(y.shape)}; "
                f"choose a layer that puts out tokens whenever it is called, such as a block"
            )
        check_output("GatedFusion", y, self.W_h.out_features)
        some = side.seen().any(dim=1)[:, None, None]  # [B, 1, 1]
        h = torch.where(some, y, 0.0)  # nor does a NaN of the others get into a gradient
        _, attended, gate = self.maps(h, side)
        return torch.where(some, (1 - gate) * h + gate * attended, y)
