"""The invertible adapter: applied at the embeddings, undone before the output."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from modgraft.computation._checks import check_output, real_width
from modgraft.computation._redirect import ModuleTensors, redirect
from modgraft.computation.adapter import NONLINEARITIES, Nonlinearity, check_options
from modgraft.computation.base import Computation, FunctionComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.side import Side
from modgraft.core.sites import Site


@final
class InvertibleAdapter(FunctionComposition):
    """f'(x) = [o₁; o₂]: o₁ = y₁ + F(y₂), o₂ = y₂ + G(o₁) at an embedding, elsewhere its inverse.

    MAD-X (Pfeiffer et al. 2020, arXiv:2005.00052), a coupling as in NICE (Dinh et al. 2015,
    arXiv:1410.8516). y = f(x) ``[B, …, d]`` in two halves [y₁; y₂]; F(v) = U_F σ(D_F v) and
    G(v) = U_G σ(D_G v), each with biases, D ``[m, d/2]`` and U ``[d/2, m]``, U = 0 at the start.
    The site that turns the input into vectors (``"embedding"``, or an ``nn.Embedding``) applies the
    coupling; every other site applies its inverse, o₂ = y₂ − G(y₁) and o₁ = y₁ − F(o₂), with the
    same parameters, which are stored at the first site: ``at=["embedding", "encoder.output"]``, or
    ``"decoder.output"`` in a decoder. AdapterHub's block has these equations too, but draws U at
    random, so that it changes the output from the start.

    Args:
        reduction: r = d / 2m, rounded so that the bottleneck's m is whole; 2 in MAD-X.
        nonlinearity: σ: ``relu``, ``gelu``, ``gelu_tanh``, ``silu`` or ``tanh``.
        inverse: whether sites that embed no input apply the inverse; without it every site applies
            the coupling itself, as after the norm of the embeddings, and nothing is undone.

    Raises:
        ModgraftError: for an odd d, a reduction above d/2, sites of several widths, or an output
            that is not ``[B, …, d]``.
    """

    identity: ClassVar[bool] = True

    reduction: int = 2
    nonlinearity: Nonlinearity = "relu"
    inverse: bool = True

    def __post_init__(self) -> None:
        check_options("InvertibleAdapter", self.reduction, None, self.nonlinearity, 1.0)

    def build(self, site: Site) -> None:
        d = real_width("InvertibleAdapter", site)
        if site.channels_first or d % 2:
            found = "a map [B, C, …]" if site.channels_first else f"{d} wide, which is odd"
            raise ModgraftError(
                f"InvertibleAdapter at {site.label}: it couples two halves of [B, …, d], and this "
                f"output is {found}; choose a site of even width, at='embedding' for instance"
            )
        half, m = d // 2, d // 2 // self.reduction
        if m < 1:
            raise ModgraftError(
                f"InvertibleAdapter(reduction={self.reduction}) at {site.label}: half of its width "
                f"is {half}, so nothing would be left; use a reduction of at most {half}"
            )
        self._label, self.undoes, self._width = site.label, self.inverse and not site.embeds, d
        self.D_F, self.U_F = nn.Linear(half, m), nn.Linear(m, half)
        self.D_G, self.U_G = nn.Linear(half, m), nn.Linear(m, half)
        for zero in (self.D_F.bias, self.D_G.bias, *self.U_F.parameters(), *self.U_G.parameters()):
            nn.init.zeros_(zero)

    def share_with(self, first: Computation) -> None:
        """Read all parameters from the first site."""
        assert isinstance(first, InvertibleAdapter)  # noqa: S101
        if first._width != self._width:
            raise ModgraftError(
                f"InvertibleAdapter: {first._label} is {first._width} wide and {self._label} "
                f"{self._width}, and the one is to undo the other; implant it at sites of one width"
            )
        redirect(self, [key for key, _ in self.named_parameters()], ModuleTensors(first))

    def _mix(self, down: nn.Linear, up: nn.Linear, v: Tensor) -> Tensor:
        """Return U σ(D v): [B, …, d/2] → [B, …, d/2r] → [B, …, d/2]."""
        return up(NONLINEARITIES[self.nonlinearity](down(v)))

    def forward(self, y: Tensor, x: Tensor | None, side: Side | None) -> Tensor:
        check_output("InvertibleAdapter", y, self._width)
        one, two = y.chunk(2, dim=-1)  # [B, …, d] → two of [B, …, d/2]
        if self.undoes:
            two = two - self._mix(self.D_G, self.U_G, one)
            one = one - self._mix(self.D_F, self.U_F, two)
        else:
            one = one + self._mix(self.D_F, self.U_F, two)
            two = two + self._mix(self.D_G, self.U_G, one)
        return torch.cat([one, two], dim=-1)
