"""One call of a host: the modules that act in it, its side inputs, and what its sites share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modgraft.core.errors import SideError
from modgraft.core.expression import Expression
from modgraft.core.side import Side, missing_side

Layout = Mapping[str, int | None]
"""By a layer's path, the axis of its output on which the examples lie; None where none is."""

UNSEEN = -1
"""The axis of a layer that did not run when this was asked, as an expert without tokens."""

Entering = Callable[[], Callable[[], AbstractContextManager[None]]]


@dataclass(frozen=True)
class Call:
    """One call of a host, and what its sites work out once for all of them.

    Attributes:
        composition: which modules act.
        side: the side inputs by name.
        generating: whether this is a ``generate``.
        in_forward: whether the host runs, and not only a ``using`` block.
        spliced: what the input modules have put into this call already, and where.
        choices: the routers' choices that hold at all sites, by (router, task).
        routings: each mixture that is learning with its choice, for the losses that they add.
        outputs: outputs computed ahead, of layers that share an input with one that has run.
        kept: what :func:`modgraft.core.context.kept_in_call` keeps until the call ends; None for
            one without an end of its own, such as a ``using`` block.
        reads: what checks, when the host has run, that a layer whose weight was read was called.
        layout: where the examples lie; None: not asked.
        alike: whether this is a run of a part of the host in which all examples are treated as one
            of them; see :mod:`modgraft.engine.divided`.
        entering: where a part of the call begins that is run once more in backward, returns what
            lets it find there what it finds now; None: nothing is to be found again.
    """

    composition: Expression | None
    side: Mapping[str, Side] = field(default_factory=dict)
    generating: bool = False
    in_forward: bool = False
    spliced: Any = None
    choices: dict[Hashable, Any] = field(default_factory=dict, compare=False)
    routings: list[tuple[Any, Any]] = field(default_factory=list, compare=False)
    outputs: dict[Hashable, Any] = field(default_factory=dict, compare=False)
    kept: dict[Hashable, Any] | None = field(default=None, compare=False)
    reads: list[Callable[[], None]] = field(default_factory=list, compare=False)
    layout: Layout | None = None
    alike: bool = False
    entering: Entering | None = field(default=None, compare=False)

    def snapshot(self) -> Callable[[], None]:
        """Return what takes back all that a run of the host leaves here, and the random numbers
        that it draws, so that the host can be run again."""
        choices, routings, random = dict(self.choices), len(self.routings), torch.get_rng_state()
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

        def take_back() -> None:
            self.choices.clear()
            self.choices.update(choices)
            del self.routings[routings:]
            for made in (self.outputs, self.kept or {}, self.reads):
                made.clear()
            torch.set_rng_state(random)
            for device, state in enumerate(devices):
                torch.cuda.set_rng_state(state, device)

        return take_back

    def forget(self) -> None:
        """Let go of what sites have worked out, before another call begins in its place."""
        self.choices.clear()
        self.routings.clear()
        self.outputs.clear()

    def resolve(
        self,
        source: str,
        name: str,
        batch: int,
        rows: Tensor | None = None,
        several: bool = False,
    ) -> Side:
        """Return the side input ``source`` that the module ``name`` reads at a site, masked.

        Args:
            source: the side input's name.
            name: the module's name, for the error.
            batch: how many examples the site works on; in ``generate`` an example's beams share
                its side input.
            rows: int64, the examples to take of the batch; None: all.
            several: whether an example is known to have several rows there, as windows.

        Raises:
            SideError: if the call has no such side input, or it has another number of examples.
        """
        side = self.side.get(source)
        if side is None:
            raise missing_side(name, source)
        have = side.tensor.shape[0]
        if have != batch:
            if not (self.generating or several) or batch % have:
                raise SideError(
                    f"side input {source!r} has {have} examples where {name!r} meets a first axis "
                    f"of {batch}; pass one row for each example of the batch. If you did, this "
                    f"axis is not the batch (flattened tokens, [n, B, d]): implant {name!r} at a "
                    f"layer that has the batch first"
                )
            side = side.follow(batch)
        return (side if rows is None else side.picked(rows)).shown()
