"""The table of actions: the names that events may have, and what they mean.

Case does not matter. The table is extended in `pyproject.toml`; a new row is an action with its
other spellings:

    [tool.modgraft.log.actions]
    experiment = ["exp", "ran"]
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from modgraft.core.errors import ModgraftError

NAME = re.compile(r"[^\W\d]\w*(?:[ /-]\w+){0,3}")
LONGEST_NAME = 40
_CACHED = 4096  # unknown spellings whose nearest action is kept


@dataclass(frozen=True, slots=True)
class Action:
    """One row of the table: a name, its meaning, and other spellings of the name."""

    name: str
    meaning: str
    aliases: tuple[str, ...] = ()


_ROWS = (
    Action("skim", "is this source worth my time?"),
    Action("read", "study it"),
    # The oldest notes refer to a source like this; newer ones just cite it. It is no skim: the
    # source need not have been looked at.
    Action("retrieve", "a source called to mind; now written @key"),
    Action("code", "something was written"),
    Action("question", "something to find out"),
    Action("eureka", "an idea"),
    Action("hypothesize", "what may be so", ("hypothesis",)),
    Action("lesson_learned", "what to keep", ("lesson", "lessons_learned", "lesson learned")),
    Action("soliloquy", "thinking aloud"),
    Action("critique", "what is wrong with it"),
    Action("interrupt", "something broke in"),
    Action("calculate", "arithmetic"),
    Action("ChatGPT", "asked of an assistant"),
    Action("BingChat", "asked of an assistant"),
    Action("blog", "published"),
    Action("file_github_issue", "reported"),
    Action("start", "a project begins"),
    Action("return", "a project ends"),
    Action("context_switch_to", "another project is taken up"),
    Action("context_switch_from", "a project is left for another"),
)


@dataclass(frozen=True)
class Actions:
    """A table of actions, looked up by any spelling of their names."""

    rows: tuple[Action, ...] = _ROWS
    _by_name: dict[str, Action] = field(init=False, repr=False, compare=False)
    _near: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name: dict[str, Action] = {}
        for row in self.rows:
            for name in (row.name, *row.aliases):
                other = by_name.setdefault(name.casefold(), row)
                if other is not row:
                    raise ModgraftError(
                        f"[tool.modgraft.log.actions]: {name!r} means {other.name!r} already and "
                        f"cannot mean {row.name!r} too; choose another spelling"
                    )
        object.__setattr__(self, "_by_name", by_name)

    def __iter__(self) -> Iterator[Action]:
        return iter(self.rows)

    def find(self, written: str) -> Action | None:
        """Return the action with this spelling, or None."""
        return self._by_name.get(written.casefold())

    def nearest(self, written: str) -> Action | None:
        """Return the action that an unknown spelling most likely misspells, or None."""
        name = written.casefold()
        if name not in self._near:
            if len(self._near) >= _CACHED:
                self._near.clear()
            self._near[name] = difflib.get_close_matches(name, self._by_name, n=1, cutoff=0.75)
        close = self._near[name]
        return self._by_name[close[0]] if close else None

    def extended(self, table: Mapping[str, object]) -> Actions:
        """Return this table with the rows of `[tool.modgraft.log.actions]` added.

        A name that exists already gets the new spellings in addition.

        Raises:
            ModgraftError: a value that is no list of names, or a spelling that means two things.
        """
        if not table:
            return self
        rows = {row.name: row for row in self.rows}
        for name, spellings in table.items():
            if not isinstance(spellings, Iterable) or isinstance(spellings, (str, Mapping)):
                raise ModgraftError(
                    f"[tool.modgraft.log.actions] {name} = {spellings!r}: not a list of other "
                    f'spellings; write {name} = ["…"], or {name} = [] if there are none'
                )
            names = tuple(spellings)
            for one in (name, *names):
                if not isinstance(one, str) or not NAME.fullmatch(one) or len(one) > LONGEST_NAME:
                    raise ModgraftError(
                        f"[tool.modgraft.log.actions] {name} = {spellings!r}: no event can be "
                        f"called {one!r}; a name is up to four words of letters, digits and _, "
                        f"with a space, - or / between"
                    )
            old = rows.get(name, Action(name, "of this project"))
            new = tuple(one for one in names if one not in old.aliases)
            rows[name] = Action(name, old.meaning, (*old.aliases, *map(str, new)))
        return Actions(tuple(rows.values()))


ACTIONS = Actions()
