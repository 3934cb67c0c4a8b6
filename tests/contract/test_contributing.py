"""The example method of CONTRIBUTING.md keeps every rule, and touches the four places it says."""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Iterator

import pytest

import contract.test_compiled_once
import contract.test_contract
import modgraft as mg
from contract.hosts import HOSTS
from contract.modules import ModuleCase
from modgraft.core.config import REGISTRY
from test_docs import PAGES, ROOT
from test_survey import METHODS, run_example, table_lines

PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def _row() -> ModuleCase:
    page = types.ModuleType("modgraft_contributing_page")
    sys.modules[page.__name__] = page  # dataclasses look their module up by name
    for block in PAGES["CONTRIBUTING.md"]:
        exec(compile(block.code, "CONTRIBUTING.md", "exec"), page.__dict__)
    return page.row


ROW = _row()
METHOD = type(ROW.make())
NAME = METHOD.__name__
RULES = {
    name: rule for name, rule in vars(contract.test_contract).items() if name.startswith("test_")
}
RULES["test_compiled"] = contract.test_compiled_once.test_compiled_once_for_every_composition
assert len(RULES) > 10
globals().update(RULES)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        rows = [pytest.param(HOSTS[n], ROW, id=f"{ROW.name}-{n}") for n in ("t5", "gpt2", "plain")]
        metafunc.parametrize(("case", "module"), rows)


@pytest.fixture(autouse=True)
def known_by_name() -> Iterator[None]:
    """Register this page's class: test_docs.py runs the blocks too and defines the class again."""
    REGISTRY[NAME] = METHOD
    yield
    REGISTRY.pop(NAME)


def test_the_example_is_a_method_that_the_library_does_not_have() -> None:
    assert METHOD.__final__
    assert NAME not in METHODS


def test_adding_a_method_touches_four_places() -> None:
    steps = re.findall(r"^\*\*(\d)\. (.*?)(?=^\*\*\d|^What)", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert [number for number, _ in steps] == ["1", "2", "3", "4"]
    places = [next(p for p in re.findall(r"`([^`]+)`", text) if "/" in p) for _, text in steps]
    file, stub, contract_row, table = places
    assert file == f"src/modgraft/computation/{NAME.lower()}.py"
    assert stub == "src/modgraft/__init__.pyi"
    assert contract_row == "tests/contract/modules.py"
    assert table == "docs/modules.md"
    assert all((ROOT / place).is_file() for place in places[1:])


def test_the_line_of_its_public_name_is_one_of_the_list() -> None:
    (line,) = re.findall(r"```pyi\n(.*?)```", PAGE, flags=re.DOTALL)
    (node,) = ast.parse(line).body
    assert isinstance(node, ast.ImportFrom)
    assert (node.module, node.level) == (f"computation.{NAME.lower()}", 1)
    assert [(alias.name, alias.asname) for alias in node.names] == [(NAME, NAME)]


def test_its_line_in_the_table_of_methods_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = table_lines(PAGE).values()
    assert line.method == NAME
    assert line.file == f"../src/modgraft/computation/{NAME.lower()}.py"
    monkeypatch.setattr(mg, NAME, METHOD, raising=False)
    run_example(line, METHOD)
