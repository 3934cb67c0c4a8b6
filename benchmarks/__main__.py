"""Every benchmark, each in a process of its own, its tables one after the other on one page.

python -m benchmarks [--out benchmarks.md] [--only train_step --only multi_module]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("train_step", "multi_module", "side_by_side", "mmcot", "methods")


def run(name: str) -> str:
    """What ``python -m benchmarks.NAME --markdown`` prints.

    Raises:
        subprocess.CalledProcessError: if it ends with an error, which it has printed.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", "--markdown"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    """Run those that are asked for, and write the page after each."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, help="the page to write; left out: the terminal alone")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="one of them; repeat")
    options = parser.parse_args()
    page = "# Benchmarks\n"
    for name in options.only or BENCHMARKS:
        print(f"{name} …", file=sys.stderr, flush=True)
        page += f"\n## {name}\n\n{run(name).strip()}\n"
        if options.out is not None:  # a later one may fail
            options.out.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
