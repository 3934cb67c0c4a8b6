"""Sparse parameter composition: a binary mask b says which weights stay, or which change."""

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
    host stays frozen, and φ ``[out, in]`` is how far training has taken a weight from it, so that
    the module holds the whole ticket and rewinding to θ is φ = 0. b ``[out, in]`` bool has no
    gradient: it comes from :func:`modgraft.magnitude_pruning`, or is set by :meth:`prune`. What b
    takes out no longer learns. At an embedding both are ``[entries, width]``.

    Raises:
        ModgraftError: for a site without a weight matrix.
    """

    identity: ClassVar[bool] = True

    def build(self, site: Site) -> None:
        shape = weight_matrix(site.module, site.part, site.parameter).shape
        self.phi = nn.Parameter(torch.zeros(shape))
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))

    def delta(self, weight: Tensor) -> Tensor:
        """b ⊙ (θ + φ) − θ: φ where a weight stays, −θ where it goes."""
        return torch.where(self.get_buffer("mask"), self.phi, -weight)

    def prune(self, mask: Tensor) -> None:
        """Keep the weights where ``mask`` ``[out, in]`` bool is True, of those still there.

        Raises:
            ModgraftError: for another shape or type.
        """
        own = self.get_buffer("mask")
        if mask.shape != own.shape or mask.dtype != torch.bool:
            raise ModgraftError(
                f"a mask here is torch.bool {list(own.shape)} (True where a weight stays), "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        own.logical_and_(mask.to(own.device))


@final
class Supermask(ParameterComposition):
    """f'(x) = f(x; θ₀ ⊙ b), b = 1 at the k largest scores s of the weight, else 0.

    Edge-popup (Ramanujan et al. 2020, arXiv:1911.13299): θ₀ never learns, the scores s
    ``[out, in]`` do, straight through the choice: ∂L/∂s = ∂L/∂b = ∂L/∂(θ₀ ⊙ b) ⊙ θ₀, for all of
    them. They are drawn as ``nn.Linear`` draws its weight, uniformly in ±1/√in. The paper's
    rescaling of θ₀ belongs to random weights and is left out.

    Args:
        density: the share of the weights that stay, k = ⌈density · out · in⌉.

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
        """b ``[out, in]`` bool."""
        flat = self.scores.detach().flatten()
        best = flat.topk(math.ceil(self.density * flat.numel())).indices
        return torch.zeros_like(flat, dtype=torch.bool).scatter(0, best, True).view_as(self.scores)

    def delta(self, weight: Tensor) -> Tensor:
        """(b − 1) ⊙ θ₀, with ∂b/∂s = 1."""
        through = self.scores - self.scores.detach()  # 0, with the gradient of s
        return (self.kept().to(weight.dtype) + through - 1) * weight


@final
class SparseDelta(ParameterComposition):
    """f'(x) = f(x; θ + b ⊙ φ), φ = 0 at the start.

    Lottery-ticket sparse fine-tuning (Ansell et al. 2022, arXiv:2110.07560), in two phases that
    :func:`modgraft.sparse_finetuning` runs: all of φ is trained, b becomes 1 at the largest |φ|
    over all sites, φ goes back to 0, and what b kept is trained. Until :meth:`keep` has been called
    ``values`` ``[out · in]`` is all of φ and ``indices`` is empty; from then on the module is
    ``values`` ``[k]`` at the flat positions ``indices`` ``[k]``, and so is what is saved.

    Args:
        density: the share of all the weights of all sites that the second phase trains.

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
        """Begin the second phase: φ is 0 again, and learns at these places only.

        Args:
            indices: ``[k]`` flat positions in the weight ``[out, in]``, each once.

        Raises:
            ModgraftError: for a position twice, or outside the weight.
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
        kind = torch.int32 if size < 2**31 else torch.int64
        self.register_buffer("indices", indices.to(kind))
        fresh = self.values.detach().new_zeros(indices.numel())
        self.values = nn.Parameter(fresh, requires_grad=self.values.requires_grad)

    def resize_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the mask of a stored module, which its configuration does not say."""
        indices, values = tensors["indices"], tensors["values"]
        if indices.shape == values.shape:
            self.keep(indices)
        elif indices.numel():
            raise CheckpointError(
                f"{indices.numel()} indices for {values.numel()} values; save the module again"
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any, **more: Any) -> None:
        stored = {k: state_dict[prefix + k] for k in self.state_dict() if prefix + k in state_dict}
        if any(own.shape != stored.get(k, own).shape for k, own in self.state_dict().items()):
            self.resize_to({**self.state_dict(), **stored})
        super()._load_from_state_dict(state_dict, prefix, *rest, **more)


def _check_density(method: ParameterComposition, density: float) -> None:
    if not 0 < density < 1:
        raise ModgraftError(
            f"{type(method).__name__}(density={density}): the density is the share of weights in "
            f"(0, 1), such as density=0.1"
        )
