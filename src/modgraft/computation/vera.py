"""VeRA: a change of a weight by two vectors around random matrices that all sites share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.computation._checks import check_at_least_one
from modgraft.computation._redirect import ModuleTensors, redirect
from modgraft.computation.base import Computation, ParameterComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import low_rank_map, weight_matrix
from modgraft.core.sites import Site


@final
class VeRA(ParameterComposition):
    """Δ = Λ_b B Λ_d A, with B and A random and frozen, b = 0 and d = ``initial`` at the start.

    Vector-based random matrix adaptation (Kopiczko et al. 2024, arXiv:2310.11454). Only the
    diagonals b ``[out]`` and d ``[r]`` are trained, a pair at each site. A ``[r, in]`` and B
    ``[out, r]`` are drawn once, as large as the largest site needs, uniformly in ±√(6 / columns);
    every site reads its first columns of A and its first rows of B. They are stored once, at the
    first site, since a random stream is not the same in every version of torch.

    At an embedding, A is ``[r, width]`` and B ``[entries, r]``; at a convolution the weight is the
    matrix [out, in/groups · k · k], as for LoRA.

    Args:
        rank: r; it costs r numbers a site and may be larger than LoRA's.
        initial: d at the start.
        dropout: probability in [0, 1) of dropping an input of the branch while training.
        seed: the seed of A and B.

    Raises:
        ModgraftError: for an argument out of range, or a site without a weight matrix.
    """

    identity: ClassVar[bool] = True

    rank: int = 256
    initial: float = 0.1
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least_one("VeRA", rank=self.rank)
        if not 0 <= self.dropout < 1:
            raise ModgraftError(f"VeRA(dropout={self.dropout}): dropout is in [0, 1)")
        if self.seed < 0:
            raise ModgraftError(f"VeRA(seed={self.seed}): the seed is at least 0")

    def build(self, site: Site) -> None:
        self._size = weight_matrix(site.module, site.part, site.parameter).shape
        if self.dropout and site.parameter is not None:
            raise ModgraftError(
                f"VeRA(dropout={self.dropout}) at {site.label}: a {type(site.module).__name__} is "
                f"run with its weights changed, so there is no input of the branch to drop; use "
                f"VeRA(rank={self.rank}) there"
            )
        rows, columns = self._size
        self.b = nn.Parameter(torch.zeros(rows))
        self.d = nn.Parameter(torch.full((self.rank,), self.initial))
        self._draw(rows, columns)

    def build_all(self, sites: Sequence[Site]) -> list[Computation]:
        places = [self.at(site) for site in sites]
        rows, columns = (max(place._size[axis] for place in places) for axis in (0, 1))
        first = places[0]
        like = first.b
        first._draw(rows, columns)
        first.to(like)
        for place in places[1:]:
            redirect(place, ["A", "B"], ModuleTensors(first))
        return list(places)

    def _draw(self, rows: int, columns: int) -> None:
        for name, drawn in projections(self.rank, rows, columns, self.seed).items():
            self.register_buffer(name, drawn)

    @property
    def is_weight_change(self) -> bool:
        return not (self.dropout and self.training)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        rows, columns = self._size
        A, B = self.get_buffer("A")[:, :columns], self.get_buffer("B")[:rows]
        return self.b[:, None] * B, self.d[:, None] * A, 1.0  # [out, r], [r, in]

    def delta(self, weight: Tensor) -> Tensor:
        left, right, _ = self.factors()
        return left @ right

    def effect(
        self, x: Tensor, layer: nn.Module, weight: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """Return b ⊙ B(d ⊙ Ax), by factors."""
        if not isinstance(layer, nn.Embedding):  # whose x is ids
            x = F.dropout(x, self.dropout, self.training)
        left, right, _ = self.factors()
        return low_rank_map(layer, x, right, left)


def projections(rank: int, rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """Draw A ``[rank, columns]`` and B ``[rows, rank]`` in float32, as PEFT does for its key."""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for name, shape in (("A", (rank, columns)), ("B", (rows, rank))):
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))
        drawn[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return drawn
