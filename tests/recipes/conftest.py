"""The server that every job of these tests is forked from, begun with what most of them import."""

from __future__ import annotations

from pathlib import Path

import pytest

from modgraft.recipes.mmcot.run import train_net
from modgraft.recipes.workers import Job, _context


@pytest.fixture(scope="session", autouse=True)
def imported_once() -> None:
    """One server serves a process of tests to its end, and imports for the first jobs alone.

    Those of test_workers.py are in a module that it does not find (Python 3.11 starts it without
    this process's ``sys.path``): every job of every later test would import torch anew.
    """
    _context([Job("", "", train_net, (), Path())])
