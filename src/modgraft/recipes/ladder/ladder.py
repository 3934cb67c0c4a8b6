"""`ladder`: how much of a host has to change for a task, within a budget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from modgraft.core.errors import ModgraftError
from modgraft.core.files import folder_path, write_json
from modgraft.host.host import Host
from modgraft.recipes.folder import empty, run_folder, write_card
from modgraft.recipes.ladder.climb import BudgetError, Climb, Evaluate
from modgraft.recipes.ladder.halving import schedule
from modgraft.recipes.ladder.lines import COSTS
from modgraft.recipes.ladder.note import recorded_ladder
from modgraft.recipes.ladder.result import Ladder, read_ladder, write_ladder
from modgraft.recipes.ladder.rungs import Rung, rungs_of
from modgraft.recipes.sweep.result import told
from modgraft.training.checkpoint import fingerprint
from modgraft.training.settings import Settings
from modgraft.training.stream import Batch, Stream, digest

MANAGED = ("lr", "steps", "epochs", "until", "folder", "evaluate", "seed", "resume", "patience")
"""Settings of ``fit`` that the ladder decides, or has arguments of its own for."""


def ladder(
    host: Host,
    loader: Iterable[Batch],
    *,
    evaluate: Evaluate,
    steps: int,
    test: Evaluate | None = None,
    beside: str | Sequence[str] = (),
    parameters: int | None = None,
    memory: int | None = None,
    rungs: Iterable[str | Rung] | None = None,
    by: Literal["parameters", "memory", "bytes"] = "parameters",
    tolerance: float | None = None,
    eta: int = 3,
    keep: int = 5,
    seed: int = 0,
    folder: str | Path | None = None,
    fresh: bool = False,
    progress: bool = True,
    label: str = "ladder",
    note: bool = True,
    **settings: Any,
) -> Ladder:
    """Train each level of change within a budget, and say which to take.

    The rungs are no change, a soft prompt, a prefix, a rescaling, LoRA by rank, adapters, a sparse
    change, and full fine-tuning (:data:`modgraft.recipes.ladder.rungs.RUNGS`). A rung is a
    candidate with each of its learning rates. By successive halving
    (:func:`modgraft.recipes.ladder.halving.schedule`) all of them take a few steps, and those that
    are ahead go on from there to more: first those that no other one surpasses in quality at no
    higher cost, then those that only they surpass, and so on.

    Of those that have taken all ``steps``, the choice is the one that costs the least among those
    within one standard error of the best on ``evaluate`` (the one-standard-error rule of Breiman
    et al. 1984); seconds decide nothing. It is measured on ``test`` at the end, once, and no other
    candidate is. The same call with the same seed makes the same choice.

    Args:
        host: a host without the rungs' modules, which stays as it is: each candidate is trained in
            a copy.
        loader: its batches, as for ``host.fit``.
        evaluate: a function of a host that returns a score for each validation example, such as
            whether it was right, ``[n]``; or one number, whose standard error is not known; or a
            loader, of which each batch's loss counts with its sign turned.
        steps: the budget of optimiser steps of one rung.
        test: the same for the test examples; None: nothing is measured there.
        beside: what trains with every rung, as ``train`` of ``host.fit`` names it: a head that the
            task needs (``"host.classifier"``), modules that are there already. Without it the
            lowest rung is the host as it is.
        parameters: the budget of trained parameters, those of ``beside`` included.
        memory: the budget of memory in training, in bytes: the weights, and the peak of what
            torch allocates in the first two steps.
        rungs: names of rungs, or :class:`modgraft.recipes.ladder.rungs.Rung` of one's own; None:
            all. One that is not defined for the host is left out, and its line says why.
        by: what costs the least: trained parameters, memory in training, or stored bytes.
        tolerance: how far below the best a quality may be, in place of one standard error.
        eta: one candidate of so many goes on from round to round.
        keep: how many candidates take all steps.
        seed: of first weights, of the order of the data, and of evaluation.
        folder: keeps all of it: the same call goes on with one that was interrupted. The chosen
            modules are saved in its ``module``.
        fresh: whether to delete the ladder in the folder first.
        progress: whether to say on standard error what is done.
        label: what stands before that, and in the research log.
        note: whether to describe the ladder in the folder's ``note.md``.
        **settings: of ``host.fit``, the same for every candidate: ``schedule``, ``warmup``,
            ``weight_decay``, …; the learning rates are the rungs'.

    Returns:
        The ladder; ``print`` shows its lines and the choice, ``.figure()`` draws quality against
        each cost.

    Raises:
        ModgraftError: a budget that is too small for any rung, with the least that one needs; no
            candidate that could be trained; a setting that means nothing.
        CheckpointError: the folder holds another ladder.
    """
    if unknown := [n for n in settings if n in MANAGED or n not in Settings.__dataclass_fields__]:
        raise ModgraftError(
            f"ladder({unknown[0]}=…) is no setting of it; learning rates are the rungs' "
            f"(dataclasses.replace(rung, rates=(1e-3,))), steps= is the budget"
        )
    if by not in COSTS:
        raise ModgraftError(f"ladder(by={by!r}): it must be one of {', '.join(COSTS)}")
    schedule(1, steps, eta=eta, keep=keep)  # raises for what means nothing
    chosen = rungs_of(rungs)
    beside = [beside] if isinstance(beside, str) else list(beside)
    with host.training_only(beside):  # raises for an unknown name
        asked = {
            "recipe": "ladder", "model": type(host.model).__name__, "steps": steps,
            "parameters": parameters, "memory": memory, "by": by, "tolerance": tolerance,
            "eta": eta, "keep": keep, "seed": seed, "beside": beside,
            "rungs": {rung.name: told(vars(rung)) for rung in chosen},
            "settings": told(settings), "weights": _weights(host),
            "data": digest(Stream(loader, seed=seed).first()),
        }  # fmt: skip
    kept = TemporaryDirectory() if folder is None else nullcontext(folder)
    with kept as place:
        home = folder_path(place, "ladder(folder=)")
        with run_folder(home, fresh=fresh):
            write_card(home, asked, "ladder")
            if (home / "results.json").is_file():
                return read_ladder(home)
            climb = Climb(
                host, loader, evaluate, beside, chosen, steps, {"parameters": parameters,
                "memory": memory}, by, tolerance, eta, keep, seed, home, folder is not None,
                progress, label, settings,
            )  # fmt: skip
            wanted = note and folder is not None
            try:
                with recorded_ladder(home, label, asked, wanted=wanted):
                    found = climb.run(test)
                    write_ladder(home, found)
                    write_json(home / "results.json", found.record())  # the last: all is done
            except BudgetError:
                empty(home)  # nothing was trained: a ladder of another budget may take its place
                raise
    return found


def _weights(host: Host) -> str:
    return sha256(json.dumps(fingerprint(host)).encode()).hexdigest()[:16]
