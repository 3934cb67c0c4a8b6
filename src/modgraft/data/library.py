"""Docstrings, signatures and names of the standard library.

This is real text that needs no download. It depends on the version of Python, and so do figures
that are measured on it. It does not depend on what else is imported: other packages add to the
standard library and replace parts of it, so an interpreter without them reads it, which runs this
file.
"""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

MODULES = (
    "argparse ast asyncio.events asyncio.locks asyncio.queues asyncio.streams asyncio.tasks base64 "
    "bdb bisect calendar cmd code codecs collections concurrent.futures.thread configparser "
    "contextlib copy csv ctypes dataclasses datetime decimal difflib dis doctest email.header "
    "email.message email.policy email.utils enum filecmp fileinput fnmatch fractions ftplib "
    "functools getpass gettext glob gzip hashlib heapq hmac html html.parser http.client "
    "http.cookiejar http.cookies http.server imaplib importlib.abc importlib.metadata "
    "importlib.util inspect io ipaddress itertools json linecache locale logging "
    "logging.handlers lzma mailbox math mimetypes modulefinder multiprocessing.managers "
    "multiprocessing.pool netrc numbers operator optparse os pathlib pdb pickletools pkgutil "
    "platform plistlib poplib posixpath pprint profile pstats pyclbr queue quopri random re "
    "reprlib sched secrets selectors shelve shlex shutil signal smtplib socket socketserver "
    "sqlite3 ssl stat statistics string struct subprocess symtable sysconfig tarfile tempfile "
    "textwrap threading time timeit tokenize trace traceback tracemalloc types typing "
    "unittest.case unittest.mock urllib.parse urllib.request urllib.robotparser uuid warnings wave "
    "weakref xml.dom.minidom xml.etree.ElementTree xml.sax.handler xmlrpc.client zipfile zipimport"
)


class Parameter(NamedTuple):
    """A parameter's name, and its default: None without one, ``...`` if it is no plain value."""

    name: str
    default: str | None


@cache
def docstrings() -> tuple[str, ...]:
    """Return all docstrings, each on one line, sorted and without repetitions."""
    found = {" ".join(doc.split()) for _, doc, _ in _documented_objects()}
    return tuple(sorted(found - {""}))


@cache
def signatures() -> dict[str, tuple[Parameter, ...]]:
    """Return name → parameters of every function and method; ``*args`` keep their star."""
    found = {name: own for name, _, own in _documented_objects() if own is not None}
    return dict(sorted(found.items()))


@cache
def names() -> tuple[str, ...]:
    """Return all names of functions, methods, classes and parameters, sorted."""
    own = {name.rpartition(".")[2] for name, _, _ in _documented_objects()}
    return tuple(sorted(own | {p.name for params in signatures().values() for p in params}))


@cache
def _documented_objects() -> tuple[tuple[str, str, tuple[Parameter, ...] | None], ...]:
    """Return the qualified name, the docstring and the parameters of everything that is defined."""
    alone = [sys.executable, "-I", "-S", str(Path(__file__))]  # without packages
    read = subprocess.run(alone, check=True, capture_output=True, encoding="ascii")  # noqa: S603
    return tuple(
        (name, doc, None if own is None else tuple(Parameter(*p) for p in own))
        for name, doc, own in json.loads(read.stdout)
    )


# -- in that interpreter -------------------------------------------------------------------------


def _read() -> list[tuple[str, str, list[Parameter] | None]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some names warn when they are read
        found = [each for module in MODULES.split() for each in _members(module)]
    return [(name, doc, _parameters(thing)) for name, thing, doc in found]


def _parameters(thing: Any) -> list[Parameter] | None:
    if not inspect.isroutine(thing):
        return None
    try:
        return [_parameter(p) for p in inspect.signature(thing).parameters.values()]
    except (ValueError, TypeError):
        return None  # written in C, without a signature


def _parameter(p: inspect.Parameter) -> Parameter:
    star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    # other defaults print addresses, or sets in random order, which differ from run to run
    plain = isinstance(p.default, str | bytes | int | float | None) and not isinstance(
        p.default, Enum
    )
    default = None if p.default is p.empty else repr(p.default) if plain else "..."
    return Parameter(star + p.name, default)


def _members(module: str) -> Iterator[tuple[str, Any, str]]:
    for name, thing in sorted(vars(importlib.import_module(module)).items()):
        if str(getattr(thing, "__module__", None)).lstrip("_") != module:
            continue  # another module defines it
        yield f"{module}.{name}", thing, _doc(thing)
        for inner, member in sorted(vars(thing).items()) if inspect.isclass(thing) else ():
            own = getattr(member, "__func__", member)
            inherited = _doc(own) and _doc(own) == _doc(getattr(object, inner, None))
            if (inspect.isroutine(own) or isinstance(own, property)) and not inherited:
                yield f"{module}.{name}.{inner}", own, _doc(own)


def _doc(thing: object) -> str:
    doc = getattr(thing, "__doc__", None)
    return doc if isinstance(doc, str) else ""


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_read()))
