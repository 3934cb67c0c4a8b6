"""Summarise metrics over seeds: mean, spread, interval, chance, and which rows are best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from scipy import stats

from modgraft.report.run import Metrics, Prediction, Row, Run

Read = Callable[[Metrics], float | None]
ReadSeveral = Callable[[Metrics], Mapping[str, float | None]]

LEVEL = 0.05
"""Two rows differ if Welch's test over their seeds gives a p below this."""

Z = float(stats.norm.ppf(0.975))
"""The quantile of a two-sided interval of 95 %."""


@dataclass(frozen=True)
class Figure:
    """A measurement over seeds: `values` in the seeds' order, never empty."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The sample standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        spread = self.spread
        return f"{self.mean:.1f}" if spread is None else f"{self.mean:.1f} ± {spread:.1f}"


def figure(row: Row, read: Read) -> Figure | None:
    """Collect one metric of a row over the seeds that have it; None if no seed has it."""
    found = (read(metrics) for _, metrics in sorted(row.seeds.items()))
    values = tuple(float(value) for value in found if value is not None)
    return Figure(values) if values else None


def figures(row: Row, read: ReadSeveral, names: Iterable[str]) -> list[Figure | None]:
    """Collect metrics of a row by name, such as its accuracy on each family."""
    return [figure(row, lambda m, name=name: read(m).get(name)) for name in names]


def interval(percent: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy over `n` questions, both in percent.

    Wilson's score interval (1927), which holds for few questions and near 0 and 100 too.
    """
    share, z2 = percent / 100, Z * Z / n
    middle = share + z2 / 2
    reach = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4)
    return 100 * (middle - reach) / (1 + z2), 100 * (middle + reach) / (1 + z2)


def apart(a: Figure, b: Figure) -> bool:
    """Return whether two figures differ significantly (Welch's t-test, two-sided, `LEVEL`)."""
    if a.spread is None or b.spread is None:
        return False
    if a.spread == b.spread == 0:
        return a.mean != b.mean
    test = stats.ttest_ind_from_stats(
        a.mean, a.spread, len(a.values), b.mean, b.spread, len(b.values), equal_var=False
    )
    return float(test[1]) < LEVEL


def best(rows: Iterable[Row], read: Read) -> set[str]:
    """Return the keys of the best rows: the highest mean, and all that do not differ from it.

    Controls and leaks do not compete. No row is best if a row has a single seed, or if all rows
    would share first place.
    """
    field = {
        row.key: found
        for row in rows
        if row.group != "control" and not row.leaks and (found := figure(row, read)) is not None
    }
    if len(field) < 2 or any(found.spread is None for found in field.values()):
        return set()
    top = max(field.values(), key=lambda found: found.mean)
    first = {key for key, found in field.items() if found is top or not apart(top, found)}
    return first if len(first) < len(field) else set()


@dataclass(frozen=True)
class Chance:
    """The accuracy of guessing an option, in percent: of all questions, of those with an image, by
    family and by column; and the number of questions."""

    all: float
    n: int
    image: float | None
    n_image: int
    families: dict[str, float]
    family_sizes: dict[str, int] = field(default_factory=dict)
    columns: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, predictions: list[Prediction]) -> Chance | None:
        """Compute the expected accuracy of a uniform guess among each question's options."""
        if not predictions:
            return None

        def guess(some: list[Prediction]) -> float:
            return 100 * statistics.fmean(1 / len(each.choices) for each in some)

        seen = [each for each in predictions if each.image]
        families: dict[str, list[Prediction]] = {}
        for each in predictions:
            families.setdefault(each.category, []).append(each)
        return cls(
            guess(predictions),
            len(predictions),
            guess(seen) if seen else None,
            len(seen),
            {name: guess(some) for name, some in families.items() if name},
            {name: len(some) for name, some in families.items()},
        )


def chance_of(run: Run) -> Chance | None:
    """Compute chance over the questions of the run, from the first row that has predictions.

    That of columns is among the row's metrics; without it, those of images and of all are known.
    """
    for seeds in run.predictions.values():
        for _, predictions in sorted(seeds.items()):
            found = Chance.of(predictions)
            if found is not None:
                return replace(found, columns=_by_column(run, found))
    return None


def _by_column(run: Run, found: Chance) -> dict[str, float]:
    known = {"IMG": found.image, "Avg": found.all}
    rows = run.results.rows if run.results else []
    measured = (metrics.chance for row in rows for _, metrics in sorted(row.seeds.items()))
    known |= next((each for each in measured if each), {})
    return {name: value for name, value in known.items() if value is not None}
