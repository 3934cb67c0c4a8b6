"""`sweep`: a run for each choice of settings and each seed, side by side where they can be."""

from __future__ import annotations

import inspect
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from math import isfinite
from numbers import Real
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

from modgraft.core.config import Configured
from modgraft.core.errors import ModgraftError, listed
from modgraft.core.files import folder_path, read_json, write_json, write_text
from modgraft.host.host import Host
from modgraft.log.record.runs import RunNote, plain, recorded, settings_row
from modgraft.recipes.folder import run_folder, write_card
from modgraft.recipes.sweep.passes import in_passes, planned
from modgraft.recipes.sweep.result import Cell, Row, Sweep, SweepError, failures, told, word
from modgraft.training.checkpoint import fingerprint
from modgraft.training.progress import clock
from modgraft.training.stream import Stream, digest

Run = Callable[..., Mapping[str, float]]
OWN = ("seed", "folder", "label", "note", "progress")
"""What a sweep itself decides for each of its runs."""


def sweep(
    run: Run | Host,
    settings: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    folder: str | Path | None = None,
    fresh: bool = False,
    errors: Literal["raise", "keep"] = "raise",
    progress: bool = True,
    label: str = "sweep",
    note: bool = True,
    **same: Any,
) -> Sweep:
    """Run something for each choice of settings and each seed, and lay the figures side by side.

    ``run`` is a function that is called with one choice of settings, the seed, and ``same``, and
    returns the figures that it has measured. It is called for one after the other::

        def run(lr, rank, seed):
            ...
            return {"accuracy": accuracy}

        found = mg.sweep(run, {"lr": [1e-3, 1e-2], "rank": [4, 8]}, seeds=[0, 1, 2])

    Or ``run`` is a host, and each choice a module that is trained in it and removed again; as many
    as can be are trained in one pass, by :func:`modgraft.fit_side_by_side`::

        found = mg.sweep(host, {"lr": [1e-3, 1e-2], "rank": [4, 8]}, module=mg.LoRA, at="query",
                         loader=loader, evaluate=held_out, steps=100)

    Settings that ``module`` takes (``rank``) make the module, and the others are those of
    ``fit``; ``module``, ``at`` and ``at_once``, the most modules in a pass, may be given too. The
    seed is that of the module's first weights (``torch.manual_seed``) and of the order of its data.
    Its figures are its last evaluation, or the best one with ``restore_best``, and its last
    training loss.

    Args:
        run: the function, or a host. A function with a parameter ``folder`` is given one of its
            own, for ``host.fit(folder=folder)``, or None.
        settings: values by name, of which all combinations are run, or a list of choices.
        seeds: of each choice.
        folder: keeps the figures of each run, the table and the picture. The same call goes on
            with a sweep that was interrupted, and more values or seeds may be added.
        fresh: whether to delete the sweep in the folder first.
        errors: what becomes of runs that fail, or measure what is no finite number, once all others
            are done: ``"raise"`` an error that names them and holds the results; the same call
            tries them again. Or ``"keep"`` them as results, in the folder too.
        progress: whether to say on standard error what is done.
        label: what stands before that, and in the research log.
        note: whether to describe the sweep in the folder's ``note.md``.
        **same: what every run is given beside its own settings.

    Returns:
        The figures; ``print`` shows their means and spreads, ``.figure()`` draws them,
        ``.best("accuracy")`` is the best row.

    Raises:
        SweepError: runs have failed.
        ModgraftError: settings that ``run`` does not take, that are there twice or cannot be told
            apart, or a folder that another process is at work in.
        CheckpointError: the folder holds a sweep of another function, or with other things the
            same.
    """
    rows, seeds = _rows(settings), _seeds(seeds)
    if errors not in ("raise", "keep"):
        raise ModgraftError(f"sweep(errors={errors!r}): it must be 'raise' or 'keep'")
    home = None if folder is None else folder_path(folder, "sweep(folder=)")
    keys = [[_key(i, row, seed, home) for seed in seeds] for i, row in enumerate(rows)]
    cells = {
        key: Cell(row, seed, {}, 0.0)
        for row, its in zip(rows, keys, strict=True)
        for key, seed in zip(its, seeds, strict=True)
    }
    if len(cells) < len(rows) * len(seeds):
        raise ModgraftError(f"sweep: two of the {len(rows)} choices of settings are the same")
    raised: list[Exception] = []
    modules = planned(cells, same) if isinstance(run, Host) else {}
    if not isinstance(run, Host):
        _check_call(run, rows, same)
    with nullcontext() if home is None else run_folder(home, fresh=fresh):
        asked = {} if home is None else _about(run, rows, same)
        if home is not None:
            write_card(home, asked, "sweep")
        done = {} if home is None else _found(home, cells, failed=errors == "keep")
        todo = {key: cell for key, cell in cells.items() if key not in done}

        def gathered() -> Sweep:
            every = cells | done
            by_row = [tuple(every[key] for key in its) for its in keys]
            return Sweep(tuple(map(Row, rows, by_row)), tuple(seeds))

        with _recorded(home, label, asked, gathered, wanted=note and bool(todo)):
            if isinstance(run, Host):
                once = {name: same[name] for name in ("loader", "at_once") if name in same}
                left = [modules[key] for key in todo]
                made = in_passes(run, left, home, label, progress, **once)
            else:
                made = _one_by_one(run, todo, home, same, raised)
            for key, cell in _followed(made, len(cells), len(done), label, progress):
                done[key] = cell
                if home is not None and (errors == "keep" or not cell.error):
                    write_json(_place(home, key) / "figures.json", told(vars(cell)))
            found = gathered()
            if home is not None:
                _write(home, found)
    if found.failed and errors == "raise":
        raise SweepError(
            f"{label}: {len(found.failed)} of {len(cells)} runs failed: {failures(found.failed)}. "
            f"What the others gave is in this error's .sweep"
            + ("" if home is None else f" and in {home}; the same call tries these again")
            + "; errors='keep' returns it",
            found,
        ) from next(iter(raised), None)
    return found


# -- what is asked for ----------------------------------------------------------------------------


def _rows(settings: Any) -> list[dict[str, Any]]:
    """Return each choice of settings."""
    if isinstance(settings, Mapping):
        for name, values in settings.items():
            if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
                raise ModgraftError(
                    f"sweep: {name}={values!r:.80} is one value; give a list of those to try, "
                    f"{{{name!r}: [{values!r:.40}, …]}}, or what is the same in all as {name}=…"
                )
        every = itertools.product(*settings.values())
        rows = [dict(zip(settings, values, strict=True)) for values in every]
    else:
        rows = [dict(row) for row in settings]
    if not rows:
        raise ModgraftError("sweep: there is nothing to run; give values for each setting")
    if own := next((name for row in rows for name in row if name in OWN), None):
        say = "seeds=[0, 1, 2]" if own == "seed" else f"{own}= of the sweep"
        raise ModgraftError(f"sweep: {own!r} is no setting of the runs; it is {say}")
    return rows


def _seeds(seeds: Sequence[int]) -> list[int]:
    found = list(seeds)
    if not found or not all(type(seed) is int for seed in found) or len({*found}) < len(found):
        raise ModgraftError(f"sweep(seeds={seeds!r}): give different whole numbers, [0, 1, 2]")
    return found


def _check_call(run: Any, rows: Sequence[Mapping[str, Any]], same: Mapping[str, Any]) -> None:
    """Refuse settings that a function does not take, before any of them is run.

    Raises:
        ModgraftError: with the parameter.
    """
    if not callable(run):
        raise ModgraftError(f"sweep({run!r:.60}, …): give a function, or a host")
    takes = inspect.signature(run)
    for row in rows:
        try:
            takes.bind(**_call(run, row, 0, None, same))
        except TypeError as error:
            raise ModgraftError(
                f"sweep: {word(run)}{takes} is to be called with "
                f"{', '.join([*row, *same, 'seed'])}: {error}"
            ) from error


def _call(
    run: Any, row: Mapping[str, Any], seed: int, folder: Path | None, same: Mapping[str, Any]
) -> dict[str, Any]:
    given = {**same, **row, "seed": seed}
    return given | ({"folder": folder} if "folder" in inspect.signature(run).parameters else {})


def _key(index: int, settings: Mapping[str, Any], seed: int, home: Path | None) -> str:
    """Return a run's name: in a folder what it was given, and a hash of that."""
    if home is None:
        return f"{index},{seed}"
    text = json.dumps([told(settings), seed], sort_keys=True)
    if " at 0x" in text or "<lambda>" in text:
        raise ModgraftError(
            f"sweep(folder=…): {text:.120} has no name by which it is found again; give values "
            f"that print as what they are (numbers, words, mg.LoRA(rank=4), a named function)"
        )
    words = ",".join(f"{name}={word(value)}" for name, value in settings.items())
    plain_words = "".join(c if c.isalnum() or c in "=,.+-_" else "_" for c in words)
    return f"{plain_words[:80]},seed={seed},{sha256(text.encode()).hexdigest()[:8]}".lstrip(",")


def _about(run: Run | Host, rows: Sequence[Mapping[str, Any]], same: Any) -> dict[str, Any]:
    """Return what has to be the same in a folder."""
    asked = {"sweep": _fixed(run), "settings": sorted({name for row in rows for name in row})}
    asked |= {name: _fixed(value) for name, value in same.items()}
    if isinstance(run, Host):
        asked["sweep"], seen = type(run.model).__name__, json.dumps(fingerprint(run))
        asked["host's weights"] = sha256(seen.encode()).hexdigest()[:16]
        asked["loader"] = digest(Stream(same["loader"]).first())
    return asked


def _fixed(value: Any) -> Any:
    """Return what tells a value from others; of a loader or an object, its class."""
    every = value if isinstance(value, list | tuple) else [value]
    known = (bool, int, float, str, type(None), Configured, type, FunctionType)
    return told(value) if all(isinstance(one, known) for one in every) else type(value).__name__


# -- running --------------------------------------------------------------------------------------


def _one_by_one(
    run: Run, todo: Mapping[str, Cell], home: Path | None, same: Mapping[str, Any],
    raised: list[Exception],
) -> Iterator[tuple[str, Cell]]:  # fmt: skip
    """Call a function for each run; what it raises is the run's error, and added to ``raised``."""
    for key, cell in todo.items():
        own = None if home is None else _place(home, key) / "run"
        began, figures, error = time.monotonic(), {}, ""
        try:
            figures = _figures(run(**_call(run, cell.settings, cell.seed, own, same)))
        except Exception as failure:  # noqa: BLE001  (it is the result of this run, and told)
            raised.append(failure)
            error = f"{type(failure).__name__}: {failure}"
        yield key, Cell(cell.settings, cell.seed, figures, time.monotonic() - began, error)


def _figures(measured: Any) -> dict[str, float]:
    """Return what a run has measured as plain numbers.

    Raises:
        ModgraftError: for anything else, and numbers that are not finite.
    """
    found = dict(measured) if isinstance(measured, Mapping) else {}
    if not found or not all(_is_number(value) for value in found.values()):
        raise ModgraftError(
            f"the run returned {measured!r:.80}; a run of a sweep returns numbers by name, as "
            f"{{'accuracy': 0.9}}"
        )
    found = {str(name): float(value) for name, value in found.items()}
    if bad := [f"{name} {value}" for name, value in found.items() if not isfinite(value)]:
        raise ModgraftError(f"it measured {listed(bad)}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0)


def _followed(
    made: Iterable[tuple[str, Cell]], total: int, before: int, label: str, progress: bool
) -> Iterator[tuple[str, Cell]]:
    """Say what is done.

    In lines, on a terminal too: a run may show a bar of its own.
    """
    began = time.monotonic()
    if before and progress:
        _say(f"{label}: {before} of {total} runs were done before")
    for number, (key, cell) in enumerate(made, 1):
        yield key, cell
        if progress:
            left = (time.monotonic() - began) / number * (total - before - number)
            figures = ", ".join(f"{name} {value:.4g}" for name, value in cell.figures.items())
            _say(
                f"{label} {before + number}/{total}  {cell}: {cell.error or figures}  "
                f"({cell.seconds:.1f} s, {clock(left)} left)"
            )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- the folder -----------------------------------------------------------------------------------


def _place(home: Path, key: str) -> Path:
    return home / "cells" / key


def _found(home: Path, cells: Mapping[str, Cell], *, failed: bool) -> dict[str, Cell]:
    """Return the runs that a folder has already, those that failed only if they are wanted.

    Raises:
        DataError: a file of them is damaged.
    """
    done = {}
    for key, cell in cells.items():
        path = _place(home, key) / "figures.json"
        if path.is_file():
            kept = read_json(path, what="a run's figures", remedy="delete it, and run again",
                             keys=("figures", "seconds", "error"))  # fmt: skip
            if failed or not kept["error"]:
                done[key] = Cell(cell.settings, cell.seed, **{
                    name: kept[name] for name in ("figures", "seconds", "error")
                })  # fmt: skip
    return done


def _write(home: Path, found: Sweep) -> None:
    write_json(home / "results.json", found.record())
    write_text(home / "table.md", found.markdown() + "\n")
    if found.names:
        picture = found.figure()
        (home / "plot.png").write_bytes(picture.light)
        (home / "plot-dark.png").write_bytes(picture.dark or b"")


def _recorded(
    home: Path | None, label: str, asked: Mapping[str, Any], found: Callable[[], Sweep], *,
    wanted: bool,
) -> AbstractContextManager[None]:  # fmt: skip
    """Record the sweep in ``note.md`` of its folder; see `modgraft.log.record.runs`."""

    def about(said: RunNote) -> None:
        said.context["Sweep"] = plain(f"{asked['sweep']} over {', '.join(asked['settings'])}")
        said.context["Settings"] = settings_row(asked, ("sweep", "settings"))

    def result(said: RunNote) -> None:
        sweep = found()
        columns, rows = sweep.cells()
        first = len(sweep.varied)
        for row, cells in zip(sweep.rows, rows, strict=True):
            pairs = zip(columns[first:], cells[first:], strict=True)
            said.learned[plain(str(row))] = ", ".join(f"{plain(c)} {v}" for c, v in pairs if v)
        said.learned["How to read"] = plain(" ".join(sweep.remarks()))
        runs = len(sweep.rows) * len(sweep.seeds)
        said.done["Runs"] = f"{runs}, of which {len(sweep.failed)} failed, [table.md](table.md)"
        said.headline = f"{runs} runs, {len(sweep.rows)} choices of settings"
        if home is not None:
            said.figures[home / "plot.png"] = "the sweep"

    return recorded(home, label, about, result, wanted=wanted)
