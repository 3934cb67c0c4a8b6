"""Where a module is, as one word, and how it comes onto this machine.

| address | |
|---|---|
| ``hub:NAME``, ``…@VERSION``, ``…@TAG`` | on your hub, :class:`~modgraft.store.hub.hub.Hub` |
| ``hf:USER/REPO``, ``…@REVISION``, ``…/FOLDER`` | on the Hugging Face Hub |
| with ``://``, as ``s3://bucket/qa`` | a folder that fsspec opens |
| anything else | a folder on this machine |
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modgraft.core.errors import CheckpointError, MissingFileError
from modgraft.core.files import folder_path, new_folder
from modgraft.store.card import Card
from modgraft.store.folder import FILE, holds_module
from modgraft.store.hub import huggingface
from modgraft.store.hub.hub import Hub, put
from modgraft.store.hub.remote import KINDS, cache, check_file, fetch, filesystem, identity


@dataclass(frozen=True)
class Found:
    """A module that is on this machine.

    Attributes:
        folder: where.
        address: where it comes from, with the version or commit.
        sha256: what it is known by; see :func:`~modgraft.store.hub.remote.identity`.
        card: its card, None for another tool's folder.
    """

    folder: Path
    address: str
    sha256: str
    card: Card | None


def is_address(place: object) -> bool:
    """Return whether ``place`` is an address, and no local folder's path."""
    return isinstance(place, str) and (place.startswith(("hub:", "hf:")) or "://" in place)


def local(place: Any, what: str) -> Path:
    """Return the folder of a path, or of an address, whose module is fetched.

    Args:
        place: the address or path.
        what: what takes it, for errors.

    Raises:
        ModgraftError: for what is neither, or cannot be fetched.
    """
    return find(place).folder if is_address(place) else folder_path(place, what)


def find(address: str | Path, base: Path = Path(), hub: Hub | None = None) -> Found:
    """Bring a module onto this machine, unless it is here; tensors are verified when they are read.

    Args:
        address: its address; a Path is a local folder, whatever it is called.
        base: the folder that a local folder's path starts from.
        hub: what ``hub:`` means; None: your hub.

    Raises:
        UnknownNameError: for a name or version that is not on the hub.
        CheckpointError: for a damaged card, or a folder without a module.
        ModgraftError: for an address that cannot be reached.
    """
    if not isinstance(address, str) or not is_address(address):
        folder, address = base / folder_path(address, "a module's address"), written(address)
        if not folder.is_dir():
            raise MissingFileError(
                "there is no such folder", file=folder,
                remedy="Give a module's folder, hub:NAME, hf:USER/REPO or a URL",
            )  # fmt: skip
    elif address.startswith("hub:"):
        hub = hub or Hub()
        row = hub.find(address)
        if hub.folder is not None:
            folder = Path(hub.place(row))
        else:
            folder = fetch(*hub.opened(row), f"{row.address} on {hub.address}")
        address = row.address
    elif address.startswith("hf:"):
        folder, address = huggingface.fetch(huggingface.Place.read(address))
    else:
        folder = fetch(*filesystem(address), address)
    sha, card = identity(folder)
    if card is None and is_address(address):
        folder = _named(folder, sha, name_of(address))
    return Found(folder, address, sha, card)


def written(place: str | Path) -> str:
    """Return an address as text; a folder that is called like an address is written ``./hub:qa``.

    Raises:
        ModgraftError: for what is no text and no path.
    """
    if isinstance(place, str):
        return place
    text = os.fspath(folder_path(place, "a module's address"))
    return f"./{text}" if is_address(text) else text


def name_of(address: str) -> str:
    """Return the last name in an address, without a version: what a folder of it is called."""
    repo, _, rest = address.partition("@") if address.startswith(("hub:", "hf:")) else ("", "", "")
    address = rest.partition("/")[2] or repo if repo else address.partition("::")[0]
    return re.split("[:/]+", address.rstrip("/"))[-1]


def _named(folder: Path, sha: str, name: str) -> Path:
    """Return another tool's folder under its own name, by which its module is called."""
    place = cache() / "named" / sha[:16] / name
    place.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if not (place / path.name).exists():
            link = place / f".{path.name}.{os.getpid()}"
            link.symlink_to(path.resolve())
            link.replace(place / path.name)
    return place


def push(
    found: Found, to: str, hub: Hub, *, tag: str = "", private: bool = False, dry_run: bool = False
) -> str:
    """Put a module on a hub, or on the Hugging Face Hub, and return its address there.

    Args:
        found: the module.
        to: what to call it on the hub, ``""`` as it is called; or ``hf:USER/REPO``.
        hub: the hub.
        tag: what else to call the version on it.
        private: whether a repository that is made is private.
        dry_run: whether to change nothing.

    Raises:
        ModgraftError: for a damaged module, a name that cannot be one, or where nothing can be
            written.
    """
    if not to.startswith("hf:"):
        return hub.push(found.folder, to.removeprefix("hub:"), tag, dry_run=dry_run).address
    place = huggingface.Place.read(to)
    if found.card is not None:
        check_file(found.folder / FILE, found.sha256, found.address)
    if dry_run:
        return to
    names = ", ".join(found.card.names) if found.card else "Module"
    return huggingface.push(found.folder, place, f"{names} {found.sha256[:12]}", private)


def pull(found: Found, to: str | Path) -> None:
    """Copy a module into a folder, whole or not at all, and verify it to the last bit.

    Args:
        found: the module.
        to: the folder; a module that is there is replaced, its other files stay.

    Raises:
        CheckpointError: for a file that is damaged, or a folder that holds other things and no
            module; what was there stays.
        ModgraftError: for another tool's module, of several files, which cannot be replaced all at
            once, over a folder that is there; or for a folder that cannot be written.
    """
    to = folder_path(to, "pull")
    if found.card is not None:
        if to.is_dir() and any(to.iterdir()) and not holds_module(to):
            raise CheckpointError(f"{to} is there and holds no module; choose another folder")
        put(found.folder / FILE, to, found.card)
        return
    with new_folder(to) as part:
        for path in found.folder.iterdir():
            if path.suffix in KINDS:
                shutil.copyfile(path, part / path.name)
        if identity(part)[0] != found.sha256:
            raise CheckpointError(f"{found.address} was changed while it was copied; pull it again")
