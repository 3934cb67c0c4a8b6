"""The work of a ladder: what each rung costs, the rounds of training, and the choice."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modgraft.core.errors import ModgraftError, listed
from modgraft.core.tensors import device_of
from modgraft.host.host import Host
from modgraft.recipes.ladder.halving import Round, schedule, total
from modgraft.recipes.ladder.lines import COSTS, Costs, Line, Score, choose, finalists
from modgraft.recipes.ladder.pareto import by_front
from modgraft.recipes.ladder.result import Ladder
from modgraft.recipes.ladder.rungs import Rung
from modgraft.recipes.sweep.result import Row
from modgraft.recipes.sweep.sweep import sweep
from modgraft.training.forward import Forward, own_modes
from modgraft.training.memory import peak_bytes
from modgraft.training.processes import accelerator_for
from modgraft.training.randomness import own_randomness, seed_everything
from modgraft.training.settings import Settings
from modgraft.training.stream import Batch, Stream, to_device

Evaluate = Callable[[Host], Any] | Iterable[Batch]
"""Measures a host: a function that returns a score for each example, or one number, of which more
is better; or a loader, of which each batch's loss counts with its sign turned."""


class BudgetError(ModgraftError):
    """A budget within which no rung can be trained."""


@dataclass(frozen=True)
class Climb:
    """One ladder; see :func:`modgraft.ladder` for what it is given.

    ``limits`` are the budget's, by the cost's name; ``save`` says whether the chosen modules are
    saved in ``home``.
    """

    host: Host
    loader: Iterable[Batch]
    evaluate: Evaluate
    beside: list[str]
    rungs: tuple[Rung, ...]
    steps: int
    limits: Mapping[str, int | None]
    by: str
    tolerance: float | None
    eta: int
    keep: int
    seed: int
    home: Path
    save: bool
    progress: bool
    label: str
    settings: Mapping[str, Any]

    def run(self, test: Evaluate | None) -> Ladder:
        """Measure the costs, train round by round, and choose."""
        lines = self._costs()
        within = [rung for rung in self.rungs if not lines[rung.name].left_out]
        left = [{"rung": r.name, "rate": rate} for r in within for rate in self._rates(r)]
        rounds = schedule(len(left), self.steps, eta=self.eta, keep=self.keep)
        self._say(_plan(len(within), rounds))
        taken, first = 0, max(1, rounds[0].until // 2)
        for number, each in enumerate(rounds, 1):
            going, left = left[: each.candidates], left[each.candidates :]
            self._forget(left)
            found = sweep(
                self._train, going, seeds=[self.seed], folder=self.home / f"round{number}",
                label=f"{self.label}, round {number} of {len(rounds)}, to step {each.until}",
                errors="keep", progress=self.progress, note=False, until=each.until,
                first=first,
            )  # fmt: skip
            for row in found.rows:
                name = row.settings["rung"]
                lines[name] = _with(lines[name], row, each.until)
            good = [row for row in found.rows if not row.failed]
            if not good:
                cell = found.failed[0]
                raise ModgraftError(
                    f"{self.label}: no candidate could be trained; {cell}: {cell.error}"
                )
            learn = [row for row in good if self._rung(row.settings["rung"]).learns(self.beside)]
            taken += len(learn) * (each.until - (rounds[number - 2].until if number > 1 else 0))
            costs = [getattr(lines[row.settings["rung"]].costs, self.by) for row in good]
            order = by_front([(r["quality"].mean, c) for r, c in zip(good, costs, strict=True)])
            left = [dict(good[i].settings) for i in order]
        return self._chosen(tuple(lines.values()), taken, test, first)

    # -- costs and budget -----------------------------------------------------------------------

    def _costs(self) -> dict[str, Line]:
        """Measure what each rung takes, and leave out what is over the budget.

        Raises:
            BudgetError: that is all of them.
        """
        found = sweep(
            self._cost, {"rung": [rung.name for rung in self.rungs]}, seeds=[self.seed],
            folder=self.home / "costs", errors="keep", progress=self.progress, note=False,
            label=f"{self.label}, costs",
        )  # fmt: skip
        lines = {}
        for rung, row in zip(self.rungs, found.rows, strict=True):
            if row.failed:
                lines[rung.name] = Line(rung.name, rung.title, None, row.cells[0].error)
                continue
            costs = Costs(*(round(row[name].mean) for name in COSTS))
            over = [
                f"{name}: {getattr(costs, name):,}, of {limit:,} at most"
                for name, limit in self.limits.items()
                if limit is not None and getattr(costs, name) > limit
            ]
            lines[rung.name] = Line(rung.name, rung.title, costs, "; ".join(over))
        if all(line.left_out for line in lines.values()):
            raise BudgetError(self._too_small(list(lines.values())))
        return lines

    def _too_small(self, lines: Sequence[Line]) -> str:
        limits = {name: limit for name, limit in self.limits.items() if limit is not None}
        defined = [(line, line.costs) for line in lines if line.costs is not None]
        if not defined:
            why = listed([f"{line.title}: {line.left_out}" for line in lines], 3)
            return f"{self.label}: none of the rungs is defined for this host ({why})"

        def excess(costs: Costs) -> float:
            return sum(max(0.0, getattr(costs, n) / max(1, most) - 1) for n, most in limits.items())

        line, costs = min(defined, key=lambda each: excess(each[1]))
        needs = {name: max(most, getattr(costs, name)) for name, most in limits.items()}
        given = ", ".join(f"{name}={most}" for name, most in limits.items())
        wanted = ", ".join(f"{name}={least}" for name, least in needs.items())
        return (
            f"a budget of {given} is too small for any rung: {line.title}, which needs the least, "
            f"takes {costs.parameters:,} trained parameters and {costs.memory:,} bytes of memory. "
            f"Give {wanted} or more, or smaller batches where it is the memory"
        )

    def _cost(self, rung: str, seed: int) -> dict[str, float]:
        """Train a rung for two steps, or two in each of its phases."""
        one = self._rung(rung)
        host = self._copy(one, seed)
        learns = one.learns(self.beside)
        steps = 4 if one.sparse else 2
        given = {**self.settings, "warmup": 0, "lr": min(one.rates), "seed": seed}
        given |= {"steps": steps, "until": steps, "first": 2}

        def work() -> None:
            if learns:
                one.train(host, self.loader, self.beside, **given)
            else:
                self._forward(host)

        device = accelerator_for().device
        weights = sum(_nbytes(tensor) for tensor in (*host.parameters(), *host.buffers()))
        memory = weights + peak_bytes(work, device)
        with host.training_only(learns):
            trained = [p for p in host.parameters() if p.requires_grad]
        names = [name for name in learns if name in host]
        kept = {id(t): t for name in names for t in host[name].tensors().values()}
        kept |= {id(p): p for p in trained}
        return {
            "parameters": sum(p.numel() for p in trained),
            "bytes": sum(map(_nbytes, kept.values())),
            "memory": memory,
        }

    @torch.no_grad()
    def _forward(self, host: Host) -> None:
        batch = to_device(dict(Stream(self.loader, seed=self.seed).first()), device_of(host))
        left_out = self.settings.get("ignore", Settings.ignore)
        host.eval()(**{name: value for name, value in batch.items() if name not in left_out})

    # -- training -------------------------------------------------------------------------------

    def _train(self, rung: str, rate: float, seed: int, until: int, first: int) -> dict[str, float]:
        """Train a candidate from where it is, and measure it on the validation examples."""
        host, seconds = self._trained(rung, rate, seed, until, first)
        quality, error = measured(self.evaluate, host, seed)
        known = {} if error is None else {"standard error": error}
        return {"quality": quality, **known, "seconds of training": seconds}

    def _trained(
        self, rung: str, rate: float, seed: int, until: int, first: int
    ) -> tuple[Host, float]:
        one = self._rung(rung)
        host = self._copy(one, seed)
        seconds = one.train(
            host, self.loader, self.beside, folder=self._folder(rung, rate), steps=self.steps,
            until=until, first=first, lr=rate, seed=seed, **self.settings,
        )  # fmt: skip
        return host, seconds

    def _copy(self, rung: Rung, seed: int) -> Host:
        host = copy.deepcopy(self.host).to(accelerator_for().device)
        rung.implant(host, seed)
        return host

    def _rung(self, name: str) -> Rung:
        return next(rung for rung in self.rungs if rung.name == name)

    def _rates(self, rung: Rung) -> tuple[float, ...]:
        """Return the learning rates to try; where nothing is trained, one stands for all."""
        return rung.rates if rung.learns(self.beside) else rung.rates[:1]

    def _folder(self, rung: str, rate: float) -> Path:
        return self.home / "fits" / f"{rung},lr={rate:g}"

    def _forget(self, candidates: Iterable[Mapping[str, Any]]) -> None:
        """Remove the checkpoints of candidates that fell behind; their figures stay."""
        for each in candidates:
            for path in self._folder(**each).rglob("checkpoints"):
                shutil.rmtree(path)

    # -- the choice -----------------------------------------------------------------------------

    def _chosen(
        self, lines: tuple[Line, ...], taken: int, test: Evaluate | None, first: int
    ) -> Ladder:
        """Choose, measure the choice on the test examples, and save its modules."""
        line = choose(finalists(lines, self.steps), self.by, self.tolerance)
        assert line.best is not None  # noqa: S101
        rung, rate = self._rung(line.name), line.best.rate
        every = [(one.name, each) for one in self.rungs for each in self._rates(one)]
        self._forget({"rung": n, "rate": r} for n, r in every if (n, r) != (rung.name, rate))
        host, _ = self._trained(rung.name, rate, self.seed, self.steps, first)
        tested = None if test is None else measured(test, host, self.seed)
        module, names = None, [*rung.names, *(name for name in self.beside if name in host)]
        if self.save and names:
            about: Any = {"metrics": {"quality": line.best.quality}}
            module = str(host.save(names, self.home / "module", **about))
        rates = {one.name: one.rates for one in self.rungs}
        return Ladder(
            lines, rung.name, rates, self.steps, taken, self.by, self.tolerance, self.seed, tested,
            module,
        )  # fmt: skip

    def _say(self, text: str) -> None:
        if self.progress:
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)


def _with(line: Line, row: Row, until: int) -> Line:
    """Return a line with what one of its candidates has reached, or why it failed."""
    cell, rate = row.cells[0], row.settings["rate"]
    if cell.error:
        return replace(line, failed=(*line.failed, f"lr={rate:g}, {cell.error}"))
    found = cell.figures
    score = Score(
        rate, until, found["quality"], found.get("standard error"), found["seconds of training"]
    )
    return replace(line, scores=(*line.scores, score))


def _plan(rungs: int, rounds: Sequence[Round]) -> str:
    parts = ", ".join(f"{each.candidates} to step {each.until:,}" for each in rounds)
    return (
        f"{rungs} rungs within the budget, {rounds[0].candidates} candidates with their learning "
        f"rates; {len(rounds)} rounds: {parts}; {total(rounds):,} steps in all"
    )


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measured(evaluate: Evaluate, host: Host, seed: int) -> tuple[float, float | None]:
    """Return the mean of the scores that a host is given, and its standard error.

    Args:
        evaluate: as :func:`modgraft.ladder` takes it.
        host: is measured in evaluation mode, without gradients.
        seed: of what the evaluation draws at random.

    Raises:
        ModgraftError: the scores are no finite numbers.
    """
    with own_modes(host.modules()), torch.no_grad(), own_randomness():
        host.eval()
        seed_everything(seed, "evaluate")
        found = evaluate(host) if callable(evaluate) else [-x for x in _losses(host, evaluate)]
    try:
        scores = torch.as_tensor(found, dtype=torch.float64).flatten().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModgraftError(
            f"evaluate returned {found!r:.80}; give a score for each example, as [1.0, 0.0, …], or "
            f"one number; more is better"
        ) from error
    if not scores.numel() or not scores.isfinite().all():
        raise ModgraftError(f"evaluate returned {found!r:.80}: scores have to be finite numbers")
    n = scores.numel()
    error = None if n == 1 else float(scores.std() / n**0.5)
    return float(scores.mean()), error


def _losses(host: Host, loader: Iterable[Batch]) -> Iterator[float]:
    forward = Forward(host, frozenset(Settings.ignore), device_of(host), "no")
    for batch in Stream(loader).read(0):
        yield forward.losses(batch).mean().item()
