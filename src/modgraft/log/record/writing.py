"""Notes written whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from modgraft.core.errors import DataError, MissingFileError
from modgraft.core.files import whole


def create(path: Path, data: bytes) -> None:
    """Write a new file, whole; whoever comes second is refused.

    Raises:
        DataError: there is such a file already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(part)  # fails where the name is taken, at whatever moment
    except FileExistsError as error:
        raise DataError(
            "there is such a note already", file=path, remedy="Take another name, or add to it"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    _sync(path.parent)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> bytes:
    """Replace a file's content by ``change`` of it; what it holds then.

    A kill at any moment leaves the old file or the new one. Other processes that rewrite the same
    file wait; a program that does not wait, such as an editor, is noticed unless it saves in the
    very moment of the exchange. A symbolic link stays one, and the file keeps its permissions.

    Raises:
        MissingFileError: there is no such file.
        DataError: something else wrote to it meanwhile.
    """
    path = path.resolve()
    with _locked(path):
        data = path.read_bytes()
        new = change(data)
        if new == data:
            return data
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            left.unlink(missing_ok=True)  # by a process that was killed
        with whole(path) as part:
            part.write_bytes(new)
            if path.read_bytes() != data:
                raise DataError(
                    "it was changed by another program meanwhile, and is left as that program "
                    "wrote it", file=path, remedy="Look at it, and do this again",
                )  # fmt: skip
        _sync(path.parent)
    return new


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file itself locked: no second file is left lying beside it."""
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise MissingFileError(
                "there is no such note", file=path, remedy="modgraft log new NAME starts one"
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # whoever held it before may have put another file in its place
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                yield
                return


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
