"""The folder of a recipe's run: held by one command at a time, and emptied for a fresh run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modgraft.core.errors import CheckpointError, DataError
from modgraft.core.files import LOCK, Lock, held, read_json, write_json

CARD = "run.json"
"""What every run's folder has, and no other folder."""


@contextmanager
def run_folder(folder: Path, *, fresh: bool) -> Iterator[Lock]:
    """Hold the folder of a run in a `with` block, before anything in it is read or written.

    Args:
        folder: The folder; it is made where there is none.
        fresh: Whether to delete the run in it first.

    Raises:
        ModgraftError: Another process has it.
        DataError: The folder holds other things than a run, among which a run's would be lost, and
            they with the run by ``fresh``.
    """
    _contents(folder)
    with held(folder, "at work") as lock:
        if fresh:
            empty(folder)
        yield lock


def empty(folder: Path) -> None:
    """Delete the run in a folder that is held."""
    for path in _contents(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _contents(folder: Path) -> list[Path]:
    """Return what is in a run's folder, its card last, so that a killed deletion can go on."""
    inside = [p for p in folder.iterdir() if p.name != LOCK] if folder.is_dir() else []
    theirs = [path.name for path in inside if not path.name.startswith(".")]
    if theirs and not (folder / CARD).is_file():
        raise DataError(
            f"this folder holds no run, and other things ({', '.join(sorted(theirs)[:3])}, …): a "
            f"run has a folder to itself, which --fresh deletes", file=folder,
            remedy="Take another --run, a new folder or an empty one",
        )  # fmt: skip
    return sorted(inside, key=lambda path: path.name == CARD)


def write_card(folder: Path, card: Mapping[str, Any], what: str) -> None:
    """Write what a run is, or see that the one in its folder is the same.

    Args:
        folder: The folder, which is held.
        card: What has to be the same when the run goes on, as JSON.
        what: What the run is, for the message.

    Raises:
        CheckpointError: The folder holds another run; it says what differs.
        DataError: The card there is damaged.
    """
    path = folder / CARD
    remedy = "take another folder, or fresh=True, which deletes this one"
    if path.is_file():
        before = read_json(path, what=what, remedy=remedy)
        if differs := [name for name in {**before, **card} if before.get(name) != card.get(name)]:
            shown = "; ".join(f"{n}: {before.get(n)!r}, now {card.get(n)!r}" for n in differs)
            raise CheckpointError(f"{folder} holds another run, no such {what} ({shown}); {remedy}")
    write_json(path, card)
