"""Groups the families of a run that has very many, so that a table or a picture can be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set

from modgraft.report.run import Metrics, Results

MOST = 12
"""The number of families that are shown by name or, with more of them, of names and one group."""


def rare_families(results: Results) -> frozenset[str]:
    """Return the families to show as one group: all but the largest, if there are more than `MOST`.

    They are none, too, where results do not say how many questions a family has.
    """
    measured = [metrics for row in results.rows for metrics in row.seeds.values()]
    sizes = sum((Counter(metrics.family_sizes) for metrics in measured), Counter[str]())
    names = dict.fromkeys(name for metrics in measured for name in metrics.families)
    if len(names) <= MOST or not sizes.keys() >= names.keys():
        return frozenset()
    return frozenset(sorted(names, key=lambda name: -sizes[name])[MOST - 1 :])


def merge_rare(
    accuracy: Mapping[str, float | None], sizes: Mapping[str, int], rare: Set[str]
) -> dict[str, float | None]:
    """Replace the rare families' accuracies by that over all their questions."""
    kept = {name: value for name, value in accuracy.items() if name not in rare}
    if rare:
        found = [(v, sizes[n]) for n, v in accuracy.items() if n in rare and v is not None]
        total = sum(size for _, size in found)
        kept[f"{len(rare)} others"] = sum(v * n for v, n in found) / total if total else None
    return kept


def group_families(results: Results) -> Results:
    """Return the results with the rare families of every row as one group."""
    rare = rare_families(results)

    def merged(metrics: Metrics) -> Metrics:
        families = merge_rare(metrics.families, metrics.family_sizes, rare)
        return metrics.model_copy(update={"families": families})

    rows = [
        row.model_copy(update={"seeds": {seed: merged(m) for seed, m in row.seeds.items()}})
        for row in results.rows
    ]
    return results.model_copy(update={"rows": rows}) if rare else results
