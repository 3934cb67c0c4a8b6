"""A quick share of the zoo, and its page in the documentation: ``make zoo`` runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modgraft.core.architectures import FAMILIES
from zoo.case import Case, Cell
from zoo.checks import CHECKS
from zoo.rows import ALL

HOSTS = (
    "bert",
    "gpt2",
    "llama",
    "t5",
    "vit",
    "clip",
    "mixtral",
    "speech_to_text",
    "levit",
    "torch encoder",
    "rnn",
    "dictionary",
)
QUICK = ("layers", "merged", "adapters", "gradient", "checkpoint", "reentrant", "saved")

pytestmark = pytest.mark.filterwarnings("ignore")  # the hosts' own


@pytest.mark.parametrize("name", HOSTS)
def test_it_holds(name: str) -> None:
    case = Case(ALL[name])
    for check in QUICK:
        cell = Cell()
        with cell.caught("the check"):
            CHECKS[check](case, cell)
        assert not cell.wrong, (check, cell.wrong)
        assert not cell.raw, (check, cell.raw)


def test_the_zoo_is_large() -> None:
    plain = [row for row in ALL.values() if row.kind == "plain"]
    assert len(plain) >= 10
    assert len(ALL) - len(plain) >= 60


def test_the_page_names_every_family() -> None:
    """The page is printed by ``make zoo ARGS=--docs``; a family that is new has to come into it."""
    page = (Path(__file__).parents[2] / "docs" / "supported_hosts.md").read_text()
    part = page[page.index("## Families with roles") : page.index("## Their roles")]
    for family in FAMILIES:
        assert ", ".join(f"`{kind}`" for kind in family.types) in part, family.types
