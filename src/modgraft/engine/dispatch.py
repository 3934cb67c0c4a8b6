"""What a router chose, computed over stacked tensors, so that the cost is that of what was picked.

Every pair of a token (or an example) and a module that was chosen for it is a pick. Picks of one
module are laid side by side in blocks of equal length, so that one batched product serves all of
them, however unevenly the modules are used: U modules and P picks make at most U + P/c blocks of c
= max(1, ⌊P/U⌋). What comes out is added to its rows, weighted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from modgraft.computation.base import Computation
from modgraft.core.expression import Weight, weighted
from modgraft.core.layers import feature_axis, weight_matrix, with_own_gradient
from modgraft.core.parts import share
from modgraft.core.precision import as_the_layer
from modgraft.engine.kernels.batched import Batched, batch_key
from modgraft.engine.plan import Entry

FEW = 4
"""With more picks of each low-rank module than this, on average, a copy of it for every block pays.
"""


@dataclass
class ExpertBatch:
    """The modules of a mixture at one site, all of one kind and shape, over stacked tensors.

    Attributes:
        slots: for each place that a module has there (two, say, for the query and value of a fused
            projection): the first module's entry, and all the modules batched.
        columns: which of the mixture's modules they are; None: all.
    """

    slots: list[tuple[Entry, Batched]]
    columns: list[int] | None

    @classmethod
    def of(cls, members: Sequence[Sequence[Entry]]) -> Self | None:
        """Batch a mixture's modules at a site; None where they are not of one kind and shape.

        Args:
            members: the entries of each module here; those without any are left out.
        """
        columns = [j for j, some in enumerate(members) if some]
        here = [members[j] for j in columns]
        if len(here) < 2 or len({len(some) for some in here}) > 1:
            return None
        slots = []
        for entries in zip(*here, strict=True):
            if len({_key(entry) for entry in entries} | {None}) != 2:
                return None
            slots.append((entries[0], Batched([entry.module for entry in entries])))  # type: ignore[misc]
        return cls(slots, None if len(here) == len(members) else columns)

    def takes(self, layer: nn.Module, chosen: Tensor, x: Tensor | None, y: Tensor) -> bool:
        """Return whether x and y have a form that it can compute: features last, examples in
        rows."""
        if feature_axis(layer) != -1 or y.dim() not in (2, 3):
            return False
        if isinstance(layer, nn.Embedding):  # x are ids, which have no features
            return False
        rows = chosen.shape[:-1]
        if y.shape[: len(rows)] != rows or (x is not None and x.shape[: len(rows)] != rows):
            return False
        return all(batched.like.by_token for _, batched in self.slots)

    def add(
        self,
        layer: nn.Module,
        chosen: Tensor,
        x: Tensor | None,
        bare: Tensor | None,
        y: Tensor,
        total: Tensor,
        weight: Weight,
    ) -> Tensor:
        """Return ``total`` + weight · Σ_j α_j (h_j(y) − y), over the modules with α_j ≠ 0.

        Args:
            layer: the site's.
            chosen: α, ``[B, N]`` or ``[B, n, N]``; what is 0 is not computed.
            x: ``[B, in]`` or ``[B, n, in]``, the layer's input.
            bare: the layer's own output, where it is known and y may be another.
            y: ``[B, d]`` or ``[B, n, d]``, what the modules act on.
            total: as ``y``.
            weight: of the mixture.
        """
        if self.columns is not None:
            chosen = chosen[..., self.columns]
        low_rank = all(batched.has_factors(layer) for _, batched in self.slots)
        blocks = Blocks.of(chosen, FEW if low_rank else 1)
        if blocks is None:
            return total
        for entry, batched in self.slots:
            part, picked = entry.part, batched.picking(blocks.module)
            own_y = share(y, part, -1)
            own_bare = own_y if bare is None else share(bare, part, -1)
            with as_the_layer(y):
                effect = _effect(layer, blocks, entry, picked, x, own_bare, own_y)
            effect = weighted(weight, effect.view(own_y.shape).to(total.dtype))
            if part is None:
                total = total + effect
            else:
                total = part.replaced(total, -1, lambda of_total, e=effect: of_total + e)
        return total


def _key(entry: Entry) -> object:
    """Return a key that is equal for entries that can be batched, None for one that cannot be."""
    module = entry.module
    if not isinstance(module, Computation) or entry.residual or entry.inside:
        return None
    key = None if module.side_source is not None else batch_key(module)
    return None if key is None else (key, entry.part)


def _effect(
    layer: nn.Module,
    blocks: Blocks,
    entry: Entry,
    batched: Batched,
    x: Tensor | None,
    bare: Tensor,
    y: Tensor,
) -> Tensor:
    """Return Σ α_j (h_j(y) − y) of each row."""
    laid = None if x is None else blocks.lay(x)
    if not entry.changes_weight:
        before = blocks.lay(y)
        return blocks.sum(batched(before, laid, None) - before)
    assert laid is not None  # noqa: S101  (weights belong to a layer that reads something)
    if blocks.offsets is not None and laid.shape[1] == 1 and batched.has_factors(layer):
        return batched.sums(laid[:, 0], blocks.weights[:, 0], blocks.offsets)
    weight = weight_matrix(layer, entry.part)
    effect = batched.effect(laid, layer, weight, blocks.lay(bare))
    return blocks.sum(with_own_gradient(layer, laid, effect))


@dataclass
class Blocks:
    """Picks in blocks of one module each.

    Attributes:
        module: ``[G]``, the module of each block.
        rows: ``[G, c]``, the token or example of each pick; a module's last block is filled up with
            its last pick, so that no module sees a row that did not choose it.
        weights: ``[G, c]``, 0 where a block is filled up.
        routed: the shape of what was routed, ``(B,)`` or ``(B, n)``: B·n rows.
        offsets: ``[B·n]``, where the picks of each row begin, if they lie in the order of rows.
    """

    module: Tensor
    rows: Tensor
    weights: Tensor
    routed: torch.Size
    offsets: Tensor | None = None

    @classmethod
    def of(cls, chosen: Tensor, few: int = 1) -> Self | None:
        """Lay out the picks of ``chosen`` ``[B, N]`` or ``[B, n, N]``; None where there are none.

        Args:
            chosen: the weights.
            few: up to so many picks of each module, on average, every pick is a block by itself.
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
        end = (start + counts)[of][:, None]
        rows = row[place.minimum(end - 1)]
        return cls(of, rows, table[rows, of[:, None]] * (place < end), chosen.shape[:-1])

    def lay(self, value: Tensor) -> Tensor:
        """Return ``value`` ``[B, …, d]`` as ``[G, c·…, d]``; ``…`` is not routed by itself."""
        rows = value.reshape(self.routed.numel(), -1, value.shape[-1])
        laid = rows.index_select(0, self.rows.view(-1))
        return laid.view(self.rows.shape[0], -1, value.shape[-1])

    def sum(self, effect: Tensor) -> Tensor:
        """Return Σ weight · effect over the picks of each row, ``[B·n, …·d]``."""
        own = effect.reshape(self.rows.numel(), -1) * self.weights.reshape(-1, 1)
        total = own.new_zeros(self.routed.numel(), own.shape[1])
        return total.index_add(0, self.rows.view(-1), own)
