"""Names and lines of text in many languages, from the Unicode CLDR as Babel ships it.

A **name** is the word for a thing in a language: "Švýcarsko", "švýcarský frank". A **line** is
unlabelled text, which CLDR's patterns and supplementary data compose of names, dates and numbers:
"1 234,50 švýcarských franků", "uzbečtina (cyrilice, Uzbekistán)". Nothing is downloaded.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import date, time, timedelta
from functools import cache
from importlib import import_module
from typing import Any

from modgraft.core.errors import ModgraftError, UnknownNameError

KINDS = ("territory", "language", "currency", "unit", "zone")
"""The kinds of things to tell apart, without scripts, which mostly share a language's name."""

Thing = tuple[str, str]
"""A kind, or ``"script"``, and CLDR's code of the thing: ``("territory", "CH")``."""


@dataclass(frozen=True)
class Line:
    """A line of text, and the things that it mentions."""

    text: str
    things: frozenset[Thing]


def babel(part: str) -> Any:
    """Import a module of Babel.

    Raises:
        ModgraftError: Babel is not installed.
    """
    try:
        return import_module(f"babel.{part}")
    except ModuleNotFoundError as error:
        raise ModgraftError(
            "the names of languages, currencies, … are those of the package Babel; install it with "
            "`make setup`, or `pip install 'modgraft[recipes]'`"
        ) from error


def names(language: str, shared: bool = False) -> dict[Thing, str]:
    """Return the name of each thing in a language, without those that CLDR does not translate.

    Args:
        language: The language's code in CLDR, such as ``"cs"``.
        shared: Whether to include names that things of two kinds share.

    Raises:
        UnknownNameError: CLDR has no such language.
        ModgraftError: Babel is not installed.
    """
    found = _all_names(language)
    if shared:
        return dict(found)
    kinds: dict[str, set[str]] = {}
    for (kind, _), name in found.items():
        kinds.setdefault(name.casefold(), set()).add(kind)
    return {thing: name for thing, name in found.items() if len(kinds[name.casefold()]) == 1}


@cache
def _all_names(language: str) -> dict[Thing, str]:
    locale = _locale(language)
    root = {} if language == "root" else _all_names("root")
    tables = {
        "territory": locale.territories,
        "language": locale.languages,
        "script": locale.scripts,
        "currency": locale.currencies,
        "unit": {
            code: name.get("long") for code, name in locale._data["unit_display_names"].items()
        },
        "zone": {
            code: names["long"].get("standard") or names["long"].get("generic")
            for code, names in locale.meta_zones.items()
            if "long" in names
        },
    }
    found = {
        (kind, code): _clean(name)
        for kind, table in tables.items()
        for code, name in sorted(table.items())
        if isinstance(name, str) and re.search(r"[^\W\d_]{2}", name) and name != code
    }
    return {thing: name for thing, name in found.items() if root.get(thing) != name}


def _locale(language: str) -> Any:
    if language != "root" and language not in languages():
        raise UnknownNameError.among("language of CLDR", language, languages())
    return babel("core").Locale.parse(language)


@cache
def languages() -> tuple[str, ...]:
    """Return the codes of CLDR's languages."""
    codes = babel("localedata").locale_identifiers()
    return tuple(sorted(code for code in codes if "_" not in code and code != "root"))


def _clean(text: str) -> str:
    """Remove invisible marks of direction, and make all white space single blanks."""
    return " ".join(re.sub(r"[\u200e\u200f\u061c\ufeff]", "", text).split())


# -- text --------------------------------------------------------------------------------------


def lines(language: str, without: Collection[Thing] = (), seed: int = 0) -> list[Line]:
    """Return the unlabelled text of a language, without repeated lines.

    The lines are about locales, countries with the languages spoken there, cities with their
    countries, amounts of money and of units, times of day with their zones, dates and spans of
    time.

    Args:
        language: The language's code in CLDR.
        without: Things to leave out: no line is composed of them, or contains their names.
        seed: The seed of random amounts and dates.

    Raises:
        UnknownNameError: CLDR has no such language.
        ModgraftError: Babel is not installed.
    """
    locale, called, draw = _locale(language), _all_names(language), random.Random(seed)
    sources = (_locales, _spoken, _cities, _money, _amounts, _hours, _days)
    made = {line.text: line for source in sources for line in source(locale, called, draw)}
    hidden = {called[thing].casefold() for thing in without if thing in called}
    mention = _mention(hidden)
    return [
        line
        for line in made.values()
        if line.things.isdisjoint(without)
        and not (mention and mention.search(line.text.casefold()))
    ]


def _mention(words: Iterable[str]) -> re.Pattern[str] | None:
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)") if either else None


Called = dict[Thing, str]


def _line(text: str, *things: Thing) -> Line:
    return Line(_clean(text), frozenset(things))


def _locales(locale: Any, called: Called, draw: random.Random) -> Iterator[Line]:
    """Yield "uzbek (Cyrillic, Uzbekistan)" of each locale, and each language's likely one."""
    core = babel("core")
    tags = {*babel("localedata").locale_identifiers(), *core.get_global("likely_subtags").values()}
    for tag in sorted(tags):
        language, territory, script, *_ = core.parse_locale(tag)
        things = [("language", language), ("script", script or ""), ("territory", territory or "")]
        for details in ([things[1], things[2]], [things[1]], [things[2]]):
            if things[0] in called and all(thing in called for thing in details):
                inside = ", ".join(called[thing] for thing in details)
                yield _line(f"{called[things[0]]} ({inside})", things[0], *details)


def _spoken(locale: Any, called: Called, draw: random.Random) -> Iterator[Line]:
    """Yield "Switzerland: German 76%, French 39%": a country's languages, three at most."""
    spoken = babel("core").get_global("territory_languages")
    percent = babel("numbers").format_percent
    for code in sorted(spoken):
        place = ("territory", code)
        people = {("language", k): v["population_percent"] for k, v in spoken[code].items()}
        most = sorted((t for t in people if t in called), key=lambda t: -people[t])[:3]
        if place in called and most:
            shares = [f"{called[t]} {percent(people[t] / 100, locale=locale)}" for t in most]
            yield _line(f"{called[place]}: {', '.join(shares)}", place, *most)


def _cities(locale: Any, called: Called, draw: random.Random) -> Iterator[Line]:
    """Yield "Germany Time (Berlin)": CLDR's region format of a zone and its city."""
    pattern = locale.zone_formats["region"]
    for code, zones in sorted(babel("core").get_global("territory_zones").items()):
        place = ("territory", code)
        for zone in sorted(zones) if place in called else ():
            city = locale.time_zones.get(zone, {}).get("city")
            if city:
                yield _line(pattern.replace("%s", f"{called[place]} ({city})"), place)


def _money(locale: Any, called: Called, draw: random.Random) -> Iterator[Line]:
    """Yield "1,234.50 Swiss francs"."""
    money = babel("numbers").format_currency
    for thing in sorted(t for t in called if t[0] == "currency"):
        amount = draw.choice([draw.randint(2, 99), draw.randint(100, 99_999) / 100])
        yield _line(money(amount, thing[1], locale=locale, format_type="name"), thing)


def _amounts(locale: Any, called: Called, draw: random.Random) -> Iterator[Line]:
    """Yield "3 kilometers per hour"."""
    amount = babel("units").format_unit
    for thing in sorted(t for t in called if t[0] == "unit"):
        for number in (draw.randint(2, 20), draw.randint(21, 999)):
            text = amount(number, thing[1], locale=locale)
            if thing[1] not in text:  # CLDR has a name of it and no pattern
                yield _line(text, thing)


def _hours(locale: Any, called: Called, draw: random.Random) -> Iterator[Line]:
    """Yield "14:30:00 Central European Time": CLDR's full format of a time of day."""
    dates = babel("dates")
    pattern = locale.time_formats["full"].pattern
    for thing in sorted(t for t in called if t[0] == "zone"):
        clock = time(draw.randrange(24), draw.randrange(60), draw.randrange(60))
        shown = [dates.format_time(clock, p, locale=locale) for p in pattern.split("zzzz")]
        yield _line(called[thing].join(shown), thing)


def _days(locale: Any, called: Called, draw: random.Random) -> Iterator[Line]:
    """Yield "Monday, March 4, 2024" and "3 days ago"."""
    dates = babel("dates")
    for _ in range(150):
        day = date(1950, 1, 1) + timedelta(draw.randrange(36_500))
        yield _line(dates.format_date(day, draw.choice(["full", "long"]), locale=locale))
    for _ in range(60):
        span = timedelta(seconds=draw.choice([-1, 1]) * int(10 ** draw.uniform(1, 8)))
        yield _line(dates.format_timedelta(span, add_direction=True, locale=locale))


def counts(things: Iterable[Thing]) -> dict[str, int]:
    """Count the things of each of :data:`KINDS`."""
    found = Counter(kind for kind, _ in things)
    return {kind: found[kind] for kind in KINDS}
