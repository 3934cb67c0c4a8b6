"""The real notes, and copies of them as a git repository with commits at given dates."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NOTES = Path(__file__).parents[3] / "shared" / "data" / "notes"
needs_notes = pytest.mark.skipif(
    not (NOTES / "zotero.bib").is_file(), reason=f"no real notes at {NOTES}"
)


def copy_notes(folder: Path, *names: str) -> Path:
    """The real notes and their bibliography, or some of them, in a folder of the test's own."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in NOTES.iterdir():
        if path.is_file() and (not names or path.name in names):
            shutil.copyfile(path, folder / path.name)
    return folder


def git(folder: Path, *arguments: str, at: str | None = None) -> str:
    """Run git in ``folder``, as someone, at a given time."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    who = {
        f"GIT_{role}_{what}": "a@b.c"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    when = {"GIT_AUTHOR_DATE": at, "GIT_COMMITTER_DATE": at} if at else {}
    none = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env=own | who | when | none, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def commit(folder: Path, at: str, message: str = "notes") -> None:
    """Commit everything in ``folder`` at a given time."""
    if not (folder / ".git").exists():
        git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message, at=at)
