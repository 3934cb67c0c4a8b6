"""The rungs: ways to change a host, from none at all to all of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modgraft.computation.adapter import Adapter
from modgraft.computation.base import Computation
from modgraft.computation.lora import LoRA
from modgraft.computation.prefix import Prefix
from modgraft.computation.prompts import SoftPrompt
from modgraft.computation.rescale import Rescale
from modgraft.computation.sparse import SparseDelta
from modgraft.core.errors import ModgraftError, UnknownNameError
from modgraft.core.sites import At
from modgraft.host.host import Host
from modgraft.training.procedures.lottery import sparse_finetuning
from modgraft.training.randomness import own_randomness
from modgraft.training.stream import Batch

QV, EVERY = ("query", "value"), ("query", "key", "value", "output", "up", "down")


@dataclass(frozen=True)
class Rung:
    """One level of change.

    Attributes:
        name: a Python identifier, under which its module is implanted.
        title: what people read.
        rates: the learning rates to try: what is best for a prompt is not for all weights.
        modules: what is implanted, each with its sites. One that is a :class:`SparseDelta` is
            trained in two phases, by :func:`modgraft.sparse_finetuning`.
        host: whether all of the host's own weights are trained.
    """

    name: str
    title: str
    rates: tuple[float, ...]
    modules: tuple[tuple[Computation, At | None], ...] = ()
    host: bool = False

    @property
    def names(self) -> list[str]:
        """The names of its modules in the host."""
        return [self.name if not i else f"{self.name}_{i + 1}" for i in range(len(self.modules))]

    @property
    def sparse(self) -> bool:
        """Whether it is trained in two phases."""
        return len(self.modules) == 1 and isinstance(self.modules[0][0], SparseDelta)

    def implant(self, host: Host, seed: int) -> None:
        """Put its modules into a host; their first weights are those of the seed.

        Raises:
            ModgraftError: it is not defined for this host.
        """
        with own_randomness():
            torch.manual_seed(seed)
            for name, (module, at) in zip(self.names, self.modules, strict=True):
                host.implant(name, module, at)

    def learns(self, beside: Sequence[str]) -> list[str]:
        """Return what is trained, as ``train=`` of ``host.fit`` names it."""
        return [*(["host"] if self.host else []), *self.names, *beside]

    def train(
        self, host: Host, loader: Iterable[Batch], beside: Sequence[str], *, steps: int, until: int,
        first: int, folder: Any = None, **settings: Any,
    ) -> float:  # fmt: skip
        """Train it in a host from where the folder has it, and return the seconds in all.

        Args:
            host: where its modules are implanted.
            loader: its batches.
            beside: what trains with every rung.
            steps: of the whole training.
            until: the step to end with for now.
            first: of a sparse rung, the steps of the phase that chooses the weights.
            folder: of the training.
            **settings: of ``fit``.

        Raises:
            ModgraftError: it cannot be trained so.
        """
        learns = self.learns(beside)
        if not learns:
            return 0.0
        given = {"folder": folder, "progress": False, "note": False, **settings}
        if not self.sparse:
            given |= {"steps": steps, "until": until}
            return host.fit(loader, train=learns, **given).seconds
        if until <= first:
            raise ModgraftError(
                f"{self.title} is trained in two phases, for which {until} step is too few"
            )
        phases = sparse_finetuning(
            host, self.name, loader, also=beside, first={"steps": first, "until": None},
            **given, steps=steps - first, until=until - first,
        )  # fmt: skip
        return sum(phase.seconds for phase in phases)


SMALL, LARGE = (3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2)

RUNGS = (
    Rung("nothing", "Nothing", SMALL),
    Rung("prompt", "Soft prompt, 10 tokens", SMALL, ((SoftPrompt(length=10), None),)),
    Rung("prefix", "Prefix, 10 tokens", SMALL, ((Prefix(length=10), None),)),
    Rung(
        "rescale", "Rescale (IA³)", SMALL,
        ((Rescale(), ("key", "value")), (Rescale(where="input"), "down")),
    ),
    *(Rung(f"lora_{r}", f"LoRA, rank {r}", LARGE, ((LoRA(rank=r), QV),)) for r in (1, 2, 4, 8, 16)),
    Rung("adapter", "Adapters", SMALL, ((Adapter(reduction=16), ("output", "down")),)),
    Rung(
        "sparse", "Sparse, 5 % of weights", (3e-4, 1e-3, 3e-3),
        ((SparseDelta(density=0.05), EVERY),),
    ),
    Rung("full", "Full fine-tuning", (1e-4, 3e-4, 1e-3), host=True),
)  # fmt: skip
"""The rungs by the level of change. What a task adds to the host (a head) trains with each."""


def rungs_of(asked: Iterable[str | Rung] | None) -> tuple[Rung, ...]:
    """Return rungs that are given, or named among :data:`RUNGS`; None: all of these.

    Raises:
        UnknownNameError: no rung has that name.
        ModgraftError: there is none, or two have one name.
    """
    known = {rung.name: rung for rung in RUNGS}
    found = list(RUNGS) if asked is None else []
    for one in () if asked is None else asked:
        if not isinstance(one, Rung) and one not in known:
            raise UnknownNameError.among("rung", one, known)
        found.append(one if isinstance(one, Rung) else known[one])
    names = [rung.name for rung in found]
    if not names or len({*names}) < len(names) or not all(rung.rates for rung in found):
        raise ModgraftError(
            f"rungs={names}: give rungs with a name of their own each, and learning rates; those "
            f"that have a name here are {', '.join(known)}"
        )
    return tuple(found)
