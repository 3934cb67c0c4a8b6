"""Routing over modules that were trained apart: nothing is learned together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from modgraft.computation.adapter import Adapter, ParallelAdapter
from modgraft.computation.base import ParameterComposition
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import weight_matrix
from modgraft.routing.base import (
    Level,
    Member,
    Router,
    Routing,
    check_k,
    check_positive,
    one_hot_like,
    softmax_of_best,
)

Factors = tuple[Tensor, Tensor]  # B [out, r] and A [r, in] of a linear map BA


def first_direction(maps: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """v ``[in]`` with ‖v‖ = 1 that Δ = [B_1 A_1; B_2 A_2; …] lengthens most, and how much.

    The first right singular vector of Δ and its singular value, without a matrix as large as Δ:
    with [A_1; …]ᵀ = Q R and B_i = Q_i R_i it is Q w, w that of diag(R_1, …) Rᵀ ``[Σr, Σr]``. Half
    precision is computed in float32.

    Args:
        maps: B_i ``[out_i, r_i]`` and A_i ``[r_i, in]``, one or more.
    """
    dtype = maps[0][1].dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    q, r = torch.linalg.qr(torch.cat([right.to(wide) for _, right in maps]).T)
    cores = [torch.linalg.qr(left.to(wide), mode="r").R for left, _ in maps]
    _, lengths, directions = torch.linalg.svd(torch.block_diag(*cores) @ r.T)
    return (q @ directions[0]).to(dtype), lengths[0]


def linear_part(member: Member, layer: nn.Module) -> Factors | str:
    """A module's effect at a site as a linear map BA of what the token's router reads there.

    That is x at a linear layer, elsewhere the output y. A change of weights is s·BA itself; a
    bottleneck adapter is s·W_u W_d, without its non-linearity and its biases, and W_u W_d W where
    it reads the output of a linear layer W.

    Returns:
        B and A, or why there is none.
    """
    module, linear = member.module, isinstance(layer, nn.Linear | Conv1D)
    if isinstance(module, ParameterComposition):
        factors = module.factors()
        if factors is None:
            return "changes weights by a Δ that is not kept as a product of low rank"
        if not linear:
            return f"changes the weight of a {type(layer).__name__}, which reads no vectors"
        return factors[2] * factors[0], factors[1]
    if isinstance(module, Adapter | ParallelAdapter):
        down = module.down.weight
        if isinstance(module, Adapter) and linear:
            down = down @ weight_matrix(layer, member.part)  # [m, out] [out, in]
        return module.scale * module.up.weight, down
    return "has no linear map from what a layer reads, whose first direction could stand for it"


@final
class Arrow(Router):
    """α = softmax of the k largest |⟨v_j, x⟩| / τ, v_j the first right singular vector of Δ_j.

    Arrow (Ostapenko et al. 2024, arXiv:2405.11157), token by token at each layer: among unit
    vectors, v_j is the one that module j changes most, and its sign says nothing. Nothing is
    trained and nothing saved: v_j follows from the module as it is now. LoRA of any rank has one,
    and so have ``Adapter`` and ``ParallelAdapter``, of their linear part W_u W_d. Where a module
    acts on several parts of a fused layer, v_j is that of all of them together.

    It finds a module by how long x is along v_j. That tells inputs apart whose directions differ,
    and not those that differ along one direction only. At a site the choice is among the modules
    that are there.

    Args:
        k: how many modules act.
        temperature: τ.

    Raises:
        ModgraftError: for options that mean nothing, a module without such a map, or one that has
            not been trained: a Δ of 0 has no direction.
    """

    level: Level = field(default="token", kw_only=True)
    k: int = 2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.check()
        check_k(self, self.k)
        check_positive(self, temperature=self.temperature)
        _only(self, ("token",), "a prototype is a direction of what one layer reads")

    @property
    def sparse(self) -> bool:
        return True

    def build(self, names: tuple[str, ...], width: int) -> None:
        check_k(self, self.k, names)
        self.names = names
        self._stamp: object = None
        self._prototypes = torch.zeros(len(names), width)
        self._absent = torch.zeros(len(names), dtype=torch.bool)

    def admits(self, member: Member, layer: nn.Module) -> str | None:
        found = linear_part(member, layer)
        return found if isinstance(found, str) else None

    @torch.no_grad()
    def prepare(self, members: Sequence[Sequence[Member]], layer: nn.Module) -> None:
        seen = [p for some in members for m in some for p in m.module.parameters()]
        seen += layer.parameters() if isinstance(layer, nn.Linear | Conv1D) else []
        stamp = None if torch.compiler.is_compiling() else _stamp(seen)
        if stamp is not None and stamp == self._stamp:
            return
        like = next(p for some in members for m in some for p in m.module.parameters())
        rows = like.new_zeros(self._prototypes.shape)
        for row, name, some in zip(rows, self.names, members, strict=True):
            maps = [m for one in some if not isinstance(m := linear_part(one, layer), str)]
            if not maps:
                continue
            direction, length = first_direction(maps)
            if stamp is not None and length == 0:
                raise ModgraftError(
                    f"Arrow: {name!r} changes nothing at a {type(layer).__name__} yet, so it has "
                    f"no direction there; host.fit(loader, train={name!r}) first, or load it"
                )
            row.copy_(direction)
        self._stamp, self._prototypes = stamp, rows
        self._absent = torch.tensor([not some for some in members], device=rows.device)

    def logits(self, query: Tensor) -> Tensor:
        z = (query @ self._prototypes.to(query.dtype).T).abs() / self.temperature
        return z.masked_fill(self._absent, -torch.inf)

    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        return Routing(softmax_of_best(logits, self.k), logits.softmax(-1))


@final
class Phatgoose(Router):
    """α = softmax of the k largest ⟨x̂, v̂_j⟩ / √d, û = (u − mean(u)) / std(u).

    PHATGOOSE (Muqeeth et al. 2024, arXiv:2402.05859), token by token at each layer. v_j ``[d]`` is
    the gate of module j: once the module is trained, everything is frozen and v_j alone learns on
    the same examples, with the module weighted by σ(⟨v_j, x⟩); it starts at 0.
    :func:`modgraft.train_gates` does so, for one module without a look at the others. The gates
    are saved with the mixture.

    At a site the choice is among the modules that are there.

    Args:
        k: how many modules act.

    Raises:
        ModgraftError: for options that mean nothing, or a gate that has not been trained.
    """

    level: Level = field(default="token", kw_only=True)
    k: int = 2

    def __post_init__(self) -> None:
        self.check()
        check_k(self, self.k)
        _only(self, ("token",), "a gate is trained at one layer")

    @property
    def sparse(self) -> bool:
        return True

    def build(self, names: tuple[str, ...], width: int) -> None:
        check_k(self, self.k, names)
        self.names = names
        self.gates = nn.ParameterList([torch.zeros(width) for _ in names])
        self.learning: int | None = None  # whose gate: that module acts alone, behind it
        self._checked: object = None
        self._there = (True,) * len(names)

    def prepare(self, members: Sequence[Sequence[Member]], layer: nn.Module) -> None:
        self._there = tuple(bool(some) for some in members)
        if self.learning is not None or torch.compiler.is_compiling():
            return
        stamp = _stamp(list(self.gates))
        if stamp != self._checked:
            blank = [
                name
                for name, gate, there in zip(self.names, self.gates, self._there, strict=True)
                if there and not bool(gate.any())
            ]
            if blank:
                raise ModgraftError(
                    f"Phatgoose: the gate of {blank[0]!r} has not been trained; "
                    f"mg.train_gates(host, mixture, {{{blank[0]!r}: loader, …}}) does so, with the "
                    f"examples the module was trained on"
                )
            self._checked = stamp

    def forward(self, query: Tensor) -> Routing:
        if self.learning is None:
            return super().forward(query)
        gate = (query @ self.gates[self.learning]).sigmoid()[..., None]  # […, 1]
        here = torch.full(gate.shape, self.learning, device=gate.device)
        weights = gate.new_zeros(*gate.shape[:-1], len(self.names)).scatter(-1, here, gate)
        return Routing(weights, weights.detach())

    def logits(self, query: Tensor) -> Tensor:
        gates = standardised(torch.stack([*self.gates]))  # [N, d]
        z = standardised(query) @ gates.T / query.shape[-1] ** 0.5
        absent = torch.tensor([not there for there in self._there], device=z.device)
        return z.masked_fill(absent, -torch.inf)

    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        return Routing(softmax_of_best(logits, self.k), logits.softmax(-1))


@final
class Similarity(Router):
    """α = softmax of the k largest cos(q, e_j) / τ, e_j the mean query of module j's examples.

    Routing by task embeddings: a module is as near as the examples that it was trained on (as in
    Jang et al. 2023, arXiv:2302.03202, who retrieve experts by them).
    :func:`modgraft.embed_tasks` takes e_j ``[d]`` in one pass over them; they are saved with the
    mixture. One choice holds for the whole network (``level="example"``), so that modules may
    stand at different sites and be of any kind; with ``"token"`` each site has its own e_j.

    Args:
        k: how many modules act.
        temperature: τ.

    Raises:
        ModgraftError: for options that mean nothing, or a module without an embedding.
    """

    k: int = 1
    temperature: float = 0.1

    def __post_init__(self) -> None:
        self.check()
        check_k(self, self.k)
        check_positive(self, temperature=self.temperature)
        _only(self, ("example", "token"), "an embedding is of what is read")

    @property
    def sparse(self) -> bool:
        return True

    def build(self, names: tuple[str, ...], width: int) -> None:
        check_k(self, self.k, names)
        self.names = names
        self.register_buffer("embeddings", torch.zeros(len(names), width))
        self.learning: int | None = None  # whose examples are read: that module acts alone
        self.total, self.count = torch.zeros(width, dtype=torch.float64), 0
        self._checked: object = None

    def forward(self, query: Tensor) -> Routing:
        if self.learning is None:
            return super().forward(query)
        read = query.detach().reshape(-1, query.shape[-1])
        self.total += read.sum(0, dtype=torch.float64).cpu()
        self.count += len(read)
        here = torch.full(query.shape[:-1], self.learning, device=query.device)
        weights = one_hot_like(query.new_zeros(*query.shape[:-1], len(self.names)), here)
        return Routing(weights, weights)

    def logits(self, query: Tensor) -> Tensor:
        embeddings = self.get_buffer("embeddings")  # [N, d]
        if not torch.compiler.is_compiling() and (stamp := _stamp([embeddings])) != self._checked:
            if len(blank := (~embeddings.any(1)).nonzero()):
                name = self.names[int(blank[0])]
                raise ModgraftError(
                    f"Similarity: {name!r} has no embedding yet; "
                    f"mg.embed_tasks(host, mixture, {{{name!r}: loader, …}}) takes it, from the "
                    f"examples the module was trained on"
                )
            self._checked = stamp
        directions = F.normalize(embeddings, dim=-1)
        return F.normalize(query, dim=-1) @ directions.T / self.temperature

    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        return Routing(softmax_of_best(logits, self.k), logits.softmax(-1))


def standardised(u: Tensor) -> Tensor:
    """(u − mean(u)) / std(u) along the last dimension; 0 where all is equal."""
    centred = u - u.mean(-1, keepdim=True)
    spread = u.std(-1, keepdim=True, correction=0)
    return centred / spread.clamp_min(torch.finfo(u.dtype).tiny)


def _stamp(tensors: Sequence[Tensor]) -> object:
    """What is another once a tensor has been written to, moved or replaced."""
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in tensors
    )


def _only(router: Router, levels: tuple[Level, ...], why: str) -> None:
    if router.level not in levels:
        raise ModgraftError(
            f"{type(router).__name__}(level={router.level!r}): {why}; "
            f"level={' or '.join(map(repr, levels))}"
        )
