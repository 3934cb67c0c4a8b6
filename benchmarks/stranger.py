"""A stranger's path: a fresh clone, the README's commands, a module of one's own on one's own text.

    python -m benchmarks.stranger

The commands are read out of the README, so that they cannot differ from it. Each is printed with
the time it took; the whole is held to six commands and ten minutes. Installing needs a package
index.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_COMMANDS, MOST_SECONDS = 6, 600
MARK = "<!-- a stranger's path"


def commands(readme: str) -> list[str]:
    """Return the commands of the block behind the mark, without what is said beside them."""
    block = readme.split(MARK, 1)[1].split("```console\n", 1)[1].split("```", 1)[0]
    return [re.split(r"\s{2,}#", line)[0] for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE)]


def main() -> None:
    """Go the path in a temporary folder."""
    clone = f"git clone --quiet {ROOT} modgraft"
    path = [clone, *commands((ROOT / "README.md").read_text("utf-8"))]
    assert len(path) <= MOST_COMMANDS, f"{len(path)} commands"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        home.mkdir()
        environment = os.environ | {"XDG_DATA_HOME": str(home), "MODGRAFT_HUB": str(home / "hub")}
        environment.pop("PYTHONPATH", None)
        for number, command in enumerate(path):
            print(f"$ {command}", flush=True)
            start = time.monotonic()
            where = folder if number == 0 else Path(folder, "modgraft")
            done = subprocess.run(
                ["bash", "-ec", command], cwd=where, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
            lines = done.stdout.strip().splitlines()
            print("\n".join(f"    {line}" for line in lines[-4:]))
            print(f"    [{time.monotonic() - start:.0f} s]", flush=True)
            if done.returncode:
                sys.exit(f"it ended with {done.returncode}")
    took = time.monotonic() - began
    print(f"{len(path)} commands, {took / 60:.1f} minutes")
    if took > MOST_SECONDS:
        sys.exit("that is more than ten minutes")


if __name__ == "__main__":
    main()
