"""What a router chose, computed over stacked tensors: the cost of what was picked.

Every pair of a token (or an example) and a module that was chosen for it is a pick. Picks of one
module are laid side by side in blocks of equal length, so that one batched product serves all of
them, however unevenly the modules are used: U modules and P picks make at most U + P/c blocks of c
= max(1, ⌊P/U⌋). What comes out is added to its rows, weighted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from modgraft.computation.base import Computation
from modgraft.core.expression import Weight, weighted
from modgraft.core.layers import feature_axis, weight_matrix
from modgraft.core.tensors import replaced
from modgraft.engine.kernels.batched import Batched, batch_key

if TYPE_CHECKING:
    from modgraft.engine.plan import Entry
    from modgraft.engine.run import Applier

FEW = 4
"""Picks of a low-rank module, on average, from which on a copy of it for a block is worth its time.
"""


@dataclass
class ExpertBatch:
    """Modules of one kind and shape at one site, of which a router picks.

    Attributes:
        slots: of each place that they have there (two, say, for the query and value of a fused
            projection) the first module's entry, and all of them stacked.
        columns: which of the mixture's modules they are; None: all.
    """

    slots: list[tuple[Entry, Batched]]
    columns: list[int] | None

    @classmethod
    def of(cls, members: Sequence[Sequence[Entry]]) -> Self | None:
        """The bank of a mixture's members at a site; None where they are not of one shape.

        Args:
            members: of each module its entries here; those that have none are left out.
        """
        columns = [j for j, some in enumerate(members) if some]
        here = [members[j] for j in columns]
        if len(here) < 2 or len({len(some) for some in here}) > 1:
            return None
        slots = []
        for entries in zip(*here, strict=True):
            if len({_shape(entry) for entry in entries} | {None}) != 2:
                return None
            slots.append((entries[0], Batched([entry.module for entry in entries])))  # type: ignore[misc]
        return cls(slots, None if len(here) == len(members) else columns)

    def takes(self, at: Applier, chosen: Tensor, y: Tensor) -> bool:
        """Whether what it is asked has a form that it knows: features last, examples in rows."""
        if feature_axis(at.site.host) != -1 or y.dim() not in (2, 3):
            return False
        rows = chosen.shape[:-1]
        if y.shape[: len(rows)] != rows or (at.x is not None and at.x.shape[: len(rows)] != rows):
            return False
        return all(stacked.like.by_token for _, stacked in self.slots)

    def add(self, at: Applier, chosen: Tensor, y: Tensor, total: Tensor, weight: Weight) -> Tensor:
        """``total`` + weight · Σ_j α_j (h_j(y) − y), of the modules with α_j ≠ 0.

        Args:
            at: the site's.
            chosen: α, ``[B, N]`` or ``[B, n, N]``; what is 0 is not computed.
            y: ``[B, d]`` or ``[B, n, d]``, what the modules act on.
            total: as ``y``.
            weight: of the mixture.
        """
        if self.columns is not None:
            chosen = chosen[..., self.columns]
        layer = at.site.host
        bags = all(stacked.has_factors(layer) for _, stacked in self.slots)
        blocks = Blocks.of(chosen, FEW if bags else 1)
        if blocks is None:
            return total
        for entry, stacked in self.slots:
            part = entry.part
            own = y if part is None else y.chunk(part[1], dim=-1)[part[0]]
            effect = _effect(at, blocks, entry, stacked.picking(blocks.module), own)
            effect = weighted(weight, effect.view(own.shape))
            if part is None:
                total = total + effect
            else:
                total = replaced(total, part, -1, lambda of_total, e=effect: of_total + e)
        return total


def _shape(entry: Entry) -> object:
    """What entries that can be stacked have in common, None for one that cannot be."""
    own = entry.module
    if not isinstance(own, Computation) or entry.residual or entry.parameter is not None:
        return None
    kind = None if own.side_source is not None else batch_key(own)
    return None if kind is None else (kind, entry.part)


def _effect(at: Applier, blocks: Blocks, entry: Entry, stacked: Batched, own: Tensor) -> Tensor:
    """Σ α_j (h_j(y) − y) of each row."""
    x = None if at.x is None else blocks.lay(at.x)
    if not entry.changes_weight:
        before = blocks.lay(own)
        return blocks.sum(stacked(before, x, None) - before)
    assert x is not None  # noqa: S101  (weights belong to a layer that reads something)
    layer = at.site.host
    if blocks.offsets is not None and x.shape[1] == 1 and stacked.has_factors(layer):
        return stacked.sums(x[:, 0], blocks.weights[:, 0], blocks.offsets)
    bare = own if at.bare is None else at.bare
    if at.bare is not None and entry.part is not None:
        bare = bare.chunk(entry.part[1], dim=-1)[entry.part[0]]
    weight = weight_matrix(layer, entry.part)
    return blocks.sum(stacked.effect(x, layer, weight, blocks.lay(bare)))  # type: ignore[arg-type]


@dataclass
class Blocks:
    """Picks in blocks of one module each.

    Attributes:
        module: ``[G]``, of each block.
        rows: ``[G, c]``, the token or example of each pick; a last block may be filled with any.
        weights: ``[G, c]``, 0 where it is filled up.
        routed: the shape of what was routed: ``(B,)`` or ``(B, n)``, B·n rows.
        offsets: ``[B·n]``, where the picks of each row begin, if they lie in the order of rows.
    """

    module: Tensor
    rows: Tensor
    weights: Tensor
    routed: torch.Size
    offsets: Tensor | None = None

    @classmethod
    def of(cls, chosen: Tensor, few: int = 1) -> Self | None:
        """The picks of ``chosen`` ``[B, N]`` or ``[B, n, N]``; None where there are none.

        Args:
            chosen: the weights.
            few: how many picks a module may have on average that each stays by itself.
        """
        table = chosen.reshape(-1, chosen.shape[-1])
        row, module = table.detach().nonzero(as_tuple=True)  # [P]
        if not len(row):
            return None
        counts = module.bincount(minlength=table.shape[1])  # [N]
        long = len(row) // int((counts > 0).sum())
        if long <= few:  # each pick is a block, as it lies
            own = row.bincount(minlength=len(table))
            weights = table[row, module][:, None]
            return cls(module, row[:, None], weights, chosen.shape[:-1], own.cumsum(0) - own)
        order = module.argsort(stable=True)
        row = row[order]
        blocks = (counts + long - 1) // long
        start, first = counts.cumsum(0) - counts, blocks.cumsum(0) - blocks
        of = torch.arange(len(counts), device=row.device).repeat_interleave(blocks)  # [G]
        at = start[of] + long * (torch.arange(len(of), device=row.device) - first[of])
        place = at[:, None] + torch.arange(long, device=row.device)  # [G, c]
        real = place < (start + counts)[of][:, None]
        rows = row[place.clamp(max=len(row) - 1)]
        return cls(of, rows, table[rows, of[:, None]] * real, chosen.shape[:-1])

    def lay(self, value: Tensor) -> Tensor:
        """``value`` ``[B, …, d]`` as ``[G, c·…, d]``, ``…`` what is not routed by itself."""
        rows = value.reshape(self.routed.numel(), -1, value.shape[-1])
        laid = rows.index_select(0, self.rows.view(-1))
        return laid.view(self.rows.shape[0], -1, value.shape[-1])

    def sum(self, effect: Tensor) -> Tensor:
        """Σ of weight · effect over the picks of each row: ``[B·n, …·d]``."""
        own = effect.reshape(self.rows.numel(), -1) * self.weights.reshape(-1, 1)
        total = own.new_zeros(self.routed.numel(), own.shape[1])
        return total.index_add(0, self.rows.view(-1), own)
