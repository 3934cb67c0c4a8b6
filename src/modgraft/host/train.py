"""A host that trains: which of its parts learn, in which composition, and `fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import EllipsisType
from typing import Any

from torch import nn

from modgraft.core.context import Context
from modgraft.core.errors import ModgraftError, listed, warn
from modgraft.core.expression import Expression, module_of
from modgraft.engine.implant import Implants, check_learns, learner, learning_parts
from modgraft.host.compositions import Compositions
from modgraft.training.history import History
from modgraft.training.settings import Evaluate, Settings
from modgraft.training.stream import Batch, Weigh


class Trains(nn.Module):
    """What a host does to train."""

    model: nn.Module
    _context: Context
    _implants: Implants
    _bring: Callable[[Any], None]
    read: Callable[[Any], Expression | None]
    using: Callable[[Any], AbstractContextManager[Any]]
    _learned: frozenset[str]
    """The names of the host's weights and buffers that a fit has trained."""

    @property
    def acting(self) -> Expression | None:
        """The composition that acts here: of the ``using`` block around, or the one in force."""
        around = self._context.around()
        return self._context.composition if around is None else around.composition

    @contextmanager
    def training_only(self, train: str | Sequence[str] | None) -> Iterator[None]:
        """Let only some parameters require gradients in a ``with`` block.

        Args:
            train: names of modules, ``"host"`` for the model's weights, ``"host.head"`` for those
                of a part; None leaves everything as it is.
        """
        names = _names(train)
        self._bring(names)  # a module that waits comes now, and those that were saved with it
        before = [(p, p.requires_grad) for p in self.parameters()]
        if train is not None:
            chosen = [check_learns(n, self._learner(n)) for n in names]
            self.requires_grad_(False)
            for part in chosen:
                part.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, flag in before:
                parameter.requires_grad_(flag)

    def _note_learners(self) -> None:
        """Note what of the host belongs to modules, and is saved with them.

        That is what learns while they learn or act, and for those that learn now also what has
        learned before them, as a head that was trained alone first.
        """
        now = learning_parts(self.model)
        self._learned |= now
        acting = () if self.acting is None else {*map(module_of, self.acting.names())}
        for name, implant in self._implants.items():
            if any(p.requires_grad for p in implant.parameters()):
                implant.beside |= self._learned
            elif name in acting:
                implant.beside |= now
            elif shared := sorted(implant.beside & now):
                warn(
                    f"{listed(shared, 5)} trained with {name!r} and trains on without it: {name!r} "
                    f"acts with what comes of it, and is saved with that; save it first, "
                    f"host.save({name!r}, …), or give each a part of its own"
                )

    def _learner(self, name: str) -> nn.Module:
        part = learner(self.model, name, self._implants)
        return self._implants[name] if part is None else part

    def fit(
        self,
        loader: Iterable[Batch],
        *,
        train: str | Sequence[str] | None = None,
        modules: Compositions | EllipsisType = ...,
        steps: int | None = Settings.steps,
        epochs: float | None = Settings.epochs,
        until: int | None = Settings.until,
        lr: float = Settings.lr,
        schedule: str = Settings.schedule,
        warmup: int | float = Settings.warmup,
        weight_decay: float = Settings.weight_decay,
        optimizer: str = Settings.optimizer,
        betas: tuple[float, float] | None = Settings.betas,
        eps: float = Settings.eps,
        clip: float | None = Settings.clip,
        accumulate: int = Settings.accumulate,
        precision: str | None = Settings.precision,
        evaluate: Iterable[Batch] | Evaluate | None = Settings.evaluate,
        evaluate_every: int | None = Settings.evaluate_every,
        patience: int | None = Settings.patience,
        monitor: str = Settings.monitor,
        mode: str | None = Settings.mode,
        restore_best: bool | None = Settings.restore_best,
        folder: str | Path | None = Settings.folder,
        save_every: int | None = Settings.save_every,
        keep: int = Settings.keep,
        resume: bool = Settings.resume,
        seed: int = Settings.seed,
        ignore: Sequence[str] = Settings.ignore,
        fused: bool = Settings.fused,
        weigh: Weigh | None = Settings.weigh,
        world: int | None = Settings.world,
        progress: bool = Settings.progress,
        label: str = Settings.label,
        note: bool = Settings.note,
        **unknown: Any,
    ) -> History:
        """Train on the batches of ``loader``, by AdamW or another optimiser.

        The run is a function of the host, the loader, the settings and the seed. With ``folder=``
        the same call goes on with a run that was interrupted, on a CPU to the same bit. See
        :func:`modgraft.training.fit.fit` for that, and
        :class:`modgraft.training.settings.Settings` for each setting in full.

        Args:
            loader: yields dictionaries for :meth:`forward` (``labels`` and ``side`` among them).
            train: names of the modules that learn, ``"host"`` for the model itself, ``"host.head"``
                for a part of it; None: all parameters that require a gradient now. Parts of the
                host that learn with a module are saved with it.
            modules: the composition to train in; left out, the one in force. A batch that carries
                one under ``"modules"`` runs with that.
            steps: optimiser steps of the whole run; or
            epochs: passes over the loader.
            until: a step after which this call ends, though the run has more; with ``folder`` a
                later call goes on from there.
            lr: peak learning rate; ``schedule`` ("linear", "cosine", "constant") and ``warmup``
                (steps, or a fraction of the run) shape it.
            weight_decay: on matrices only.
            optimizer: "adamw", "lion", or "muon", which is Muon for matrices and AdamW for the
                rest; ``betas`` are the decay rates of its moments, None those it was published
                with. ``eps``, ``fused``: AdamW's.
            clip: largest global gradient norm, None for no clipping.
            accumulate: batches a step.
            precision: "no" or "bf16" autocast.
            evaluate: a loader, whose mean loss is measured, or a function host → {name: number};
                every ``evaluate_every`` steps, by default once an epoch.
            patience: stop after so many evaluations in which ``monitor`` did not get better
                (``mode`` "min" or "max"); ``restore_best`` ends with the best weights.
            folder: keeps the metrics, the note and the checkpoints of the run, one every
                ``save_every`` steps, of which the latest ``keep`` and the best stay.
            resume: go on with the run in the folder; False deletes it.
            seed: of the order of the data and of dropout.
            ignore: names in a batch that ``forward`` does not take.
            weigh: how many terms a batch's mean loss averages over.
            world: the number of processes that there must be.
            progress: show the progress, after ``label``.
            note: whether to describe the run in the folder's ``note.md``.
            **unknown: is refused, with the nearest setting.

        Returns:
            The record of the run: losses, evaluations, the best one, why it ended.

        Raises:
            ModgraftError: for what cannot train, a setting that means nothing, a loss that is not
                finite, a folder that another process trains in, or whose run is another one.
            KeyboardInterrupt: for Ctrl-C or SIGTERM, after a checkpoint was saved.
        """
        given = {**locals(), **unknown}
        settings = {n: given[n] for n in (*Settings.__dataclass_fields__, *unknown)}
        from modgraft.training.fit import fit
        from modgraft.training.processes import alone

        composed = nullcontext() if modules is ... else self.using(modules)
        with alone(self), self.training_only(train), composed:
            self._note_learners()
            return fit(self, loader, **settings)


def _names(train: Any) -> list[str]:
    """Return what ``train=`` names.

    Raises:
        ModgraftError: for anything but a name or several.
    """
    names = [train] if isinstance(train, str) else train or ()
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise ModgraftError(
            f"train={train!r}: name modules, as 'qa' or ['qa', 'host.classifier'], or 'host'"
        )
    return list(names)
