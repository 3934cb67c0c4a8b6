"""OFT: a layer's input turned by an orthogonal matrix, f'(x) = f(xR)."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from modgraft.computation._checks import check_at_least_one
from modgraft.computation.base import ParameterComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import weight_matrix
from modgraft.core.sites import Site


@final
class OFT(ParameterComposition):
    """f'(x) = f(xR), Δ = WRᵀ − W: R = (I − S)(I + S)⁻¹ in blocks, S = −Sᵀ; S = 0 at the start.

    Orthogonal finetuning (Qiu et al. 2023, arXiv:2306.07280), which keeps the angles between the
    rows of the weight W ``[out, in]``. R ``[in, in]`` has blocks of b × b on its diagonal, each the
    Cayley transform of a skew-symmetric S, of which ``skew`` ``[in / b, b·(b−1) / 2]`` holds what
    is above the diagonal, row by row. At an embedding ``[entries, width]`` what is looked up is
    turned, Δ = WR − W. At a convolution the matrix is [out, in/groups · k · k].

    With ``terms`` the inverse is a Neumann series that is cut off, R ≈ I + 2S + 2S² + … + S^(n−1)
    (of −S), as PEFT has it by default: no inverse is computed, and R is orthogonal only nearly.

    Args:
        block: b, which divides the width of the input.
        blocks: how many blocks there are, instead of how large one is.
        shared: whether all blocks are one and the same.
        terms: n, at least 3, the number of terms of the series; None: the inverse.

    Raises:
        ModgraftError: for an argument out of range, a width that is not made of such blocks, or a
            site without a weight matrix.
    """

    identity: ClassVar[bool] = True

    block: int = 32
    blocks: int | None = None
    shared: bool = False
    terms: int | None = None

    def __post_init__(self) -> None:
        check_at_least_one("OFT", block=self.block, blocks=self.blocks)
        if self.terms is not None and self.terms < 3:
            raise ModgraftError(f"OFT(terms={self.terms}): a series has at least 3 terms")

    def build(self, site: Site) -> None:
        weight = weight_matrix(site.module, site.part, site.parameter)
        if weight.is_complex():
            raise ModgraftError(
                f"OFT at {site.label}: its weight is {weight.dtype}, and rotations are real; "
                f"LoRA(rank=8) changes complex ones"
            )
        width = weight.shape[-1]
        size = self.block if self.blocks is None else width // self.blocks
        if size < 1 or width % size or (self.blocks and size * self.blocks != width):
            what = f"blocks={self.blocks}" if self.blocks else f"block={self.block}"
            best = max(n for n in range(1, min(size, width) + 1) if width % n == 0) if size else 1
            raise ModgraftError(
                f"OFT({what}) at {site.label}: its input of {width} features is not made of such "
                f"blocks; OFT(block={best}) is"
            )
        count = 1 if self.shared else width // size
        self._size, self._count = size, width // size
        self._turned = isinstance(site.module, nn.Embedding)
        self.skew = nn.Parameter(torch.zeros(count, size * (size - 1) // 2))

    def rotations(self) -> Tensor:
        """Return the blocks of R ``[in / b, b, b]``."""
        above = self.skew.new_zeros(len(self.skew), self._size, self._size)
        i, j = torch.triu_indices(self._size, self._size, 1, device=above.device)
        above = above.index_put((torch.arange(len(above))[:, None], i, j), self.skew)
        S = above - above.mT
        identity = torch.eye(self._size, dtype=S.dtype, device=S.device)
        if self.terms is None:
            R = torch.linalg.solve(identity + S, identity - S, left=False)
        else:
            last = max(self.terms - 1, 3)  # what PEFT's 3 terms come to
            powers = [S]
            for _ in range(last - 1):
                powers.append(powers[-1] @ S)
            R = identity + 2 * sum(powers[:-1]) + powers[-1]
        return R.expand(self._count, -1, -1)

    def delta(self, weight: Tensor) -> Tensor:
        R = self.rotations() if self._turned else self.rotations().mT
        grouped = weight.unflatten(-1, (self._count, self._size))  # [out, in / b, b]
        return torch.einsum("onk,nkc->onc", grouped, R).flatten(-2) - weight
