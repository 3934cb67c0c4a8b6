"""A task of real text that needs no network: which part of the library a docstring describes.

Ten classes, the text read from the running interpreter, so its numbers belong to one version of
Python. Nothing leaks from training to test: the methods of one class, aliases of one object and
docstrings that are nearly the same are all on one side, and the names of the object, its class and
its module are masked in its text.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sklearn.feature_extraction.text import CountVectorizer

#: class → the modules whose docstrings are its examples
CLASSES: dict[str, str] = {
    "text": "string re textwrap difflib codecs gettext locale shlex pprint reprlib csv "
    "configparser json html unicodedata",
    "numbers": "math cmath decimal fractions random statistics numbers",
    "time": "datetime time calendar zoneinfo sched timeit",
    "structures": "collections heapq bisect array weakref types enum dataclasses graphlib copy "
    "functools itertools contextlib",
    "files": "posixpath pathlib shutil tempfile glob fnmatch io fileinput filecmp zipfile tarfile "
    "gzip bz2 lzma zlib os stat",
    "network": "socket ssl http.client http.server http.cookies http.cookiejar urllib.parse "
    "urllib.request urllib.robotparser ftplib smtplib imaplib poplib socketserver xmlrpc.client "
    "xmlrpc.server ipaddress",
    "markup": "email.message email.header email.charset email.utils email.policy email.generator "
    "email.headerregistry email.parser email._policybase email._header_value_parser mailbox "
    "mimetypes html.parser xml.dom.minidom xml.etree.ElementTree xml.sax.handler xml.sax.saxutils "
    "xml.sax.xmlreader plistlib",
    "concurrency": "threading queue multiprocessing.pool multiprocessing.managers "
    "multiprocessing.process multiprocessing.context multiprocessing.shared_memory "
    "concurrent.futures._base concurrent.futures.thread concurrent.futures.process asyncio.events "
    "asyncio.base_events asyncio.tasks asyncio.futures asyncio.locks asyncio.queues "
    "asyncio.streams asyncio.transports asyncio.protocols asyncio.runners subprocess signal "
    "contextvars selectors",
    "code": "ast inspect dis tokenize symtable importlib importlib.abc importlib.util "
    "importlib.metadata pkgutil traceback typing code codeop pyclbr linecache runpy sysconfig",
    "testing": "unittest.case unittest.mock unittest.suite unittest.loader unittest.result "
    "unittest.runner doctest pdb bdb profile cProfile pstats trace tracemalloc logging "
    "logging.handlers logging.config warnings faulthandler",
}
NAMES = tuple(CLASSES)
#: examples a class has at most, and how they are divided
SHARES = {"train": 150, "validation": 30, "test": 60}
#: the fewest words of a docstring, and from which share of common words two are alike
WORDS, ALIKE = 6, 0.6


@dataclass(frozen=True)
class Example:
    """One docstring: its masked text, its class, and the object it belongs to."""

    text: str
    label: int
    module: str
    name: str

    @property
    def owner(self) -> str:
        """What must not be split: the class an object is in, or the object."""
        return f"{self.module}.{self.name.partition('.')[0]}"


def examples() -> list[Example]:
    """Return every docstring of at least six words, each object and each text once.

    A text that stands in two classes says nothing of either, and is left out.
    """
    found: dict[str, Example] = {}
    classes: dict[str, set[int]] = {}
    for label, names in enumerate(CLASSES.values()):
        for module in names.split():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some names are deprecated
                docstrings = list(_docstrings(module))
            for name, doc in docstrings:
                text = _masked(doc, module, name)
                if len(re.findall(r"[^\W_]+", text)) >= WORDS:
                    found.setdefault(_normal(text), Example(text, label, module, name))
                    classes.setdefault(_normal(text), set()).add(label)
    return [example for key, example in found.items() if len(classes[key]) == 1]


def _docstrings(module: str) -> Iterator[tuple[str, str]]:
    """Yield qualified name and docstring of what ``module`` defines, in the order of names."""
    for name, thing in sorted(vars(importlib.import_module(module)).items()):
        home = str(getattr(thing, "__module__", None)).lstrip("_")
        if home != module or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue  # of another module, or a plain value
        if isinstance(thing.__doc__, str):
            yield name, thing.__doc__
        for inner, member in sorted(vars(thing).items()) if inspect.isclass(thing) else ():
            routine = inspect.isroutine(member) or inspect.isdatadescriptor(member)
            doc = getattr(member, "__doc__", None)
            inherited = doc == getattr(getattr(object, inner, None), "__doc__", None)
            if routine and isinstance(doc, str) and not inherited:
                yield f"{name}.{inner}", doc


def _masked(doc: str, module: str, name: str) -> str:
    """Return the text on one line, without the names that would give its module away."""
    own = {part.strip("_") for part in (*module.split("."), *name.split("."))} - {""}
    names = "|".join(sorted(map(re.escape, own), key=len, reverse=True))
    text = re.sub(rf"(?<![^\W_])_*(?:{names})_*(?![^\W_])", " ", inspect.cleandoc(doc), flags=re.I)
    return " ".join(text.split())


def _normal(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _groups(found: list[Example]) -> list[list[Example]]:
    """Return what must stay together: one owner, or texts most of whose words are the same."""
    root = list(range(len(found)))

    def of(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    first: dict[str, int] = {}
    for i, example in enumerate(found):
        root[of(i)] = of(first.setdefault(example.owner, i))
    counter = CountVectorizer(binary=True, token_pattern=r"[^\W_]+")  # noqa: S106
    words: Any = counter.fit_transform([e.text for e in found])
    words = words.astype("int32")
    sizes = words.sum(axis=1).A1
    shared = (words @ words.T).tocoo()  # how many words two texts have in common
    either = sizes[shared.row] + sizes[shared.col] - shared.data
    alike = (shared.row < shared.col) & (shared.data >= ALIKE * either)
    for i, j in zip(shared.row[alike].tolist(), shared.col[alike].tolist(), strict=True):
        root[of(i)] = of(j)
    members: dict[int, list[Example]] = {}
    for i, example in enumerate(found):
        members.setdefault(of(i), []).append(example)
    return list(members.values())


def split(seed: int = 0) -> dict[str, list[Example]]:
    """Return ``train``, ``validation`` and ``test``: whole groups, the largest in train, cut to
    size."""
    rng = random.Random(seed)
    groups = _groups(examples())
    rng.shuffle(groups)
    have = Counter(e.label for g in groups for e in g)
    parts: dict[str, list[Example]] = {part: [] for part in SHARES}
    total = sum(SHARES.values())
    count: Counter[tuple[str, int]] = Counter()
    for group in sorted(groups, key=len, reverse=True):  # equal sizes stay shuffled
        label = Counter(e.label for e in group).most_common(1)[0][0]
        wanted = min(1.0, have[label] / total)  # of a class too small for its shares
        room = {p: wanted * n - count[p, label] for p, n in SHARES.items()}
        fits = [p for p in ("test", "validation") if len(group) <= min(8, room[p])]
        part = max(fits, key=lambda p: room[p] / SHARES[p], default="train")
        parts[part] += group
        count.update((part, e.label) for e in group)
    for part, chosen in parts.items():
        rng.shuffle(chosen)
        kept: Counter[int] = Counter()
        parts[part] = [e for e in chosen if _count(kept, e.label) <= SHARES[part]]
    return parts


def _count(counter: Counter[int], label: int) -> int:
    counter[label] += 1
    return counter[label]


def majority(rows: list[Example]) -> float:
    """Return the accuracy of always naming the commonest class."""
    return Counter(e.label for e in rows).most_common(1)[0][1] / len(rows)
