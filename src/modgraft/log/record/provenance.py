"""Where a run comes from: command, commit, versions, moment. None of it is needed to run."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("modgraft", "torch", "transformers", "numpy")
"""Whose versions a note states, where they are installed; nothing is imported for it."""

PATIENCE = 10.0
"""Seconds that git may take."""


def moment() -> str:
    """Now, to the second, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def command() -> str:
    """The command line of this process, by the program's name and not its path."""
    program, *arguments = sys.argv or ["python"]
    name = Path(program).name
    if name in ("", "-", "-c"):
        return "python"
    if name == "ipykernel_launcher.py":  # whose arguments are a path of the machine's
        return "a notebook"
    if name == "__main__.py":
        name = f"python -m {Path(program).parent.name}"
    return " ".join([name, *map(shlex.quote, arguments)])


def commit() -> str:
    """The commit of the folder one works in, and whether anything differs from it."""
    found = _git("rev-parse", "HEAD")
    if found is None:
        return "not known: git sees no repository with a commit here"
    changed = _git("status", "--porcelain", "--untracked-files=no")
    if changed is None:
        return f"{found[:12]}, and git did not say whether the tree differs from it"
    files = len(changed.splitlines())
    what = "1 file" if files == 1 else f"{files} files"
    return f"{found[:12]}, " + (f"with changes in {what}" if files else "tree clean")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions(names: Sequence[str] = PACKAGES) -> str:
    """Python's version and those of the packages."""
    found = [f"Python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def lasted(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
