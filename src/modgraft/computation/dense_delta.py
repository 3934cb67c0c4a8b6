"""A change of the whole weight: f'(x) = f(x; θ + Δ)."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from modgraft.computation.base import ParameterComposition
from modgraft.core.layers import bias_vector, weight_matrix
from modgraft.core.sites import Site


@final
class DenseDelta(ParameterComposition):
    """f'(x) = f(x; θ + Δ), Δ = 0 at the start.

    Full fine-tuning of a site as a module: Δ ``[out, in]`` is as large as the weight, a stack of
    experts' ``[E, out, in]``. Also a task vector (Ilharco et al. 2023, arXiv:2212.04089), and what
    :func:`modgraft.merge` makes of changes whose merge has no low rank.

    Args:
        bias: whether the layer's bias is changed too, where it has one: by b ``[out]``, 0 at the
            start.
    """

    identity: ClassVar[bool] = True
    experts: ClassVar[bool] = True

    bias: bool = False

    def build(self, site: Site) -> None:
        weight = weight_matrix(site.module, site.part, site.parameter)
        self.values = nn.Parameter(torch.zeros(weight.shape))
        vector = bias_vector(site.module, site.part, site.parameter) if self.bias else None
        self.b = None if vector is None else nn.Parameter(torch.zeros(vector.shape))

    def delta(self, weight: Tensor) -> Tensor:
        return self.values

    def bias_delta(self, bias: Tensor | None) -> Tensor | None:
        return self.b
