"""The example method of CONTRIBUTING.md keeps every rule of the contract."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest

import contract.test_contract
from contract.hosts import HOSTS
from contract.modules import ModuleCase
from modgraft.core.config import REGISTRY
from test_docs import PAGES


def _row() -> ModuleCase:
    page = types.ModuleType("modgraft_contributing_page")
    sys.modules[page.__name__] = page  # dataclasses look their module up by name
    for block in PAGES["CONTRIBUTING.md"]:
        exec(compile(block.code, "CONTRIBUTING.md", "exec"), page.__dict__)
    return page.row


ROW = _row()
VERA = REGISTRY["VeRA"]
pytestmark = pytest.mark.parametrize(
    ("case", "module"),
    [pytest.param(HOSTS[name], ROW, id=f"vera-{name}") for name in ("t5", "gpt2", "plain")],
)
RULES = {
    name: rule for name, rule in vars(contract.test_contract).items() if name.startswith("test_")
}
assert len(RULES) > 10
globals().update(RULES)


@pytest.fixture(autouse=True)
def known_by_name() -> Iterator[None]:
    """Register this page's class: test_docs.py runs the blocks too and defines the class again."""
    REGISTRY["VeRA"] = VERA
    yield
    REGISTRY.pop("VeRA")
