"""Routing over modules that were trained separately, without training them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar, final

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


class ZeroShotRouter(Router):
    """α = softmax of the k largest logits; each subclass says how ``logits`` are computed."""

    levels: ClassVar[tuple[Level, ...]] = ("token",)

    level: Level = field(default="token", kw_only=True)
    k: int = 2

    def __post_init__(self) -> None:
        self.check()
        check_k(self, self.k)

    @property
    def sparse(self) -> bool:
        return True

    def build(self, names: tuple[str, ...], width: int) -> None:
        check_k(self, self.k, names)
        self.names = names

    def choose(self, logits: Tensor, query: Tensor) -> Routing:
        return Routing(softmax_of_best(logits, self.k), logits.softmax(-1))


@final
class Arrow(ZeroShotRouter):
    """α = softmax of the k largest |⟨v_j, x⟩| / τ, v_j the first right singular vector of Δ_j.

    Arrow (Ostapenko et al. 2024, arXiv:2405.11157), token by token at each layer: of all unit
    vectors, v_j is the one that module j changes most, and its sign has no meaning. Nothing is
    trained or saved: v_j is computed from the module's current parameters. LoRA of any rank has a
    v_j, and so have ``Adapter`` and ``ParallelAdapter``, from their linear part W_u W_d. If a
    module acts on several parts of a fused layer, v_j is that of all parts together.

    A module is found by the length of x along v_j. That separates inputs that differ in direction,
    but not inputs that differ only along one direction. At a site the choice is among the modules
    that act there.

    Args:
        k: how many modules act.
        temperature: τ.

    Raises:
        ModgraftError: for options out of range, a module without such a linear map, or a module
            that has not been trained: a Δ of 0 has no direction.
    """

    only_levels: ClassVar[str] = "a prototype is a direction of what one layer reads"

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, temperature=self.temperature)

    def build(self, names: tuple[str, ...], width: int) -> None:
        super().build(names, width)
        self._computed_from: object = None  # the version of the parameters that gave the prototypes
        self._prototypes = torch.zeros(len(names), width)
        self._absent = torch.zeros(len(names), dtype=torch.bool)

    def objection(self, member: Member, layer: nn.Module) -> str | None:
        found = linear_part(member, layer)
        return found if isinstance(found, str) else None

    @torch.no_grad()
    def inspect(self, members: Sequence[Sequence[Member]], layer: nn.Module) -> None:
        parameters = [p for parts in members for m in parts for p in m.module.parameters()]
        of_layer = layer.parameters() if isinstance(layer, nn.Linear | Conv1D) else ()
        compiling = torch.compiler.is_dynamo_compiling()
        version = None if compiling else _version([*parameters, *of_layer])
        if not compiling and version == self._computed_from:
            return
        prototypes = parameters[0].new_zeros(self._prototypes.shape)
        for row, name, parts in zip(prototypes, self.names, members, strict=True):
            maps = [m for part in parts if not isinstance(m := linear_part(part, layer), str)]
            if not maps:
                continue
            direction, length = first_direction(maps)
            if not compiling and length == 0:
                raise ModgraftError(
                    f"Arrow: {name!r} changes nothing at a {type(layer).__name__} yet, so it has "
                    f"no direction there; host.fit(loader, train={name!r}) first, or load it"
                )
            row.copy_(direction)
        self._computed_from, self._prototypes = version, prototypes
        self._absent = torch.tensor([not parts for parts in members], device=prototypes.device)

    def logits(self, query: Tensor) -> Tensor:
        z = (query @ self._prototypes.to(query.dtype).T).abs() / self.temperature
        return z.masked_fill(self._absent, -torch.inf)


@final
class Phatgoose(ZeroShotRouter):
    """α = softmax of the k largest ⟨x̂, v̂_j⟩ / √d, û = (u − mean(u)) / std(u).

    PHATGOOSE (Muqeeth et al. 2024, arXiv:2402.05859), token by token at each layer. v_j ``[d]`` is
    the gate of module j, 0 at the start. After the module has been trained, all else is frozen and
    v_j is trained on the same examples, with the module weighted by σ(⟨v_j, x⟩):
    :func:`modgraft.train_gates` does so, for each module without the others. The gates are saved
    with the mixture. At a site the choice is among the modules that act there.

    Args:
        k: how many modules act.

    Raises:
        ModgraftError: for options out of range, or a gate that has not been trained.
    """

    only_levels: ClassVar[str] = "a gate is trained at one layer"

    def build(self, names: tuple[str, ...], width: int) -> None:
        super().build(names, width)
        self.gates = nn.ParameterList([torch.zeros(width) for _ in names])
        self.only_module: int | None = None  # acts alone, behind its gate, which is being trained
        self._checked: object = None  # the version of the gates that were found to be trained
        self._present = (True,) * len(names)

    def inspect(self, members: Sequence[Sequence[Member]], layer: nn.Module) -> None:
        self._present = tuple(bool(parts) for parts in members)
        if self.only_module is not None or torch.compiler.is_dynamo_compiling():
            return
        version = _version(list(self.gates))
        if version != self._checked:
            for name, gate, present in zip(self.names, self.gates, self._present, strict=True):
                if present and not gate.any():
                    raise ModgraftError(
                        f"Phatgoose: the gate of {name!r} has not been trained; "
                        f"mg.train_gates(host, mixture, {{{name!r}: loader, …}}) does so, with the "
                        f"examples the module was trained on"
                    )
            self._checked = version

    def forward(self, query: Tensor) -> Routing:
        if self.only_module is None:
            return super().forward(query)
        gate = (query @ self.gates[self.only_module]).sigmoid()[..., None]  # […, 1]
        index = torch.full(gate.shape, self.only_module, device=gate.device)
        weights = gate.new_zeros(*gate.shape[:-1], len(self.names)).scatter(-1, index, gate)
        return Routing(weights, weights.detach())

    def logits(self, query: Tensor) -> Tensor:
        gates = standardised(torch.stack([*self.gates]))  # [N, d]
        z = standardised(query) @ gates.T / query.shape[-1] ** 0.5
        absent = torch.tensor([not present for present in self._present], device=z.device)
        return z.masked_fill(absent, -torch.inf)


@final
class Similarity(ZeroShotRouter):
    """α = softmax of the k largest cos(q, e_j) / τ, e_j the mean query of module j's examples.

    Routing by task embeddings: a module is as near as the examples that it was trained on (as in
    Jang et al. 2023, arXiv:2302.03202, who retrieve experts by them).
    :func:`modgraft.embed_tasks` computes e_j ``[d]`` in one pass over them; they are saved with
    the mixture. One choice holds for the whole network (``level="example"``), so that the modules
    may act at different sites and be of any kind; with ``"token"`` each site has separate e_j.

    Args:
        k: how many modules act.
        temperature: τ.

    Raises:
        ModgraftError: for options out of range, or a module without an embedding.
    """

    levels: ClassVar[tuple[Level, ...]] = ("example", "token")
    only_levels: ClassVar[str] = "an embedding is of what is read"

    level: Level = field(default="example", kw_only=True)
    k: int = 1
    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, temperature=self.temperature)

    def build(self, names: tuple[str, ...], width: int) -> None:
        super().build(names, width)
        self.register_buffer("embeddings", torch.zeros(len(names), width))
        self.only_module: int | None = None  # acts alone, while its examples' queries are summed
        self.total, self.count = torch.zeros(width, dtype=torch.float64), 0
        self._checked: object = None  # the version of the embeddings that were found to be there

    def forward(self, query: Tensor) -> Routing:
        if self.only_module is None:
            return super().forward(query)
        queries = query.detach().reshape(-1, query.shape[-1])
        self.total += queries.sum(0, dtype=torch.float64).cpu()
        self.count += len(queries)
        index = torch.full(query.shape[:-1], self.only_module, device=query.device)
        weights = one_hot_like(query.new_zeros(*query.shape[:-1], len(self.names)), index)
        return Routing(weights, weights)

    def logits(self, query: Tensor) -> Tensor:
        embeddings = self.get_buffer("embeddings")  # [N, d]
        compiling = torch.compiler.is_dynamo_compiling()
        if not compiling and (version := _version([embeddings])) != self._checked:
            if len(missing := (~embeddings.any(1)).nonzero()):
                name = self.names[int(missing[0])]
                raise ModgraftError(
                    f"Similarity: {name!r} has no embedding yet; "
                    f"mg.embed_tasks(host, mixture, {{{name!r}: loader, …}}) takes it, from the "
                    f"examples the module was trained on"
                )
            self._checked = version
        directions = F.normalize(embeddings, dim=-1)
        return F.normalize(query, dim=-1) @ directions.T / self.temperature


def linear_part(member: Member, layer: nn.Module) -> Factors | str:
    """Return a module's effect as a linear map BA of what a router of tokens reads at ``layer``.

    The router reads x at a linear layer, elsewhere the output y. A change of weights has the map
    s·BA; a bottleneck adapter has s·W_u W_d, without its non-linearity and biases, or s·W_u W_d W
    if it reads the output of a linear layer W.

    Returns:
        B and A, or the reason why there is none.
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
            down = down @ weight_matrix(layer, member.part).to(down.dtype)  # [m, out] [out, in]
        return module.scale * module.up.weight, down
    return "has no linear map from what a layer reads, whose first direction could stand for it"


def first_direction(maps: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Return the first right singular vector v ``[in]`` of Δ and its singular value.

    Δ = [B_1 A_1; B_2 A_2; …] is never computed: with [A_1; …]ᵀ = Q R and B_i = Q_i R_i, v is Q w,
    with w the first right singular vector of diag(R_1, …) Rᵀ ``[Σr, Σr]``. Half precision is
    computed in float32.

    Args:
        maps: B_i ``[out_i, r_i]`` and A_i ``[r_i, in]``, one pair or more.
    """
    dtype = maps[0][1].dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    q, r = torch.linalg.qr(torch.cat([right.to(wide) for _, right in maps]).T)
    cores = [torch.linalg.qr(left.to(wide), mode="r").R for left, _ in maps]
    _, lengths, directions = torch.linalg.svd(torch.block_diag(*cores) @ r.T)
    return (q @ directions[0]).to(dtype), lengths[0]


def standardised(u: Tensor) -> Tensor:
    """Return (u − mean(u)) / std(u) along the last dimension; 0 if all its entries are equal."""
    centred = u - u.mean(-1, keepdim=True)
    spread = u.std(-1, keepdim=True, correction=0)
    return centred / spread.clamp_min(torch.finfo(u.dtype).tiny)


def _version(tensors: Sequence[Tensor]) -> object:
    """Return a key that changes when one of the tensors is written to, moved or replaced."""
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in tensors
    )
