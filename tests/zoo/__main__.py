"""Runs the zoo and prints its matrix: ``make zoo``, or ``python -m zoo --only bert,gpt2``."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from zoo.checks import CHECKS
from zoo.matrix import counts, faults, run_all, table
from zoo.page import page
from zoo.rows import ALL


def main() -> int:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("--only", default="", help="names of hosts, by commas; or kinds")
    parser.add_argument("--checks", default="", help="names of checks, by commas")
    parser.add_argument("--json", type=Path, help="a file to write the matrix to")
    parser.add_argument("--markdown", action="store_true", help="print the faults as a list")
    parser.add_argument("--docs", action="store_true", help="write docs/supported_hosts.md")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("JOBS", "2")))
    given = parser.parse_args()
    wanted = given.only.split(",")
    names = [n for n, row in ALL.items() if not given.only or n in wanted or row.kind in wanted]
    checks = given.checks.split(",") if given.checks else list(CHECKS)
    matrix = run_all(names, checks, max(1, given.jobs))
    if given.json:
        plain = {n: {c: asdict(v) for c, v in cells.items()} for n, cells in matrix.items()}
        given.json.write_text(json.dumps(plain, indent=1))
    if given.docs:
        Path("docs/supported_hosts.md").write_text(page(matrix))
    console = Console(width=None if sys.stdout.isatty() else 250)
    console.print(table(matrix, checks))
    for line in faults(matrix):
        console.print(("- " if given.markdown else "") + line, markup=False, soft_wrap=True)
    console.print(counts(matrix))
    bad = any(c.status in ("raw", "wrong") for cells in matrix.values() for c in cells.values())
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
