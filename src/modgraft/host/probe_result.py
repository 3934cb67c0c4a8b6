"""What a probe of a host found, as rows, and printed as tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from modgraft.core.patterns import starred
from modgraft.core.tables import Page, Table, table

SITES = ("site", "module", "called", "acts", "learns", "examples", "features", "merged")
MODULES = ("module", "merged", "each example by itself")


@dataclass
class Probed:
    """What one batch showed of a module at one site.

    Attributes:
        site: the site's label.
        module: the module's name.
        called: how often the layer was called in one call of the host.
        acts: whether the layer put out something else with the module; None: it cannot be told.
        learns: whether a gradient reached the module there; None: it has no parameters there.
        examples: the axis of the examples in the layer's output, in words.
        features: the axis and number of its features, in words.
        merged: how far the output was off that of the layer with θ + Δ; None: nothing to compare.
        faults: what is wrong there and what to do, in full sentences.
    """

    site: str
    module: str
    called: int = 0
    acts: bool | None = None
    learns: bool | None = None
    examples: str = "–"
    features: str = "–"
    merged: float | None = None
    faults: list[str] = field(default_factory=list)

    def cells(self) -> tuple[str, ...]:
        """Return the cells of its row, as text."""
        merged = (
            "–" if self.merged is None else "equal" if not self.merged else percent(self.merged)
        )
        acts, learns = _yes(self.acts), _yes(self.learns)
        called, examples = f"{self.called}", self.examples
        return (self.module, called, acts, learns, examples, self.features, merged)


@dataclass
class Verdict:
    """What one batch showed of a module as a whole.

    Attributes:
        module: its name.
        merged: whether the host put out what it does with θ + Δ in its weights, in words.
        each: whether an example with the module is what it is in a batch of such, in words.
        faults: what is wrong and what to do, in full sentences.
    """

    module: str
    merged: str = "–"
    each: str = "–"
    faults: list[str] = field(default_factory=list)


@dataclass
class Probe:
    """What :meth:`modgraft.Host.probe` found: ``print`` it.

    Attributes:
        sites: a row for each site of each module.
        modules: a row for each module.
        notes: what holds for the host as a whole.
    """

    sites: list[Probed]
    modules: list[Verdict]
    notes: list[str] = field(default_factory=list)

    @property
    def faults(self) -> dict[str, list[str]]:
        """What is wrong, by site (or by module, for what concerns all its sites)."""
        found: dict[str, list[str]] = {}
        for row in self.sites:
            if row.faults:
                found.setdefault(row.site, []).extend(row.faults)
        for verdict in self.modules:
            if verdict.faults:
                found.setdefault(verdict.module, []).extend(verdict.faults)
        return found

    def __str__(self) -> str:
        return self._page()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return self._page()._repr_html_()

    def _page(self) -> Page:
        alike = Counter((starred(row.site), row.cells()) for row in self.sites)
        rows = [
            (f"{at} ({n})" if n > 1 else at or "the input", *cells)
            for (at, cells), n in alike.items()
        ]
        parts: list[str | Table] = [
            table(SITES, rows),
            table(MODULES, [(v.module, v.merged, v.each) for v in self.modules]),
        ]
        said: dict[str, list[str]] = {}
        for where, faults in self.faults.items():
            for fault in faults:
                said.setdefault(fault, []).append(where)
        for fault, places in said.items():
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            parts.append(f"{', '.join(places[:3])}{more}: {fault}")
        return Page(*parts, *self.notes, *([] if said else ["Nothing is wrong."]))


def _yes(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def percent(share: float) -> str:
    """Write how far something is off."""
    return f"{100 * share:.3g} % off"
