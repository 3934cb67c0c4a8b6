"""What a ladder has found: its lines, which to take and why, as a table and as a page of plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas

from modgraft.core.errors import DataError, UnknownNameError
from modgraft.core.files import read_json, write_text
from modgraft.core.tables import Page, Table, table
from modgraft.recipes.ladder.lines import COSTS, Costs, Line, Score, finalists, frontier_of, top
from modgraft.recipes.ladder.picture import paint_ladder
from modgraft.report.figures import Picture, Scheme, draw
from modgraft.report.table import count, seconds

COLUMNS = ("rung", "parameters", "stored", "memory", "rate", "steps", "quality", "seconds", "")


@dataclass(frozen=True, repr=False)
class Ladder:
    """The result of :func:`modgraft.ladder`; ``print`` shows it, :meth:`figure` draws it.

    Attributes:
        lines: a line for each rung, from the least change to the most.
        choice: the name of the rung to take.
        rates: the learning rates that were tried, by rung.
        steps: the budget of steps of a rung.
        taken: the steps that all candidates took together.
        by: the cost that decides.
        tolerance: how far below the best a quality may be; None: one standard error of the best.
        seed: the seed.
        test: mean and standard error of the choice on the test examples; None: not measured.
        module: where the chosen modules are saved; None: nowhere.
    """

    lines: tuple[Line, ...]
    choice: str
    rates: dict[str, tuple[float, ...]]
    steps: int
    taken: int
    by: str
    tolerance: float | None
    seed: int
    test: tuple[float, float | None] | None = None
    module: str | None = None

    def __getitem__(self, name: str) -> Line:
        """Return the line of a rung."""
        for line in self.lines:
            if line.name == name:
                return line
        raise UnknownNameError.among("rung", name, [line.name for line in self.lines])

    @property
    def finalists(self) -> list[Line]:
        """The lines with all of the steps, which alone are compared in the end."""
        return finalists(self.lines, self.steps)

    def frontier(self, cost: str = "parameters") -> list[str]:
        """Return the finalists that no other one surpasses in quality at no higher cost.

        Args:
            cost: ``"parameters"``, ``"bytes"``, ``"memory"`` or ``"seconds"``.
        """
        return frontier_of(self.finalists, cost)

    def figure(self) -> Picture:
        """Draw quality against each cost, with the Pareto frontier and the choice."""
        alt = f"Quality against parameters, memory, steps and seconds. {self.advice()}"

        def paint(canvas: Canvas, scheme: Scheme) -> None:
            paint_ladder(canvas, scheme, self.lines, self.finalists, self.choice)

        return draw((9.0, 7.0), alt, paint)

    # -- what is shown --------------------------------------------------------------------------

    def advice(self) -> str:
        """Say which rung to take, and why."""
        line, best = self[self.choice], top(self.finalists)
        assert line.best is not None  # noqa: S101
        assert best.best is not None  # noqa: S101
        near = "as good as the best"
        if self.tolerance or (best.best.error and self.tolerance is None):
            reach = f"{self.tolerance:g}" if self.tolerance else "one standard error"
            near = f"within {reach} of the best, {best.title} with {quality(best.best)}"
        kind = {"parameters": "trained parameters", "bytes": "stored bytes"}.get(self.by, self.by)
        said = (
            f"Take {line.title}: {quality(line.best)} on the validation examples. It has the least "
            f"{kind} of those {near}."
        )
        if self.test is not None:
            said += f" On the test examples, looked at once: {_mean_error(*self.test)}."
        return said

    def remarks(self) -> list[str]:
        """Return sentences that a reader of the table should know."""
        said = [self.advice()]
        line, tried = self[self.choice], self.rates[self.choice]
        trains = line.costs is not None and line.costs.parameters > 0
        if trains and line.best and line.best.rate in (min(tried), max(tried)) and len(tried) > 1:
            said.append(
                f"Its learning rate, {line.best.rate:g}, is at the edge of those that were tried; "
                f"others may be better."
            )
        said.append(
            f"Quality: the mean over the validation examples ± its standard error. It chose the "
            f"learning rates and the rung, and so it flatters the choice; it is that of one seed, "
            f"{self.seed}. Frontier: no other with all {self.steps:,} steps has as much quality "
            f"for as few {self.by}. All candidates together took {self.taken:,} steps."
        )
        return [*said, *(f"{line.title}, failed: {f}." for line in self.lines for f in line.failed)]

    def cells(self) -> list[list[str]]:
        """Return the table as text, a row for each line, under :data:`COLUMNS`."""
        front = self.frontier(self.by) if self.by in COSTS else []
        return [self._cells(line, front) for line in self.lines]

    def _cells(self, line: Line, front: Sequence[str]) -> list[str]:
        costs, best = line.costs, line.best
        shown = [line.title, *["–"] * 7, line.left_out]
        if costs is not None:
            shown[1:4] = [count(costs.parameters), size(costs.bytes), size(costs.memory)]
        if best is not None:
            rate = f"{best.rate:g}" if costs is not None and costs.parameters else "–"
            shown[4:8] = [rate, f"{best.steps:,}", quality(best), seconds(best.seconds)]
            marks = ["take this"] if line.name == self.choice else []
            marks += ["frontier"] if line.name in front else []
            shown[8] = ", ".join(marks) if best.steps >= self.steps else "fell behind"
        elif line.failed:
            shown[8] = "failed"
        return shown

    def markdown(self) -> str:
        """Return the table as Markdown, with what is to be said of it."""
        align = ["---", *["---:"] * 7, "---"]
        body = ["| " + " | ".join(row) + " |" for row in (COLUMNS, align, *self.cells())]
        return "\n".join([*body, "", *self.remarks()])

    def record(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        return {"recipe": "ladder", **asdict(self)}

    def __repr__(self) -> str:
        return str(self._page())

    def __str__(self) -> str:
        return str(self._page())

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return self._page()._repr_html_()

    def _page(self) -> Page:
        parts: list[str | Table] = [table(COLUMNS, self.cells(), right=COLUMNS[1:8])]
        return Page(*parts, "\n".join(self.remarks()))


def read_ladder(folder: Path) -> Ladder:
    """Read the ladder of a folder.

    Raises:
        MissingFileError: there is none, or it has not ended.
        DataError: it is damaged.
    """
    path = folder / "results.json"
    remedy = "the same call of ladder writes it; delete it if it is damaged"
    keys = list(Ladder.__dataclass_fields__)
    kept = read_json(path, what="a ladder's results", remedy=remedy, keys=keys)
    try:
        kept["lines"] = tuple(
            Line(**{
                **line,
                "costs": None if line["costs"] is None else Costs(**line["costs"]),
                "scores": tuple(Score(**score) for score in line["scores"]),
                "failed": tuple(line["failed"]),
            })
            for line in kept["lines"]
        )  # fmt: skip
        kept["rates"] = {name: tuple(tried) for name, tried in kept["rates"].items()}
        kept["test"] = None if kept["test"] is None else tuple(kept["test"])
        return Ladder(**{name: kept[name] for name in keys})
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"no ladder's results ({error})", file=path, remedy=remedy) from error


def write_ladder(folder: Path, found: Ladder) -> None:
    """Write the table and the pictures of a ladder into its folder."""
    picture = found.figure()
    (folder / "plot.png").write_bytes(picture.light)
    (folder / "plot-dark.png").write_bytes(picture.dark or b"")
    write_text(folder / "table.md", found.markdown() + "\n")


def quality(score: Score) -> str:
    """Format a quality with its standard error."""
    return _mean_error(score.quality, score.error)


def _mean_error(mean: float, error: float | None) -> str:
    return f"{mean:.4g}" if error is None else f"{mean:.4g} ± {error:.2g}"


def size(number: float) -> str:
    """Format bytes for people: 3.5 MiB, 12 KiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} B"
