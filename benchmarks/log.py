"""The research log at ten thousand notes, and on the real ones: indexing, editing, asking.

The notes are generated: words of a made-up language by Zipf's law, ten blocks a note, events,
citations of a generated bibliography. Their vectors are drawn at random, since the time to search
does not depend on them and to make 100,000 takes long; a question's own vector is the model's.

    python -m benchmarks.log [--notes 10000]
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from benchmarks.show import Claim, add_output, show
from modgraft.log import Log, Query
from modgraft.log.index.vectors import VectorsOffError, package_folder

REAL = Path(__file__).parents[2] / "shared" / "data" / "notes"
WORDS, SOURCES, REPEATS = 20_000, 1_000, 40
STATUSES = ("", " -> _digging", " -> _full_read")


# -- generated notes -----------------------------------------------------------------------------


class Language:
    """Words of a made-up language, the n-th about 1/n as frequent as the first."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        made = dict[str, None]()
        while len(made) < WORDS:
            made["".join(self.random.choices(syllables, k=self.random.randint(2, 4)))] = None
        self.words = list(made)
        self.weights = [1 / (rank + 10) for rank in range(WORDS)]
        self.keys = [
            f"{self.words[i]}{self.words[-i - 1].title()}{2000 + i % 25}" for i in range(SOURCES)
        ]

    def sentence(self) -> str:
        """Eight to twenty-four words."""
        words = self.random.choices(self.words, self.weights, k=self.random.randint(8, 24))
        return f"{' '.join(words).capitalize()}."

    def note(self) -> str:
        """Ten blocks: two headings, a paragraph, four events with their lines."""
        key, other = self.random.sample(self.keys, 2)
        status = self.random.choice(STATUSES)
        return (
            f"## Context\n{self.sentence()}\n\n## Log\n"
            f"- [skim(@{key}){status}]\n  - {self.sentence()}\n"
            f"  - {self.sentence()} As in @{other}.\n"
            f"- [question -> {self.sentence()}]\n"
            f"- [lesson_learned]\n  - {self.sentence()}\n"
            f"- {self.sentence()} [eureka -> {self.sentence()}]\n"
        )

    def bibliography(self) -> str:
        """An entry for every key."""
        return "\n".join(
            f"@article{{{key}, title={{{self.sentence()}}}, author={{Doe, J.}}, year=2020}}"
            for key in self.keys
        )


def generate(folder: Path, notes: int, language: Language) -> None:
    """Write the notes, a hundred in each folder, and their bibliography."""
    for i in range(notes):
        inside = folder / f"{i // 100:03}"
        inside.mkdir(parents=True, exist_ok=True)
        (inside / f"{i:05}.md").write_text(language.note(), encoding="utf-8")
    (folder / "sources.bib").write_text(language.bibliography(), encoding="utf-8")


def draw_vectors(log: Log) -> None:
    """A random vector of unit length for every block, where the real ones would be kept."""
    import numpy as np

    vectors = log.vectors
    digests = [d for (d,) in log.database.rows("SELECT DISTINCT hash FROM blocks")]
    drawn = np.random.default_rng(0).standard_normal((len(digests), 384)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    vectors.save(dict(zip(digests, drawn, strict=True)))


# -- measuring -----------------------------------------------------------------------------------


def p50(run: Sequence[Callable[[], object]], repeats: int = REPEATS) -> float:
    """The median of single calls, in milliseconds; the first of each is not counted."""
    for each in run:
        each()
    times = []
    for i in range(repeats):
        began = time.perf_counter()
        run[i % len(run)]()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def peak() -> float:
    """The most memory that this process has had so far, in MiB."""
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (1 if sys.platform == "darwin" else 1024)
        / (1024 if sys.platform == "darwin" else 1)
    )


def queries(log: Log, keys: Sequence[str], words: Sequence[str]) -> list[Callable[[], object]]:
    """Structured queries of each kind, a page of results each."""
    asked = [
        Query(actions="skim", status="full_read", limit=20),
        Query(actions="question", status="open", newest=True, limit=20),
        Query(actions=("lesson_learned", "eureka"), text=words[0], limit=20),
        Query(text=f"{words[1]} {words[2]}", limit=20),
        Query(cites=keys[0], limit=20),
        Query(actions="skim", since="2020", until="2100", limit=20, offset=100),
    ]
    each = [lambda q=q: log.query(q) for q in asked]
    return [*each, lambda: log.backlinks(keys[1])]


def edited(log: Log, note: Path) -> float:
    """From the moment that a note was saved until a query finds what is new in it, in ms."""
    times = []
    for i in range(5):
        word = f"xylophone{i}"
        with note.open("a", encoding="utf-8") as file:
            file.write(f"- [eureka -> {word} it is]\n")
        began = time.perf_counter()
        log.index()
        (hit,) = log.query(actions="eureka", text=word)
        times.append(1000 * (time.perf_counter() - began))
        assert word in hit.text
    return statistics.median(times)


def generated(folder: Path, count: int) -> list[Claim]:
    """The claims about many notes."""
    language = Language()
    notes = folder / "notes"
    generate(notes, count, language)
    before = peak()
    log = Log.open(notes, index=folder / "log.sqlite")
    done = log.index()
    assert done.seen == done.parsed == count
    memory = peak()
    (blocks,) = log.database.rows("SELECT count(*) FROM blocks")[0]
    size = log.settings.index.stat().st_size / 2**20
    claims = [
        Claim(
            f"first index of {count:,} notes, {blocks:,} blocks", f"{done.seconds:.1f} s", "≤ 60 s"
        ),
        Claim("its peak memory (before it)", f"{memory:.0f} ({before:.0f}) MiB"),
        Claim("the index's file", f"{size:.0f} MiB"),
        Claim(
            "an edited note until it is found",
            f"{edited(log, notes / '000' / '00007.md'):.0f} ms",
            "≤ 200 ms",
        ),
    ]
    words = [language.words[i] for i in (900, 30, 60)]
    claims.append(
        Claim(
            "structured query, p50", f"{p50(queries(log, language.keys, words)):.1f} ms", "≤ 10 ms"
        )
    )
    sentences = [language.sentence() for _ in range(8)]
    free = [
        lambda s=s: log.ask(f"why {' '.join(s.split()[:6]).lower().rstrip('.')}?")
        for s in sentences
    ]
    claims.append(Claim("free question by words alone, p50", f"{p50(free):.1f} ms"))
    try:
        package_folder()
    except VectorsOffError as error:
        return [*claims, Claim("free question, p50", "not measured", "≤ 50 ms", str(error))]
    draw_vectors(log)
    claims.append(Claim("free question, words and vectors, p50", f"{p50(free):.1f} ms", "≤ 50 ms"))
    claims.append(Claim("peak memory with vectors and model", f"{peak():.0f} MiB"))
    return claims


def real(folder: Path) -> list[Claim]:
    """The claims about the real notes; none where they are not there."""
    if not (REAL / "zotero.bib").is_file():
        return []
    seconds = []
    for i in range(3):
        with Log.open(REAL, index=folder / f"real{i}" / "log.sqlite") as log:
            seconds.append(log.index().seconds)
    log = Log.open(REAL, index=folder / "real" / "log.sqlite")
    log.index()
    asked = queries(log, ("pfeifferModularDeepLearning2023",) * 2, ("fusion", "linear", "space"))
    free = [
        lambda q=q: log.ask(q)
        for q in (
            "why is one linear projection enough to connect vision and language?",
            "what makes training large models stable?",
            "does masking save compute?",
            "what is the danger of a single company owning models?",
            "why is a large code book a trade-off?",
            "which bottleneck should depend on the data?",
            "is retrieval better than knowledge in the weights?",
            "what is the cheapest way to adapt a model to a local task?",
            "why is multiple choice no real task?",
            "what is wrong with captions as visual features?",
            "how do adapters compare with sparse finetuning?",
            "what would people hosting parts of a network at home need?",
        )
    ]
    claims = [
        Claim(
            "first index of the 5 real notes, with 1,068 sources",
            f"{min(seconds):.2f} s",
            "≤ 0.5 s",
        ),
        Claim("structured query, p50", f"{p50(asked):.2f} ms", "≤ 2 ms"),
    ]
    try:
        log.index(vectors=True)
    except VectorsOffError as error:
        return [*claims, Claim("free question, p50", "not measured", "≤ 15 ms", str(error))]
    return [
        *claims,
        Claim("free question, words and vectors, p50", f"{p50(free):.1f} ms", "≤ 15 ms"),
    ]


def starting() -> list[Claim]:
    """How long the command line and the package take to be there, each in a process of its own."""
    command = (
        "import sys; sys.argv = ['modgraft', '--help']; from modgraft.cli.app import entry; entry()"
    )
    package = "import modgraft.log"
    public = "from modgraft.log import *"
    return [
        Claim("modgraft --help, best of ten", f"{started(command):.0f} ms", "≤ 300 ms"),
        Claim("import modgraft.log, best of ten", f"{started(package):.0f} ms", "≤ 150 ms"),
        Claim("all its public names, best of ten", f"{started(public):.0f} ms"),
    ]


def started(code: str, repeats: int = 10) -> float:
    """The shortest of so many processes, from their start to their end, in ms."""
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - begin)
    return 1000 * min(taken)


def table_of(title: str, claims: Sequence[Claim]) -> Table:
    """What was measured, beside what was asked."""
    table = Table(title=title)
    for name, justify in (("what", "left"), ("asked", "right"), ("measured", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for claim in claims:
        table.add_row(claim.what, claim.asked, claim.ratio)
    return table


def main() -> None:
    """Measure both, the many notes in a folder that is deleted afterwards."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--notes", type=int, default=10_000, help="how many to generate")
    parser.add_argument("--skip-real", action="store_true", help="leave the real notes out")
    add_output(parser)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        many = generated(Path(folder), options.notes)
        few = [] if options.skip_real else real(Path(folder))
    starts = starting()
    tables = [table_of(f"{options.notes:,} generated notes", many)]
    if few:
        tables.append(table_of("The real notes", few))
    tables.append(table_of("To start", starts))
    show(tables, [*many, *few, *starts], options)


if __name__ == "__main__":
    main()
