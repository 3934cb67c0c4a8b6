"""Every benchmark, each in a process of its own: one table of all ratios, then each one's own.

python -m benchmarks [--out benchmarks.md] [--only train_step --only multi_module]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.show import Claim, as_markdown, read_claims, table_of

BENCHMARKS = (
    "train_step",
    "train_grid",
    "multi_module",
    "side_by_side",
    "merging",
    "store",
    "mmcot",
    "methods",
    "log",
)


def run(name: str) -> tuple[str, list[Claim]]:
    """What ``python -m benchmarks.NAME --markdown`` prints, and the ratios in it.

    Raises:
        subprocess.CalledProcessError: if it ends with an error, which it has printed.
    """
    with TemporaryDirectory() as folder:
        claims = Path(folder) / "claims.json"
        command = [
            sys.executable,
            "-m",
            f"benchmarks.{name}",
            "--markdown",
            "--claims",
            str(claims),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.strip(), read_claims(claims)


def main() -> None:
    """Run those that are asked for, and write the page after each."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, help="the page to write; left out: the terminal alone")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="one of them; repeat")
    options = parser.parse_args()
    page, claims = "", []
    for name in options.only or BENCHMARKS:
        print(f"{name} …", file=sys.stderr, flush=True)
        text, own = run(name)
        page += f"\n## {name}\n\n{text}\n"
        claims += [(name, claim) for claim in own]
        whole = f"# Benchmarks\n\n{as_markdown(table_of(claims))}\n{page}"
        if options.out is not None:  # a later one may fail
            options.out.write_text(whole, encoding="utf-8")
    print(whole)


if __name__ == "__main__":
    main()
