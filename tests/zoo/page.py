"""Writes ``docs/supported_hosts.md`` from a matrix of the zoo: ``python -m zoo --docs``."""

from __future__ import annotations

import transformers
from torch import nn

from modgraft.core.architectures import FAMILIES
from modgraft.core.roles import family_of
from modgraft.host.describe import rows_of
from zoo.case import Cell
from zoo.matrix import Matrix
from zoo.rows import ALL

Types = tuple[str, ...]

COLUMNS = {
    "LoRA": ("layers", "merged", "gradient", "saved"),
    "adapters": ("adapters", "blocks"),
    "prompts": ("prompt", "prompted"),
    "prefix": ("prefix",),
    "side inputs": ("fusion",),
    "by example": ("each", "weighted"),
    "mixtures": ("mixture", "tokens"),
    "checkpointing": ("checkpoint", "reentrant"),
    "generate": ("generate",),
    "compile": ("compiled",),
    "bf16": ("half",),
}
"""The columns of the page, and the checks that each stands for."""

HEAD = """# Supported hosts

Any `torch.nn.Module` is a host. This page says what was tried on which. `make zoo` builds a small
model of each architecture below by its config, and tries every kind of module on it against oracles
that know nothing of modgraft: weights edited by hand, forward hooks, `functional_call`, PEFT. `make
zoo ARGS=--docs` writes this page of what came out; nothing in it is written by hand. Your own host
is asked by [`host.probe(batch)`](hosts.md).

- **yes**: it holds at every site that was tried. **in part**: it holds at most sites, and is
  refused with a reason at others. **no**: it is refused, with a reason. **fault**: it is wrong
  somewhere, or raises an error that is not modgraft's own. **–**: it means nothing there.
- *by example*: `modules=[…]` and `mg.Weighted`; *side inputs*: gated fusion; *compile*: one graph
  for every composition; *bf16*: born as the identity, and acting as the changed weight does.
"""


def page(matrix: Matrix) -> str:
    """Return the page: families with roles, and then hosts that have none."""
    hosts: dict[Types, list[str]] = {family.types: [] for family in FAMILIES}
    roles: dict[Types, dict[str, None]] = {family.types: {} for family in FAMILIES}
    others: list[str] = []
    for name in matrix:
        model = ALL[name].model()
        found = [] if ALL[name].kind == "plain" else _families(model)
        if not found:
            others.append(name)
        for types in found:
            hosts[types].append(name)
            if len(found) == 1:  # a host of several models has the roles of each
                roles[types] |= dict.fromkeys(_roles(model))
    parts = [HEAD, "## Families with roles\n", _row(("family", "tried", *COLUMNS)), _rule()]
    parts += [
        _row((_named(types), ", ".join(tried) or "–", *_marks(matrix, tried)))
        for types, tried in hosts.items()
    ]
    parts += ["\n## Their roles\n", "| family | roles, in the hosts that were tried |", "|---|---|"]
    parts += [
        _row((_named(types), ", ".join(f"`{role}`" for role in some) or "–"))
        for types, some in roles.items()
    ]
    parts += ["\n## Other hosts\n", _row(("host", "kind", *COLUMNS)), _rule()]
    parts += [_row((name, ALL[name].kind, *_marks(matrix, [name]))) for name in others]
    parts.append(f"\nWritten with transformers {transformers.__version__}.")
    return "\n".join(parts) + "\n"


def _families(model: nn.Module) -> list[Types]:
    """Return the types of a model's family, or else of those of the models that it holds."""
    own = family_of(model)
    if own is not None:
        return [own.types]
    held = [f.types for m in model.modules() if (f := family_of(m)) is not None]
    return list(dict.fromkeys(held))


def _roles(model: nn.Module) -> list[str]:
    """Return the roles of a model of a known family."""
    return [] if family_of(model) is None else [row.at for row in rows_of(model)]


def _named(types: Types) -> str:
    return ", ".join(f"`{kind}`" for kind in types)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule() -> str:
    return "|" + "---|" * (2 + len(COLUMNS))


def _marks(matrix: Matrix, names: list[str]) -> tuple[str, ...]:
    return tuple(
        _mark([matrix[name][c] for name in names for c in checks if c in matrix[name]])
        for checks in COLUMNS.values()
    )


def _mark(cells: list[Cell]) -> str:
    """Return the worst of some cells, in a word."""
    found = {cell.status for cell in cells}
    if found & {"raw", "wrong"}:
        return "fault"
    if "refused" in found:
        return "in part" if sum(cell.holds for cell in cells) else "no"
    return "yes" if "holds" in found else "–"
