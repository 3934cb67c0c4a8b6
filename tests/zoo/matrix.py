"""Runs checks on hosts in processes side by side, and shows what came of them."""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
import transformers
from rich.table import Table
from rich.text import Text

from zoo.case import Case, Cell
from zoo.checks import CHECKS
from zoo.rows import ALL

Matrix = dict[str, dict[str, Cell]]
SHOWN = {"holds": ("✓", "green"), "refused": ("r", "yellow"), "wrong": ("W", "red bold"),
         "raw": ("E", "red bold"), "–": ("–", "dim")}  # fmt: skip


def run(name: str, checks: list[str]) -> dict[str, Cell]:
    """Run checks on one host; whatever a check does not catch is a raw error of its cell."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    case = Case(ALL[name])
    cells = {}
    for check in checks:
        cell = cells[check] = Cell()
        with cell.caught("the check"):
            CHECKS[check](case, cell)
    return cells


def run_all(names: list[str], checks: list[str], jobs: int) -> Matrix:
    """Run checks on hosts, in processes side by side."""
    found: Matrix = {}
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        tasks = {pool.submit(run, name, checks): name for name in names}
        for task in as_completed(tasks):
            name = tasks[task]
            found[name] = task.result()
            marks = "".join(SHOWN[cell.status][0] for cell in found[name].values())
            seconds = time.perf_counter() - start
            print(f"{seconds:6.0f} s  {marks}  {name}", file=sys.stderr, flush=True)
    return {name: found[name] for name in names}


def table(matrix: Matrix, checks: list[str]) -> Table:
    found = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    found.add_column("host")
    for check in checks:
        found.add_column(check, overflow="fold")
    for name, cells in matrix.items():
        marks = [Text(*SHOWN[cell.status]) for cell in cells.values()]
        found.add_row(name, *marks)
    return found


def faults(matrix: Matrix) -> list[str]:
    """Return a line for each cell that does not hold: where, at how many sites, and the words."""
    lines = []
    for name, cells in matrix.items():
        for check, cell in cells.items():
            for kind in ("raw", "wrong", "refused"):
                some: dict[str, str] = getattr(cell, kind)
                if some:
                    where, words = next(iter(some.items()))
                    total = cell.holds + len(cell.raw) + len(cell.wrong) + len(cell.refused)
                    lines.append(
                        f"{name} · {check} · {kind} at {len(some)} of {total}: {where}: {words}"
                    )
    return lines


def counts(matrix: Matrix) -> str:
    by = Counter(cell.status for cells in matrix.values() for cell in cells.values())
    meant = sum(n for kind, n in by.items() if kind != "–")
    held = f", {100 * by['holds'] / meant:.1f} % of those that mean something hold" if meant else ""
    return f"{len(matrix)} hosts; cells: " + ", ".join(f"{n} {k}" for k, n in by.items()) + held
