"""Says whether a module's folder is what was saved, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from modgraft.core.errors import CheckpointError
from modgraft.store.card import CARD_FILE, Card
from modgraft.store.file import TensorFile, is_there, read_small
from modgraft.store.folder import FILE, README, native, temporaries
from modgraft.store.formats.base import found_in
from modgraft.store.readme import WRITTEN


@dataclass(frozen=True)
class Report:
    """What was found in a folder.

    Attributes:
        folder: where.
        whole: whether the modules can be loaded as they were saved: the file is complete, and
            card and tensors have the hashes that they were written with.
        names: the modules that were asked for when they were saved; none where no card can be read.
        hash: the card's, which tells one save from another; "" where there is none.
        problems: what is wrong and what to do about it, a text each. A folder can have some and be
            whole, where a file that is derived from the card, which nobody loads, is another one.
    """

    folder: Path
    whole: bool
    names: list[str] = field(default_factory=list)
    hash: str = ""
    problems: list[str] = field(default_factory=list)


def verify(folder: Path) -> Report:
    """Read everything in a module's folder, and say whether it is whole.

    Args:
        folder: one that ``host.save`` wrote, or another tool's.
    """
    problems, names, sha, whole = [], [], "", False
    try:
        if not is_there(folder / FILE) and found_in(folder) is not None:
            _check_finite(folder)
            return Report(folder, whole=True, problems=[f"{folder}: {OF_ANOTHER_TOOL}"])
        found = native(folder)
        names, sha = found.card.names, found.card.sha256 if found.card.tensors else ""
        found.read()
        whole = True
        problems += _beside(found.card, folder) if sha else [f"{folder}: {UNHASHED}"]
    except CheckpointError as error:
        problems.append(str(error))
    with suppress(OSError):  # no folder, or none that may be looked into: that was said
        problems += [
            f"{folder / name} is what a save that was killed, or is under way, has written; the "
            f"next save removes it"
            for name in sorted(temporaries(folder))
        ]
    return Report(folder, whole, names, sha, problems)


OF_ANOTHER_TOOL = (
    "it is another tool's, which keeps no hash, so that changed tensors cannot be told; all can be "
    "read and are finite"
)


def _check_finite(folder: Path) -> None:
    """Raise a CheckpointError for tensors of a folder that cannot be read, or hold NaN."""
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in TensorFile(path).tensors().items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{path}: {name} holds NaN or infinity")


UNHASHED = (
    "its format, the first one, has no hash, so that changed tensors cannot be told; host.load it "
    "and host.save it"
)


def _beside(card: Card, folder: Path) -> Iterator[str]:
    """Say which of the files that were written from a card are not its own."""
    checks: dict[str, Callable[[str], bool]] = {
        CARD_FILE: lambda text: Card.from_text(text, folder) == card,
        README: lambda text: card.sha256 in text or WRITTEN not in text,  # somebody's own page
    }
    for name, is_own in checks.items():
        try:
            own = is_own(read_small(folder / name).decode())
        except ValueError:  # ours, or of no UTF-8
            own = False
        if not own:
            yield _lags(folder / name)


def _lags(path: Path) -> str:
    return (
        f"{path} is not what the card in {FILE} says: a save was killed before it wrote it, or it "
        f"was changed; {FILE} alone is loaded, and the next save writes the others anew"
    )
