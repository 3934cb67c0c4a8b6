"""Parameter sharing: one φ at every site of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from modgraft.computation._redirect import ModuleTensors, redirect
from modgraft.computation.base import Computation, Wrapper
from modgraft.core.errors import ModgraftError
from modgraft.core.sites import Site, matches

Shapes = dict[str, list[int]]  # of a site's tensors, by name


@final
class Shared(Wrapper):
    """f'_s(x) = f_s(x; φ_g), one φ_g for all sites s of a group g.

    Hard parameter sharing (Ruder 2017, arXiv:1706.05098) over the sites of any other module, whose
    parameters start as they would without it and are stored at the first site of each group. With
    ``only=("A",)`` the layers of a LoRA share A, and each has a separate B. Random numbers that a
    method draws for a site but does not train are not shared, so that
    ``Shared(IntrinsicDimension(dim=100))`` is the papers' one φ for a whole model.

    Args:
        module: any computation.
        group: ``"all"``, all sites together; ``"name"``, the sites whose paths end alike (all
            queries, all values); or a tuple of path patterns, one a group, that cover all sites.
        only: the names of the tensors that are shared; empty: all are.

    Raises:
        ModgraftError: if tensors of one group differ in shape, a site is in no group, a pattern
            matches no site, or a name is no tensor of the module.
    """

    group: str | tuple[str, ...] = "all"
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.only, str):
            raise ModgraftError(f"Shared(only={self.only!r}): a tuple, only=({self.only!r},)")
        self.only = tuple(self.only)
        if isinstance(self.group, str) and self.group not in ("all", "name"):
            raise ModgraftError(
                f"Shared(group={self.group!r}): 'all', 'name', or a tuple of path patterns, as "
                f"group=({self.group!r}, '*')"
            )
        if not isinstance(self.group, str):
            self.group = tuple(self.group)
        if self.module.task_names("m") != ["m"]:
            raise ModgraftError(
                f"Shared({self.module!r}): a {type(self.module).__name__} is one for all its sites "
                f"already; leave Shared out"
            )

    def build_all(self, sites: Sequence[Site]) -> list[Computation]:
        places = self.module.build_all(sites)
        shapes = [{k: list(t.shape) for k, t in place.state_dict().items()} for place in places]
        self._check_names(shapes)
        for first, *others in self._groups(sites):
            for other in others:
                if self._unequal(first, other, shapes):
                    raise self._refusal(sites, first, other, shapes)
                keys = [key for key in shapes[other] if key in self.only or not self.only]
                redirect(places[other], keys, ModuleTensors(places[first]))
        return places

    def _groups(self, sites: Sequence[Site]) -> list[list[int]]:
        """Return the sites of each group, as positions in ``sites``."""
        groups: dict[str, list[int]] = {}
        for i, site in enumerate(sites):
            if self.group == "all":
                name = "all"
            elif self.group == "name":
                name = site.label.rpartition(".")[2]
            else:
                found = [p for p in self.group if matches(p, site)]
                if not found:
                    raise ModgraftError(
                        f"Shared(group={self.group!r}): {site.label} is in none of these groups; "
                        f"write group={(*self.group, '*')!r} for a last group of all the others"
                    )
                name = found[0]
            groups.setdefault(name, []).append(i)
        if not isinstance(self.group, str) and (empty := set(self.group) - groups.keys()):
            raise ModgraftError(
                f"Shared(group={self.group!r}): no site is in the group {min(empty)!r}; the "
                f"module's sites are {', '.join(s.label for s in sites[:6])}"
            )
        return list(groups.values())

    def _check_names(self, shapes: Sequence[Shapes]) -> None:
        names = list(dict.fromkeys(key for of_site in shapes for key in of_site))
        if not names:
            raise ModgraftError(
                f"Shared({self.module!r}): it has no tensors that could be shared; leave Shared out"
            )
        if unknown := [name for name in self.only if name not in names]:
            raise ModgraftError(
                f"Shared(only={self.only!r}): {self.module!r} has no tensor {unknown[0]!r}; it has "
                f"{', '.join(names)}"
            )

    def _unequal(self, first: int, other: int, shapes: Sequence[Shapes]) -> list[str]:
        """Return the names of the tensors to be shared whose shapes at two sites differ."""
        return [
            key
            for key, shape in shapes[other].items()
            if shapes[first].get(key, shape) != shape and (key in self.only or not self.only)
        ]

    def _refusal(
        self, sites: Sequence[Site], first: int, other: int, shapes: Sequence[Shapes]
    ) -> ModgraftError:
        """Return the error for two sites whose tensors differ, with what would work instead."""
        key = self._unequal(first, other, shapes)[0]
        by_name = Shared(self.module, group="name", only=self.only)
        groups = by_name._groups(sites)
        ways = []
        if not any(self._unequal(members[0], i, shapes) for members in groups for i in members):
            ways.append(repr(by_name))
        equal = tuple(k for k, n in shapes[first].items() if all(n == s.get(k) for s in shapes))
        if equal:
            ways.append(repr(Shared(self.module, group=self.group, only=equal)))
        return ModgraftError(
            f"{sites[first].label} and {sites[other].label} are to share {key}, which is "
            f"{shapes[first][key]} at the one and {shapes[other][key]} at the other; use "
            f"{' or '.join(ways) or 'sites of equal shape'}"
        )
