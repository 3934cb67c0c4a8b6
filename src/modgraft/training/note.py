"""Write a run of `fit` down in its folder's note; see `modgraft.log.record.runs`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import nn

from modgraft.core.errors import listed
from modgraft.engine.implant import Implants
from modgraft.log.record.runs import RunNote, code, plain, recorded, settings_row

if TYPE_CHECKING:
    from modgraft.training.run import Run

ELSEWHERE = ("seed", "first_ids", "beside")
"""Settings that stand elsewhere in the note, or that nobody sets."""


def noted(run: Run, loader: Iterable[Any], label: str = "fit") -> AbstractContextManager[None]:
    """Record the training of `run` in its folder, by the main process alone."""
    folder = None if run.store is None else run.store.folder
    name = folder.name if label == "fit" and folder is not None else label

    def about(said: RunNote) -> None:
        said.context |= {
            "Host": _host(run.host),
            "Trains": _trains(run),
            "Data": _data(loader, run.settings.batches),
            "Seeds": f"{run.settings.seed}",
            "Settings": settings_row(run.settings.record(), ELSEWHERE),
            "Device": f"{run.device} × {run.settings.processes}",
        }

    return recorded(
        folder, name, about, lambda said: _result(run, said),
        wanted=run.accelerator.is_main_process,
    )  # fmt: skip


def noted_together(
    runs: Mapping[str, Run], loaders: Mapping[str, Iterable[Any]], label: str = "side by side"
) -> AbstractContextManager[None]:
    """Record the training of several modules in one pass, in the folder above theirs."""
    first = next(iter(runs.values()))
    folder = None if first.store is None else first.store.folder.parent
    seeds = listed([f"{seed}" for seed in sorted({run.settings.seed for run in runs.values()})])

    def about(said: RunNote) -> None:
        said.context["Host"] = _host(first.host)
        for name, run in runs.items():
            data = _data(loaders[name], run.settings.batches)
            said.context[f"Module {plain(name)}"] = f"{_trains(run)}; data {data}"
        said.context["Seeds"] = seeds
        said.context["Settings"] = settings_row(first.settings.record(), (*ELSEWHERE, "batches"))
        said.context["Device"] = f"{first.device}"

    def result(said: RunNote) -> None:
        for name, run in runs.items():
            one = RunNote()
            _result(run, one)
            said.done[f"Trained {plain(name)}"] = one.done["Trained"]
            figures = [f"{label.lower()} {text}" for label, text in one.learned.items()]
            said.learned[plain(name)] = "; ".join(figures)
            if run.history.error:
                said.learned[f"{plain(name)} diverged"] = plain(run.history.error)
        said.seconds = max(run.history.seconds for run in runs.values())
        said.headline = f"{len(runs)} modules trained side by side, seed {seeds}"

    return recorded(folder, label, about, result)


def _host(host: nn.Module) -> str:
    model = _model(host)
    size = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__}, {size:,} parameters"


def _model(host: Any) -> nn.Module:
    return host if _implants(host) is None else host.model


def _implants(host: nn.Module) -> Implants | None:
    """Return the modules implanted in ``host``; None for a model that is no ``Host``."""
    found = getattr(host, "_implants", None)
    return found if isinstance(found, Implants) else None


def _trains(run: Run) -> str:
    """Return how many parameters train, and in which modules they are."""
    size = f"{sum(p.numel() for p in run.parameters.values()):,} parameters"
    implants = _implants(run.host)
    if implants is None:
        return size
    learns = {id(p) for p in run.parameters.values()}
    found = []
    for name, implant in implants.items():
        if any(id(p) in learns for p in implant.parameters()):
            found.append(f"{name} = {implant.method.brief()}, sites {len(implant.paths)}")
    host_learns = any(id(p) in learns for p in _model(run.host).parameters())
    parts = [*map(code, found), *(["the host's own weights"] if host_learns else [])]
    return f"{size}: {listed(parts)}" if parts else size


def _data(loader: Iterable[Any], batches: int | None) -> str:
    dataset = getattr(loader, "dataset", None)
    kind = type(loader if dataset is None else dataset).__name__
    examples = f"{len(dataset):,} examples, " if isinstance(dataset, Sized) else ""
    known = "of unknown length" if batches is None else f"{batches:,} batches an epoch"
    return f"{code(kind)}, {examples}{known}"


def _result(run: Run, said: RunNote) -> None:
    history = run.history
    steps = history.steps[-1] if history.steps else 0
    why = {
        "steps": "all of them",
        "until": "as far as it was to go for now",
        "patience": "no better evaluation for long",
    }
    stopped = why.get(history.stopped or "", history.stopped or "not over")
    said.done["Trained"] = f"{steps} of at most {run.settings.steps} steps ({stopped})"
    if not history.losses:  # it diverged in its first step
        return
    last, first = history.last, history.losses[0]
    said.seconds = history.seconds
    said.learned["Training loss"] = f"{first:.4g} at the first step, {last:.4g} at the last"
    best, monitor = history.best, history.monitor
    reached = f"training loss {last:.4g} after {steps} steps"
    if best is not None:
        reached = f"best {plain(monitor)} {best[monitor]:.4g} at step {best['step']} of {steps}"
        said.learned["Best evaluation"] = f"{_measured(best)}, at step {best['step']}"
        said.learned["Last evaluation"] = _measured(history.evaluations[-1])
    if history.untouched:
        said.learned["Never had a gradient"] = listed([code(n) for n in history.untouched])
    said.learned["Spread"] = f"none is known: one seed, {run.settings.seed}"
    said.headline = f"{reached}, seed {run.settings.seed}"


def _measured(line: Mapping[str, Any]) -> str:
    names = [name for name in line if name not in ("step", "seconds")]
    return ", ".join(
        f"{plain(name)} " + ("–" if line[name] is None else f"{line[name]:.4g}") for name in names
    )
