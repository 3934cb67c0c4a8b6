"""A run that tests share, and the server that every job of theirs is forked from."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from command import QUICK, train
from modgraft.recipes.mmcot.run import train_net
from modgraft.recipes.workers import Job, _context


@pytest.fixture(scope="session", autouse=True)
def imported_once() -> None:
    """One server serves a process of tests to its end, and imports for the first jobs alone.

    Those of test_workers.py are in a module that it does not find (Python 3.11 starts it without
    this process's ``sys.path``): every job of every later test would import torch anew.
    """
    _context([Job("", "", train_net, (), Path())])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every row, all as small as can be: what it learned is nothing.

    Trained once, also where several processes test; each has a copy to itself.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    made = root / "mmcot-run" / "all"
    with (root / "mmcot-run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "report.html").is_file():
            result = train(made, "--rows", "all", *QUICK)
            assert result.code == 0, result
            assert "seed 0: Stage 1, fused: started" in result.out
            assert f"Report: {made / 'report.html'}" in result.out
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("runs") / "all"))
