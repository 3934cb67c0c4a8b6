"""Sparse changes of a weight: a binary mask b says which entries stay, or which change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from modgraft.computation.base import ParameterComposition
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.layers import weight_matrix
from modgraft.core.sites import Site


@final
class SparseSubnetwork(ParameterComposition):
    """f'(x) = f(x; b ⊙ (θ + φ)), b = 1 and φ = 0 at the start.

    A lottery ticket (Frankle & Carbin 2019, arXiv:1803.03635). The paper trains θ itself; here the
    host stays frozen, and φ ``[out, in]`` is the trained difference from θ, so that the module
    holds the whole ticket, and φ = 0 rewinds it. b ``[out, in]`` bool has no gradient:
    :func:`modgraft.magnitude_pruning` or :meth:`prune` sets it. A pruned weight is no longer
    trained. At an embedding both are ``[entries, width]``.

    Raises:
        ModgraftError: for a site without a weight matrix.
    """

    identity: ClassVar[bool] = True

    def build(self, site: Site) -> None:
        shape = weight_matrix(site.module, site.part, site.parameter).shape
        self.phi = nn.Parameter(torch.zeros(shape))
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))

    def delta(self, weight: Tensor) -> Tensor:
        """Return b ⊙ (θ + φ) − θ: φ where a weight stays, −θ where it is pruned."""
        return torch.where(self.get_buffer("mask"), self.phi, -weight)

    def prune(self, mask: Tensor) -> None:
        """Prune the weights where ``mask`` ``[out, in]`` bool is False; pruned ones stay pruned.

        Raises:
            ModgraftError: for another shape or type.
        """
        kept = self.get_buffer("mask")
        if mask.shape != kept.shape or mask.dtype != torch.bool:
            raise ModgraftError(
                f"a mask here is torch.bool {list(kept.shape)} (True where a weight stays), "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        kept.logical_and_(mask.to(kept.device))


@final
class Supermask(ParameterComposition):
    """f'(x) = f(x; θ₀ ⊙ b), b = 1 at the k largest scores s of the weight, else 0.

    Edge-popup (Ramanujan et al. 2020, arXiv:1911.13299): θ₀ stays frozen and the scores s
    ``[out, in]`` are trained by a straight-through gradient, ∂L/∂s = ∂L/∂b = ∂L/∂(θ₀ ⊙ b) ⊙ θ₀, for
    all scores. They are drawn as ``nn.Linear`` draws its weight, uniformly in ±1/√in. The paper
    rescales θ₀, which is random there; that is left out.

    Args:
        density: the share of the weights that stay; k = ⌈density · out · in⌉.

    Raises:
        ModgraftError: for a density outside (0, 1), or a site without a weight matrix.
    """

    density: float = 0.5

    def __post_init__(self) -> None:
        _check_density(self, self.density)

    def build(self, site: Site) -> None:
        self.scores = nn.Parameter(
            torch.empty(weight_matrix(site.module, site.part, site.parameter).shape)
        )
        nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))

    def kept(self) -> Tensor:
        """Return b ``[out, in]`` bool."""
        flat = self.scores.detach().flatten()
        best = flat.topk(math.ceil(self.density * flat.numel())).indices
        return torch.zeros_like(flat, dtype=torch.bool).scatter(0, best, True).view_as(self.scores)

    def delta(self, weight: Tensor) -> Tensor:
        """Return (b − 1) ⊙ θ₀, with ∂b/∂s = 1."""
        through = self.scores - self.scores.detach()  # 0, with the gradient of s
        return (self.kept().to(weight.dtype) + through - 1) * weight


@final
class SparseDelta(ParameterComposition):
    """f'(x) = f(x; θ + b ⊙ φ), φ = 0 at the start.

    Lottery-ticket sparse fine-tuning (Ansell et al. 2022, arXiv:2110.07560), in two phases that
    :func:`modgraft.sparse_finetuning` runs: first all of φ is trained; then b becomes 1 at the
    largest |φ| over all sites, φ is reset to 0, and only φ where b = 1 is trained. In the first
    phase ``values`` ``[out · in]`` is all of φ and ``indices`` is empty; :meth:`keep` begins the
    second, in which the module consists of, and is saved as, ``values`` ``[k]`` at the flat
    positions ``indices`` ``[k]``.

    Args:
        density: the share of the weights, counted over all sites, that the second phase trains.

    Raises:
        ModgraftError: for a density outside (0, 1), or a site without a weight matrix.
    """

    identity: ClassVar[bool] = True

    density: float = 0.05

    def __post_init__(self) -> None:
        _check_density(self, self.density)

    def build(self, site: Site) -> None:
        self._shape = weight_matrix(site.module, site.part, site.parameter).shape
        self.values = nn.Parameter(torch.zeros(self._shape.numel()))
        self.register_buffer("indices", torch.zeros(0, dtype=torch.int32))

    def delta(self, weight: Tensor) -> Tensor:
        indices = self.get_buffer("indices")
        if self.values.numel() != indices.numel():  # the first phase
            return self.values.view(self._shape)
        flat = self.values.new_zeros(self._shape.numel())
        return flat.scatter(0, indices.long(), self.values).view(self._shape)

    def keep(self, indices: Tensor) -> None:
        """Begin the second phase: reset φ to 0, and train it at these positions only.

        Args:
            indices: ``[k]`` different flat positions in the weight ``[out, in]``.

        Raises:
            ModgraftError: for a position that is given twice or is outside the weight.
        """
        size = self._shape.numel()
        indices = indices.flatten().to(self.values.device, torch.int64)
        outside = indices[(indices < 0) | (indices >= size)]
        if outside.numel() or indices.unique().numel() != indices.numel():
            found = f"{outside[0].item()} is outside" if outside.numel() else "one is there twice"
            raise ModgraftError(
                f"SparseDelta keeps different positions 0 … {size - 1} of its {list(self._shape)} "
                f"weight, as in keep(values.abs().topk(k).indices); {found}"
            )
        dtype = torch.int32 if size < 2**31 else torch.int64
        self.register_buffer("indices", indices.to(dtype))
        zeros = self.values.detach().new_zeros(indices.numel())
        self.values = nn.Parameter(zeros, requires_grad=self.values.requires_grad)

    def resize_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the positions of a stored module, which training has chosen."""
        indices, values = tensors["indices"], tensors["values"]
        if indices.shape == values.shape:
            self.keep(indices)
        elif indices.numel():
            raise CheckpointError(
                f"{indices.numel()} indices for {values.numel()} values; save the module again"
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any, **more: Any) -> None:
        stored = {k: state_dict[prefix + k] for k in self.state_dict() if prefix + k in state_dict}
        if any(t.shape != stored.get(k, t).shape for k, t in self.state_dict().items()):
            self.resize_to({**self.state_dict(), **stored})
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


def _check_density(method: ParameterComposition, density: float) -> None:
    if not 0 < density < 1:
        raise ModgraftError(
            f"{type(method).__name__}(density={density}): the density is the share of weights in "
            f"(0, 1), such as density=0.1"
        )
