"""Compacter: a bottleneck whose matrices are sums of Kronecker products."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.computation._checks import check_at_least_one, check_output
from modgraft.computation._redirect import ModuleTensors, redirect
from modgraft.computation.adapter import NONLINEARITIES, Nonlinearity, bottleneck, check_options
from modgraft.computation.base import Computation, FunctionComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.side import Side
from modgraft.core.sites import Site


@final
class Compacter(FunctionComposition):
    """f'(x) = y + s·(W_u σ(W_d y + b_d) + b_u), W = Σ_j A_j ⊗ S_j T_jᵀ, T of W_u = 0 at the start.

    Compacter (Mahabadi et al. 2021, arXiv:2106.04647): y ``[B, …, d]``; each of W_d ``[m, d]`` and
    W_u ``[d, m]`` is a sum of n Kronecker products of A_j ``[n, n]`` and a matrix of rank r, S_j
    ``[rows/n, r]`` times T_jᵀ ``[r, columns/n]``. ``A`` ``[n, n, n]`` is shared by W_d and W_u of
    all sites; it is stored at the first site.

    Args:
        reduction: d / m, rounded so that m is whole; 16 if neither it nor ``width`` is given.
        width: m itself.
        n: the number of products; it divides d and m.
        rank: r.
        shared: whether all share A, as in the paper; if not, W_d and W_u of each site have separate
            ones.
        nonlinearity: σ: ``relu``, ``gelu``, ``gelu_tanh``, ``silu`` or ``tanh``.
        scale: s.

    Raises:
        ModgraftError: for options that make no bottleneck, an n that does not divide d and m, a
            rank above what S_j T_jᵀ can have, or an output that is not ``[B, …, d]``.
    """

    identity: ClassVar[bool] = True

    reduction: int | None = None
    width: int | None = None
    n: int = 4
    rank: int = 1
    shared: bool = True
    nonlinearity: Nonlinearity = "gelu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_options("Compacter", self.reduction, self.width, self.nonlinearity, self.scale)
        check_at_least_one("Compacter", n=self.n, rank=self.rank)

    def build(self, site: Site) -> None:
        n, r = self.n, self.rank
        d, m = bottleneck("Compacter", site, self.reduction, self.width)
        if d % n or m % n:
            fits = next(k for k in range(min(n, d), 0, -1) if d % k == 0)
            raise ModgraftError(
                f"Compacter(n={n}) at {site.label}: n divides the site's width {d} and the "
                f"bottleneck's {m}; use Compacter(width={max(fits, m // fits * fits)}, n={fits})"
            )
        if r > min(d, m) // n:
            most = min(d, m) // n
            raise ModgraftError(
                f"Compacter(rank={r}) at {site.label}: a product's second factor is {m // n} × "
                f"{d // n}, so the rank is at most {most}; use Compacter(rank={most})"
            )
        if self.shared:
            self.A = nn.Parameter(torch.empty(n, n, n))
        else:
            self.A_down = nn.Parameter(torch.empty(n, n, n))
            self.A_up = nn.Parameter(torch.empty(n, n, n))
        for A in self.parameters():
            nn.init.normal_(A, std=0.1)
        self.S_down = nn.Parameter(torch.empty(n, m // n, r))
        self.T_down = nn.Parameter(torch.empty(n, d // n, r))
        self.S_up = nn.Parameter(torch.empty(n, d // n, r))
        self.T_up = nn.Parameter(torch.zeros(n, m // n, r))
        for factors in (self.S_down, self.T_down, self.S_up):
            for matrix in factors:
                nn.init.xavier_uniform_(matrix)
        self.b_down = nn.Parameter(torch.zeros(m))
        self.b_up = nn.Parameter(torch.zeros(d))

    def share_with(self, first: Computation) -> None:
        """Read A from the first site."""
        if self.shared:
            redirect(self, ["A"], ModuleTensors(first))

    def forward(self, y: Tensor, x: Tensor | None, side: Side | None) -> Tensor:
        check_output("Compacter", y, self.b_up.numel())
        A_down, A_up = (self.A, self.A) if self.shared else (self.A_down, self.A_up)
        down = _kronecker_sum(A_down, self.S_down, self.T_down)  # [m, d]
        up = _kronecker_sum(A_up, self.S_up, self.T_up)  # [d, m]
        hidden = NONLINEARITIES[self.nonlinearity](F.linear(y, down, self.b_down))  # [B, …, m]
        return y + self.scale * F.linear(hidden, up, self.b_up)


def _kronecker_sum(A: Tensor, S: Tensor, T: Tensor) -> Tensor:
    """Return Σ_j A_j ⊗ S_j T_jᵀ ``[pq, ab]``: A ``[n, p, a]``, S ``[n, q, r]``, T ``[n, b, r]``."""
    B = S @ T.transpose(1, 2)  # [n, q, b]
    rows, columns = A.shape[1] * B.shape[1], A.shape[2] * B.shape[2]
    return torch.einsum("jpa,jqb->pqab", A, B).reshape(rows, columns)
