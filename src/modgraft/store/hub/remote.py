"""Folders that are elsewhere: reached by fsspec, fetched whole into a cache, known by a hash."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from modgraft.core.errors import CheckpointError, MissingFileError, ModgraftError
from modgraft.core.files import cache, in_bytes, sync
from modgraft.store.card import Card
from modgraft.store.file import CARD, Header, TensorFile, is_there
from modgraft.store.folder import FILE, native

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

KINDS = (".safetensors", ".json", ".md")
"""What is fetched of a folder, and nothing else: none of it is run."""

_OLD = 86_400  # seconds after which a killed process's half of a folder is removed


def filesystem(address: str) -> tuple[AbstractFileSystem, str]:
    """Return fsspec's file system for a folder or URL, and the path in it.

    Raises:
        ModgraftError: for a protocol that fsspec does not know, or whose package is not installed.
    """
    from fsspec.core import url_to_fs

    with reached(address):
        try:
            system, root = url_to_fs(address)
        except TypeError as error:  # a part that the protocol needs, such as ftp's machine
            raise ModgraftError(f"{address} lacks a part: {error}; see its protocol") from error
        return system, root.rstrip("/")


def protocols(system: AbstractFileSystem) -> set[str]:
    """Return the names of the protocol that a file system is of, such as ``s3``."""
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)


@contextmanager
def reached(address: str) -> Iterator[None]:
    """Say what could not be reached, and what to do, instead of what a library says."""
    try:
        yield
    except (ModgraftError, AttributeError, NameError, TypeError, AssertionError):
        raise  # ours, or a mistake in a program, which is no matter of the address
    except ImportError as error:  # fsspec's, of the package that a protocol needs
        raise ModgraftError(f"{address} cannot be opened: {error}") from error
    except FileNotFoundError as error:
        raise MissingFileError(
            f"there is nothing there ({_first_line(error)})", file=address,
            remedy="See how it is written, and whether you may read it",
        ) from error  # fmt: skip
    except Exception as error:  # each of the protocols has its own
        raise ModgraftError(
            f"{address} cannot be used ({type(error).__name__}: {_first_line(error)}); see how it "
            f"is written, the network, and what you may read and write there"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def card_there(system: AbstractFileSystem, path: str, size: int) -> str:
    """Read the card of a module's file, without its tensors; "" where it has none.

    Raises:
        CheckpointError: for a file that is damaged.
    """
    with system.open(path, "rb") as file:
        first = bytes(file.read(8))  # type: ignore[arg-type]
        rest = bytes(file.read(Header.length(first, size, path) - 8))  # type: ignore[arg-type]
    metadata = Header(first + rest, size, path).metadata
    Card.in_header(metadata, path)
    return metadata.get(CARD, "")


def identity(folder: Path) -> tuple[str, Card | None]:
    """Return what a folder's modules are known by, and their card.

    Returns:
        The hash in the card; of another tool's folder, which has no card, a hash over its tensors
        and JSON, and None.

    Raises:
        CheckpointError: for a damaged card, or a folder without a safetensors file.
    """
    if is_there(folder / FILE):
        card = native(folder).card
        if card.tensors:  # the first format has no hash
            return card.sha256, card
    files = {p.name: p for p in folder.iterdir()} if folder.is_dir() else {}
    check_holds_tensors(files, folder)
    found = sha256()
    for name, path in sorted(files.items()):
        if path.suffix in KINDS[:2]:
            with path.open("rb") as file:
                found.update(f"{name}\0{file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest(), None


def check_holds_tensors(names: Any, where: object) -> None:
    """Refuse a folder whose files' names are none of a module's."""
    if any(name.endswith(KINDS[0]) for name in names):
        return
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        raise CheckpointError(
            f"{where} has its tensors in {pickled[0]}, a pickle, which can run anything and is "
            f"never read; ask for a safetensors file, or make one with the tool that wrote it"
        )
    raise CheckpointError(
        f"no module in {where}: it has no .safetensors file; give the folder of one module"
    )


def check_file(path: Path, sha: str, address: str) -> Card:
    """Read a module's file to the last bit, and refuse another than the one with hash ``sha``."""
    file = TensorFile(path)
    card = Card.in_header(file.metadata, address)
    if card is None or card.sha256 != sha or file.digest() != card.tensors:
        raise CheckpointError(
            f"{address}: the file is another one than that with hash {sha[:12]}; it was changed, "
            f"or cut on its way: fetch it again, or push it anew"
        )
    return card


def fetch(system: AbstractFileSystem, root: str, address: str) -> Path:
    """Fetch a folder into the cache, whole or not at all; one whose hash is there already is not.

    Returns:
        The folder in the cache.

    Raises:
        CheckpointError: for a folder without a module.
        ModgraftError: where it cannot be reached.
    """
    with reached(address):
        system.invalidate_cache()
        rows = system.ls(root, detail=True)
        files = {PurePosixPath(row["name"]).name: row for row in rows if row["type"] == "file"}
        check_holds_tensors(files, address)
        if FILE in files and (text := card_there(system, files[FILE]["name"], files[FILE]["size"])):
            sha = Card.from_text(text, address).sha256
            place = cache() / sha
            if (place / FILE).is_file():
                try:
                    check_file(place / FILE, sha, address)
                    return place
                except CheckpointError:  # the disk's fault, or somebody's: it is fetched again
                    shutil.rmtree(place)
            files = {FILE: files[FILE]}
        files = {name: row for name, row in files.items() if name.endswith(KINDS)}
        tell(address, {name: row["size"] or 0 for name, row in files.items()})
        cache().mkdir(parents=True, exist_ok=True)
        for left in cache().glob(".fetch-*"):
            if time.time() - left.stat().st_mtime > _OLD:
                shutil.rmtree(left, ignore_errors=True)
        part = Path(tempfile.mkdtemp(dir=cache(), prefix=".fetch-"))
        try:
            for name, row in files.items():
                system.get_file(row["name"], str(part / name), callback=bar(name))
            return _placed(part, cache() / identity(part)[0])
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _placed(part: Path, place: Path) -> Path:
    """Move a fetched folder to its place, where another process may have put the same."""
    for each in (*part.iterdir(), part):
        sync(each)
    try:
        part.rename(place)
    except OSError:
        if not place.is_dir():
            raise
    return place


def tell(address: str, sizes: dict[str, int], does: str = "fetching") -> None:
    """Say on standard error what is about to be fetched or sent, and how large it is."""
    print(f"{does} {address}: {', '.join(sizes)}, {in_bytes(sum(sizes.values()))}", file=sys.stderr)


def bar(name: str) -> Any:
    """Return what shows the bytes that have passed, on a terminal."""
    from fsspec.callbacks import TqdmCallback

    return TqdmCallback({"desc": name, "unit": "B", "unit_scale": True, "disable": None})
