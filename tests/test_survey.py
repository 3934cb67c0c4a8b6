"""docs/modules.md lists every method and how it is implanted; docs/survey.md goes by the survey."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

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
LINKED = r"\[`(\w+)[^`]*`\]\(([^)]*\.py)\)"


@dataclass(frozen=True)
class Line:
    """A method's line in the table of docs/modules.md."""

    method: str
    arguments: tuple[str, ...]
    file: str
    example: str


def table_lines(text: str) -> dict[str, Line]:
    """Read the lines of the methods' table, by the method's name."""
    found = re.findall(
        r"^\| \[`(\w+)\(([^)]*)\)`\]\(([^)]*)\) \| [^|]+ \| `([^|`]+)` \| [^|]+ \|$",
        text,
        flags=re.MULTILINE,
    )
    lines = [Line(name, tuple(re.findall(r"\w+", args)), *rest) for name, args, *rest in found]
    assert len(lines) == len({line.method for line in lines}), "a method has two lines"
    return {line.method: line for line in lines}


def run_example(line: Line, method: type[mg.Computation]) -> None:
    """Implant the example of a line in a small host, train it, and see that it has an effect."""
    torch.manual_seed(0)
    assert line.example.startswith(f"mg.{line.method}(")
    assert set(line.arguments) <= inspect.signature(method).parameters.keys()
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=50, intermediate_size=64, **size)
    host = mg.Host(BertForMaskedLM(config)).eval()
    for name in ("math", "code"):
        host.implant(name, mg.LoRA(rank=2), at=["query", "value"], active=False)
    for name in ("mnli", "squad"):
        host.implant(name, mg.SoftPrompt(length=4), active=False)
    ids = torch.randint(5, 50, (4, 10))

    implant = eval(f"host.implant('new', {line.example})", {"mg": mg, "host": host})
    assert type(implant.method) is method
    host.use(implant.names[0])
    side = {"image": mg.Side(torch.randn(4, 5, 8))} if '"image"' in line.example else {}
    if implant.size:
        learn = ["new", *implant.method.members]
        batch = {"input_ids": ids, "labels": ids, "side": side}
        host.fit([batch], train=learn, steps=3, lr=1e-2, progress=False)
    with torch.no_grad():
        after = host(ids, side=side).logits
        assert not torch.equal(after, host(ids, modules=None).logits)


MODULES = (DOCS / "modules.md").read_text("utf-8")
LINES = table_lines(MODULES)


def test_every_method_has_a_line_in_the_table() -> None:
    missing = [name for name in METHODS if name not in LINES]
    assert not missing, f"the table of docs/modules.md has no line of {', '.join(missing)}"
    assert LINES.keys() == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_example_of_every_method_runs(name: str) -> None:
    run_example(LINES[name], PUBLIC[name])


def test_every_name_in_the_table_is_defined_in_the_file_it_leads_to() -> None:
    links = re.findall(LINKED, MODULES)
    assert {name for name, _ in links} > set(METHODS)
    for name, file in links:
        home = Path(inspect.getfile(PUBLIC[name])).resolve()
        assert (DOCS / file).resolve() == home, name


def test_every_method_on_the_survey_page_runs_there() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", SURVEY, flags=re.DOTALL))
    named = [name for name in METHODS if re.search(rf"`{name}\b", SURVEY)]
    missing = [name for name in named if f"mg.{name}(" not in code]
    assert not missing, f"no block of docs/survey.md runs {', '.join(missing)}"
    assert len(named) >= 20  # the rows of the survey; a later method need not be one of them


def test_what_is_there_is_not_marked_as_absent() -> None:
    there = ABSENT & PUBLIC.keys()
    assert not there, f"docs/survey.md says that {', '.join(there)} is not there yet"


def test_every_name_of_the_survey_page_is_defined_in_the_file_beside_it() -> None:
    found = set()
    for names, files in ROWS:
        paths = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)]*)\)", files)}
        homes = set()
        for name in re.findall(r"`(\w+)`", names):
            homes.add(Path(inspect.getfile(PUBLIC[name])).resolve())
            found.add(name)
        assert homes == paths, names
    assert len(found & set(METHODS)) >= 20
