"""ATTEMPT: attention over trained prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modgraft.computation._checks import check_at_least_one, distinct_names
from modgraft.computation.base import Computation, TokenComposition
from modgraft.computation.prompts import SoftPrompt
from modgraft.core.embeddings import token_width
from modgraft.core.errors import ModgraftError, SideError, an
from modgraft.core.side import EXAMPLE, Side
from modgraft.core.sites import Site


@final
class Attempt(TokenComposition):
    """[P(x), x], P(x) = P₀ + Σ_{j=0..N} a_j P_j, a = softmax_j(p̂_jᵀ G(x̂) / τ).

    ATTEMPT (Asai et al. 2022, arXiv:2205.11961) mixes, for each input, N prompts that were trained
    before and a new one, P₀, which is trained with the attention. x̂ and p̂_j ``[d]`` are the maxima
    over the tokens of the input's embeddings and of a prompt, and G(x̂) =
    LayerNorm(W_u SiLU(W_d x̂)) with W_d ``[rank, d]`` and W_u ``[d, rank]``. All prompts are
    ``[length, d]``. The N prompts stay frozen unless they are named in ``train=``, and act only
    through this module; P₀ and G are what is saved.

    The input is read as for a router of examples: an encoder's text, or in a decoder the text
    before the answer (where ``labels`` are −100). ``side={"example": mg.Side(v)}`` replaces it.

    Args:
        over: the names of the N prompts in the host, each of ``length`` tokens.
        length: the number of tokens of P₀.
        rank: the rank of G.
        temperature: τ; None: the paper's d·e.
        init: how P₀ starts, ``"random"`` or ``"vocabulary"``, as in a SoftPrompt.
        at_start: whether the prompt stands before a class token too, as in a SoftPrompt.

    Raises:
        ModgraftError: for no prompt or one named twice, prompts of another length, a module that
            is no prompt or reads a side input, or a number out of range.
    """

    over: Sequence[str] = ()
    length: int = 20
    rank: int = 100
    temperature: float | None = None
    init: str = "random"
    at_start: bool = False

    def __post_init__(self) -> None:
        example = " of prompts, as Attempt(over=['mnli', 'squad'])"
        self.over = distinct_names(self.over, f"Attempt(over={self.over!r})", example)
        check_at_least_one("Attempt", length=self.length, rank=self.rank)
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ModgraftError(
                f"Attempt(temperature={self.temperature}): it is above 0, or None for d·e"
            )
        self._new_prompt()  # refuses an unknown init

    def _new_prompt(self) -> SoftPrompt:
        return SoftPrompt(length=self.length, init=self.init, at_start=self.at_start)

    @property
    def side_source(self) -> str:
        return EXAMPLE

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.over)

    def check(self, members: Sequence[tuple[str, Computation]]) -> None:
        """Refuse modules that are no prompts, or prompts that depend on the input.

        Args:
            members: the name and the method of each module in ``over``.

        Raises:
            ModgraftError: with the remedy.
        """
        for name, method in members:
            what = (
                f"Attempt(over={list(self.over)}): {name!r} is {an(type(method).__name__)}, which "
            )
            if not isinstance(method, TokenComposition):
                raise ModgraftError(
                    f"{what}puts no tokens before the input; mg.Mixture([…]) is over such modules"
                )
            if method.side_source is not None:
                raise ModgraftError(f"{what}depends on the input itself; name prompts that do not")

    def join(self, members: Mapping[str, Computation]) -> None:
        """Attend to the built prompts ``members``, by name.

        Raises:
            ModgraftError: for a prompt of another length.
        """
        lengths = {name: self._tokens_of(place).shape[0] for name, place in members.items()}
        if other := [name for name, length in lengths.items() if length != self.length]:
            raise ModgraftError(
                f"Attempt(over={list(self.over)}, length={self.length}): {other[0]!r} has "
                f"{lengths[other[0]]} tokens; all prompts are of one length, as length="
                f"{lengths[other[0]]}"
            )
        self._members = tuple(members.values())  # in a tuple: torch would make children of them

    def build(self, site: Site) -> None:
        width = token_width(site.module)
        new = self._new_prompt()
        new.build(site)
        self.phi = nn.Parameter(new.phi.detach())
        self.down = nn.Linear(width, self.rank, bias=False)
        self.up = nn.Linear(self.rank, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self._members: tuple[Computation, ...] = ()

    def prompts(self) -> Tensor:
        """Return P ``[N + 1, length, d]``, P₀ first."""
        trained = [self._tokens_of(place).to(self.phi.dtype) for place in self._members]
        return torch.stack([self.phi, *trained])

    @staticmethod
    def _tokens_of(place: Computation) -> Tensor:
        assert isinstance(place, TokenComposition)  # noqa: S101
        return place.tokens(1, None)[0][0]

    def attention(self, side: Side) -> Tensor:
        """Return a ``[B, N + 1]`` for ``side``: the inputs' embeddings ``[B, n, d]`` and mask."""
        if side.tensor.shape[-1] != self.phi.shape[-1]:
            raise SideError(
                f"Attempt goes by vectors that are {self.phi.shape[-1]} wide, as the host's "
                f"embeddings, and side input {EXAMPLE!r} is {list(side.tensor.shape)}"
            )
        hidden = ~side.seen()[..., None]  # [B, n, 1]
        query = side.tensor.to(self.phi.dtype).masked_fill(hidden, -math.inf).amax(1)  # [B, d]
        query = query.masked_fill(hidden.all(1), 0.0)  # a text that is all padding
        query = self.norm(self.up(F.silu(self.down(query))))
        keys = self.prompts().amax(1)  # [N + 1, d]
        temperature = self.temperature or math.e * keys.shape[-1]
        return (query @ keys.T / temperature).softmax(-1)

    def tokens(self, batch: int, side: Side | None) -> tuple[Tensor, Tensor]:
        assert side is not None  # noqa: S101
        a = self.attention(side)
        mixed = self.phi + torch.einsum("bn,nkd->bkd", a, self.prompts())  # [B, length, d]
        return mixed, mixed.new_ones(mixed.shape[:2], dtype=torch.bool)
