"""The command line, run in this process: an import of torch less each time."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from modgraft.cli.app import entry

SMALL = [
    *("--steps", "30", "--batch", "8"),
    *(f"--set={s}" for s in ("d_model=32", "d_ff=32", "layers=1", "max_rationale=12")),
    *(f"--set={s}" for s in ("max_answer=8", "steps_eye=20")),
]
"""As little as can be of a run of DigitsQA; with --quick 0.02 that is 18 test questions."""

QUICK = ("--quick", "0.02", *SMALL)


class Result(NamedTuple):
    """What a command did: its exit status, and what it printed."""

    code: int
    out: str
    err: str


def modgraft(*args: str | Path) -> Result:
    """Run `modgraft` with these arguments, as a shell would, off a terminal."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    argv = patch.object(sys, "argv", ["modgraft", *map(str, args)])
    with argv, redirect_stdout(out), redirect_stderr(err):
        try:
            entry()
        except SystemExit as stop:
            code = stop.code
    return Result(int(code or 0), out.getvalue(), err.getvalue())  # type: ignore[call-overload]


def train(run: Path, *args: str | Path) -> Result:
    """`modgraft mmcot train` into this folder."""
    return modgraft("mmcot", "train", "--run", run, *args)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file's size and time of change: what a command that changes nothing leaves equal."""
    found = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def refused(result: Result, *words: str) -> str:
    """The one clear line that a command was refused with, holding all these words."""
    assert result.code == 1, result
    assert "Traceback" not in result.err + result.out
    first, _, rest = result.err.strip().partition("\n")
    assert first.startswith("error: ")
    assert not rest or (rest.startswith("(whole log: ") and "\n" not in rest), rest
    for word in words:
        assert word in first, (word, first)
    return first
