"""A linear map of features into the host's input: f'(x) = f([φ, x])."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from modgraft.computation._checks import check_at_least_one
from modgraft.computation.base import TokenComposition
from modgraft.core.embeddings import token_width
from modgraft.core.errors import ModgraftError
from modgraft.core.side import Side
from modgraft.core.sites import Site


@final
class LinearMap(TokenComposition):
    """[P, x] with P = reshape(V W + b): feature vectors become soft prompt tokens.

    V ``[B, m, dim]`` is the side input, W ``[dim, k·d]``, P ``[B, m·k, d]``, k = ``tokens_each``.
    It maps an image encoder's features into a frozen language model's embeddings: a patch to one
    token as in LiMBeR (Merullo et al. 2023, arXiv:2209.15162), or one pooled vector to several
    tokens as in FROMAGe (Koh et al. 2023, arXiv:2301.13823).

    Args:
        source: the name of the side input.
        dim: the width of its features.
        tokens_each: how many tokens each feature vector becomes.

    Raises:
        ModgraftError: for features that are not ``dim`` wide, or a call without them.
    """

    source: str = "image"
    dim: int = 256
    tokens_each: int = 1

    def __post_init__(self) -> None:
        check_at_least_one("LinearMap", dim=self.dim, tokens_each=self.tokens_each)

    @property
    def side_source(self) -> str:
        return self.source

    def build(self, site: Site) -> None:
        self.width = token_width(site.module)
        self.map = nn.Linear(self.dim, self.tokens_each * self.width)

    def tokens(self, batch: int, side: Side | None) -> tuple[Tensor, Tensor]:
        if side is None:
            raise ModgraftError(f"a linear map needs the side input {self.source!r}")
        if side.tensor.shape[-1] != self.dim:
            raise ModgraftError(
                f"side input {self.source!r} is {side.tensor.shape[-1]} wide where this map was "
                f"made for {self.dim}; use LinearMap(dim={side.tensor.shape[-1]}) or the features "
                f"it was trained on"
            )
        mapped = self.map(side.tensor.to(self.map.weight.dtype))  # [B, m, tokens_each·d]
        seen = side.seen().repeat_interleave(self.tokens_each, dim=1)  # [B, m·tokens_each]
        return mapped.reshape(batch, -1, self.width), seen  # [B, m·tokens_each, d]
