"""Trainable tokens: some rows of an embedding, such as those of new words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.computation._redirect import ModuleTensors, redirect
from modgraft.computation.base import Computation, ParameterComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import stored, weight_matrix
from modgraft.core.sites import Site


@final
class TrainableTokens(ParameterComposition):
    """W'[i] = φ_i for the rows i in ``ids`` of W, φ_i = W[i] at the start.

    The rows of an embedding ``[entries, width]`` for a few tokens are trained, such as tokens that
    were added to the vocabulary, and no others (PEFT's trainable tokens). ``rows`` ``[k, width]``
    holds the new rows themselves, not their difference, so that they are the same whatever
    the host's were. Sites that share one weight, as an embedding and the output layer tied to it,
    share the rows, which are stored at the first.

    Args:
        ids: the tokens, each once.

    Raises:
        ModgraftError: for no ids, an id given twice or outside the table, or a site without a
            weight matrix.
    """

    identity: ClassVar[bool] = True

    ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.ids = tuple(self.ids)
        if not self.ids or len(set(self.ids)) != len(self.ids):
            raise ModgraftError(
                f"TrainableTokens(ids={self.ids!r:.80}): one or more tokens, each once"
            )

    def build(self, site: Site) -> None:
        table = weight_matrix(site.module, site.part, site.parameter)
        if outside := [i for i in self.ids if not 0 <= i < len(table)]:
            raise ModgraftError(
                f"TrainableTokens at {site.label}: it has rows 0 … {len(table) - 1}, and there is "
                f"no row {outside[0]}"
            )
        self.register_buffer("_ids", torch.tensor(self.ids), persistent=False)
        self.rows = nn.Parameter(table.detach()[list(self.ids)].clone())

    def build_all(self, sites: Sequence[Site]) -> list[Computation]:
        places = [self.at(site) for site in sites]
        firsts: dict[object, TrainableTokens] = {}
        for site, place in zip(sites, places, strict=True):
            weight = stored(site.module, site.parameter)
            first = firsts.setdefault((id(weight), site.part), place)
            if first is not place:
                redirect(place, ["rows"], ModuleTensors(first))
        return list(places)

    def delta(self, weight: Tensor) -> Tensor:
        ids = self.get_buffer("_ids")
        change = self.rows - weight[ids]
        return torch.zeros_like(weight, dtype=change.dtype).index_copy(0, ids, change)

    def effect(
        self, x: Tensor, layer: nn.Module, weight: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """Return φ_i − W[i] where an embedding looks up i, without a dense Δ."""
        if not isinstance(layer, nn.Embedding):
            return super().effect(x, layer, weight, y)
        ids = self.get_buffer("_ids")
        change = F.pad(self.rows - weight[ids], (0, 0, 1, 0))  # row 0: no change
        which = (x[..., None] == ids) * torch.arange(1, len(ids) + 1, device=ids.device)
        return F.embedding(which.sum(-1), change)
