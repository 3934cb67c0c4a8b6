"""Does ``modgraft mmcot ask`` know its depth? 200 questions, 100 pictures, the test split.

Every item of ask_items.py is asked of a trained run, and then the run's own test split. An answer
is right or wrong, and flagged or not; a refusal (a blank picture) counts as flagged.

    python -m benchmarks.ask runs/mmcot [--seed 0] [--wrong] [--kinds] [--test 0]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ask_items import items
from benchmarks.show import add_output, show
from modgraft.core.errors import DataError
from modgraft.recipes.mmcot.ask import Asker
from modgraft.recipes.mmcot.data import load_questions


@dataclass(frozen=True)
class Asked:
    """One thing that was asked: of which kind, whether the option was right, and its flags."""

    group: str
    kind: str
    right: bool
    flags: tuple[str, ...]
    told: str


def judged(asker: Asker) -> Iterator[Asked]:
    """Ask every item of the judge."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "picture.png")
        for item in items():
            if item.picture is not None:
                item.picture.save(path)
            image = None if item.picture is None else path
            yield _ask(asker, item.group, item.kind, image, item.question, item.options,
                       item.hint, item.answer)  # fmt: skip


def tested(asker: Asker, count: int | None) -> Iterator[Asked]:
    """Ask the first questions of the run's test split, all of them for None."""
    questions = load_questions(asker.folder, asker.seed, features=False).split("test")
    for record in questions[:count]:
        image = None if record.image is None else questions.image_path(record)
        yield _ask(asker, "test split", record.category, image, record.question, record.choices,
                   record.hint, record.answer)  # fmt: skip


def _ask(
    asker: Asker, group: str, kind: str, image: Path | None, question: str,
    options: tuple[str, ...], hint: str, answer: int | None,
) -> Asked:  # fmt: skip
    line = f"{question} {options}"
    try:
        said = asker.ask(image, question, options, hint)
    except DataError as error:
        return Asked(group, kind, False, (error.reason,), line)
    right = answer is not None and said.choice == answer
    return Asked(group, kind, right, said.flags, f"{line}: {said.rationale} | {said.text}")


def table_of(asked: Iterable[Asked], *, kinds: bool) -> Table:
    """Count what was right and what was flagged, by group, or by kind."""
    groups: dict[str, list[Asked]] = {}
    for one in asked:
        groups.setdefault(f"{one.group}: {one.kind}" if kinds else one.group, []).append(one)
        if not kinds and one.group != "test split":
            groups.setdefault("all 300", []).append(one)
    table = Table(title="modgraft mmcot ask, shares in percent")
    for title in ("", "asked", "right, no flag", "wrong, no flag", "flagged", "right, but flagged"):
        table.add_column(title, justify="right" if title else "left")
    for name, those in groups.items():
        hits = [
            [o.right and not o.flags for o in those], [not (o.right or o.flags) for o in those],
            [bool(o.flags) for o in those], [o.right and bool(o.flags) for o in those],
        ]  # fmt: skip
        table.add_row(
            name, str(len(those)), *(f"{100 * sum(hit) / len(those):.1f}" for hit in hits)
        )
    return table


def main() -> None:
    """Ask everything, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a trained run on DigitsQA")
    parser.add_argument("--seed", type=int, help="which of the run's seeds; left out: its first")
    parser.add_argument("--test", type=int, help="how many test questions; left out: all")
    parser.add_argument("--kinds", action="store_true", help="a row for each kind of item")
    parser.add_argument("--wrong", action="store_true", help="list what is wrong and not flagged")
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    asker = Asker(options.run, options.seed)
    asked = [*judged(asker), *tested(asker, options.test)]
    show([table_of(asked, kinds=options.kinds)], options=options)
    if options.wrong:
        for one in asked:
            if not one.right and not one.flags:
                Console().print(f"{one.group}, {one.kind}: {one.told}", markup=False)


if __name__ == "__main__":
    main()
