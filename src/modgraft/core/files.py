"""Reading JSON with errors that say where, and writing files whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from modgraft.core.errors import CheckpointError, DataError, MissingFileError, ModgraftError


def cache() -> Path:
    """Return the folder of what was fetched: ``$XDG_CACHE_HOME/modgraft``, else in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "modgraft"


def in_bytes(size: int) -> str:
    """Write a number of bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:,.3g} GB"


def folder_path(folder: object, what: str) -> Path:
    """Return the path of a folder that may be written.

    Args:
        folder: What was given.
        what: What takes it, for the message.

    Raises:
        ModgraftError: It is no path, or a file is where a folder would have to be.
    """
    name = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
    if not isinstance(name, str) or "\0" in name:
        raise ModgraftError(
            f"{what} takes the path of a folder, a str or a pathlib.Path, and got {folder!r:.80}"
        )
    path = Path(name)
    try:
        for each in (path, *path.parents):
            if each.exists() and not each.is_dir():
                raise ModgraftError(f"{what}: {each} is a file, and no folder; choose another path")
    except OSError as error:  # no permission, or a name that is too long
        raise ModgraftError(
            f"{what}: {name!r:.200} cannot be reached ({error.strerror}); choose another path"
        ) from error
    return path


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name the folder, and what to do, where something cannot be written in a `with` block.

    Raises:
        ModgraftError: The system refused, for want of room or of permission for instance.
    """
    try:
        yield
    except OSError as error:
        raise ModgraftError(
            f"{folder} cannot be written to ({error.strerror or error}); what was there is as it "
            f"was: make room, or see to the permissions, or choose another folder"
        ) from error


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, which takes its place when the block ends without error.

    What was at `path` before stays until then, and for good if the block fails; no half-written
    file is ever seen under the real name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        # mkstemp's 0600 is for secrets: this is an ordinary file, or like the one before it
        part.chmod(path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~mask)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, *names: str, wait: bool = False) -> Iterator[None]:
    """Hold a folder for writing in a `with` block; it is made where there is none.

    What a killed process left half-written is removed: nobody else writes now.

    Args:
        folder: The folder.
        names: The files in it that `whole` writes.
        wait: Whether to wait for another that is writing, and not to raise.

    Raises:
        ModgraftError: Another process, or thread, is writing there, or it cannot be written to.
    """
    with writing(folder), _locked(folder, wait):
        for name in names:
            for left in folder.glob(f".{name}.????????.part"):
                left.unlink()
        yield


@contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise ModgraftError(
                f"another process is writing to {folder}: wait for it, or give another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


LOCK = ".lock"
"""The file in a run's folder that is locked while the run is under way, and then removed."""


class Lock:
    """The lock of a folder, which holds until the last process that has it has ended.

    A process that `multiprocessing` starts may be given it, and then has it too.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Callable[..., Lock], tuple[Any, ...]]:
        from multiprocessing.reduction import DupFd

        return _received, (DupFd(self._file.fileno()),)


def _received(sent: Any) -> Lock:
    return Lock(os.fdopen(sent.detach(), "rb"))


@contextmanager
def held(folder: Path, what: str) -> Iterator[Lock]:
    """Hold a folder for one run in a `with` block; it is made where there is none.

    The system ends the lock with the process, however that ends.

    Args:
        folder: The folder.
        what: What the run does in it, for the message that another one gets.

    Raises:
        ModgraftError: Another run has the folder; it names the folder and the process.
    """
    path = folder / LOCK
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                with file:
                    file.seek(0)
                    who = file.read().decode(errors="replace")
                raise ModgraftError(
                    f"another process is {what} in {folder}{f' ({who})' if who else ''}: wait "
                    f"until it has ended, or give another folder"
                ) from error
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
            file.close()  # whoever held it has just removed it
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        file.truncate(0)
        file.write(f"process {os.getpid()}: {command:.200}".encode(errors="replace"))
        file.flush()
    try:
        yield Lock(file)
    finally:
        path.unlink(missing_ok=True)
        file.close()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside `target` which becomes it when the block ends without an error.

    What a killed process left of an earlier one is removed.

    Args:
        target: A folder that is not there yet, or is empty.

    Raises:
        ModgraftError: `target` holds something or cannot be written, or another process is at it.
    """
    target = target.absolute()
    part = target.with_name(f".{target.name}.part")
    with writing(target):
        _check_free(target)
        with _locked(part, wait=False):
            _check_free(target)  # who held `part` until now has renamed it
            try:
                for left in part.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                yield part
                for path in (*part.rglob("*"), part):
                    sync(path)
                part.rename(target)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
        sync(target.parent)


@contextmanager
def together(folder: Path, is_own: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """Give a folder in `folder`, whose files take their places when the block ends without error.

    All of them are written before any is moved. A file of JSON says what the others are: the old
    ones are removed first and the new ones are moved last, that of `folder` itself at the very end,
    so that nobody finds a mixture of two. Where a process is killed as it moves them,
    :func:`finish` moves the rest.

    Args:
        folder: Where the files go; it is made where there is none, and its other files stay.
        is_own: Whether a folder that is not empty may be written to.
        what: What one that may not holds, for the message.

    Raises:
        CheckpointError: `folder` holds other things.
        ModgraftError: Another process is writing there, or it cannot be written to.
    """
    part, ready = folder / ".modgraft.part", folder / _READY
    with locked(folder):
        _move(ready)
        shutil.rmtree(part, ignore_errors=True)
        if any(folder.iterdir()) and not is_own(folder):
            raise CheckpointError(f"{folder} is there and holds {what}; choose another folder")
        part.mkdir()
        try:
            yield part
            for path, place in _moves(part):
                if place.is_dir():
                    raise CheckpointError(
                        f"{place} is a folder, and a file is to be written there; move it away, or "
                        f"choose another folder. What was there is as it was"
                    )
                if place.exists():
                    path.chmod(place.stat().st_mode & 0o7777)
                sync(path.parent)
            part.rename(ready)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _move(ready)


_READY = ".modgraft.ready"


def finish(folder: Path) -> None:
    """Move to their places the files of a folder whose writer was killed while it did that.

    Raises:
        ModgraftError: Another process is writing there, or it cannot be written to.
    """
    if (folder / _READY).is_dir():
        with locked(folder):
            _move(folder / _READY)


def _move(ready: Path) -> None:
    """Move the files in a folder, if it is there, to their places, and remove it."""
    moves = _moves(ready)
    for _, place in reversed(moves):
        if place.suffix == ".json":
            place.unlink(missing_ok=True)
    for path, place in moves:
        place.parent.mkdir(exist_ok=True)
        path.replace(place)
    if ready.is_dir():
        for each in {place.parent for _, place in moves} | {ready.parent}:
            sync(each)
        shutil.rmtree(ready)


def _moves(part: Path) -> list[tuple[Path, Path]]:
    """Return each file in a folder and its place beside the folder, files of JSON at the end."""
    files = [path for path in part.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (path.suffix == ".json", -len(path.parts)))
    return [(path, part.parent / path.relative_to(part)) for path in files]


def _check_free(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise ModgraftError(f"{folder} is there and not empty; choose another folder")


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` to `path` as JSON, whole or not at all; NaN is refused, missing is null."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def is_file(path: str | Path) -> bool:
    """Return whether a file is there; a name that is too long for any is none of one."""
    try:
        return Path(path).is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def read_json(
    path: str | Path, *, what: str, remedy: str, keys: Collection[str] = ()
) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Args:
        path: The file.
        what: What it holds, for the message of a missing file.
        remedy: What to do when it is missing or broken.
        keys: What the object has at least.

    Raises:
        MissingFileError: no such file.
        DataError: not UTF-8, not JSON (with line and column), not an object, a key twice, or one
            that is lacking.
    """
    path = Path(path)
    if not is_file(path):
        why = "there is no such file"
        if is_file(path.parent):
            why = f"{path.parent.name} is a file, and no folder"
        raise MissingFileError(f"{why} ({what})", file=path, remedy=remedy)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(
                f"the key {twice!r} occurs twice in one object", file=path, remedy=remedy
            )
        return value

    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except RecursionError as error:
        raise DataError("not JSON: brackets in brackets", file=path, remedy=remedy) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"not JSON: {error.msg} at {where}", file=path, remedy=remedy) from error
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text: byte {error.start} cannot be read"
        raise DataError(reason, file=path, remedy=remedy) from error
    if not isinstance(value, dict):
        reason = f"holds a {type(value).__name__}, not an object {{id: …}}"
        raise DataError(reason, file=path, remedy=remedy)
    if lacking := [key for key in keys if key not in value]:
        raise DataError(f"lacks {lacking[0]!r} ({what})", file=path, remedy=remedy)
    return value
