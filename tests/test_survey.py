"""docs/survey.md and docs/hosts.md name every method, and docs/survey.md runs it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import modgraft as mg

DOCS = Path(__file__).parents[1] / "docs"
SURVEY = (DOCS / "survey.md").read_text("utf-8")
PUBLIC = {name: getattr(mg, name) for name in mg.__all__}
METHODS = [
    name
    for name, value in PUBLIC.items()
    if isinstance(value, type)
    and issubclass(value, mg.Computation)
    and getattr(value, "__final__", False)
]
ABSENT = {
    name
    for cell in re.findall(r"not there yet: ([^|\n]*)", SURVEY)
    for name in re.findall(r"`(\w+)`", cell)
}
ROWS = re.findall(r"^\|[^|]*\|[^|]*\| ([^|]*) \| (\[[^|]*) \|$", SURVEY, flags=re.MULTILINE)


@pytest.mark.parametrize("page", ["survey.md", "hosts.md"])
def test_every_method_is_on_the_page(page: str) -> None:
    text = (DOCS / page).read_text("utf-8")
    missing = [name for name in METHODS if not re.search(rf"`{name}\b", text)]
    assert not missing, f"docs/{page} does not name {', '.join(missing)}"


def test_every_method_runs_on_the_survey_page() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", SURVEY, flags=re.DOTALL))
    missing = [name for name in METHODS if f"mg.{name}(" not in code]
    assert not missing, f"no block of docs/survey.md runs {', '.join(missing)}"


def test_what_is_there_is_not_marked_as_absent() -> None:
    there = ABSENT & PUBLIC.keys()
    assert not there, f"docs/survey.md says that {', '.join(there)} is not there yet"


def test_every_name_is_defined_in_the_file_beside_it() -> None:
    found = set()
    for names, files in ROWS:
        paths = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)]*)\)", files)}
        homes = set()
        for name in re.findall(r"`(\w+)`", names):
            homes.add(Path(inspect.getfile(PUBLIC[name])).resolve())
            found.add(name)
        assert homes == paths, names
    assert found >= set(METHODS)
