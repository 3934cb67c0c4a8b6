"""Modules on the Hugging Face Hub: ``hf:USER/REPO``, at a revision and in a folder of it.

``huggingface_hub`` fetches, keeps its own cache and works offline from it (``HF_HUB_OFFLINE=1``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from modgraft.core.errors import CheckpointError, DataError, ModgraftError
from modgraft.store.folder import FILE
from modgraft.store.hub.remote import (
    KINDS,
    check_file,
    check_holds_tensors,
    identity,
    reached,
    tell,
)

_FORM = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<folder>[^@]+))?")


@dataclass(frozen=True)
class Place:
    """A folder of a repository.

    Attributes:
        repo: ``USER/REPO``.
        revision: a branch, a tag or a commit; None: the default branch.
        folder: in it; "": the repository itself.
    """

    repo: str
    revision: str | None
    folder: str

    @classmethod
    def read(cls, address: str) -> Place:
        """Read ``hf:USER/REPO@REVISION/FOLDER``; a slash in a revision is written ``%2F``.

        Raises:
            ModgraftError: for what is none.
        """
        form = _FORM.fullmatch(address)
        folder = (form["folder"] or "").strip("/") if form else ""
        if form is None or not {".", "..", ""}.isdisjoint(folder.split("/") if folder else ()):
            raise ModgraftError(
                f"{address!r} is no address on the Hugging Face Hub; write hf:USER/REPO, "
                f"hf:USER/REPO@REVISION or hf:USER/REPO@REVISION/FOLDER"
            )
        revision = form["revision"]
        return cls(form["repo"], unquote(revision) if revision else None, folder)

    def at(self, commit: str) -> str:
        """Return the address of this place at a commit."""
        return f"hf:{self.repo}@{commit}" + (f"/{self.folder}" if self.folder else "")


def fetch(place: Place) -> tuple[Path, str]:
    """Fetch a folder's safetensors, JSON and README, unless they are in the cache.

    Returns:
        The folder, and the address with the commit.

    Raises:
        ModgraftError: where there is no such repository, or it cannot be reached or read.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    start = f"{place.folder}/" if place.folder else ""
    which = {
        "revision": place.revision,
        "allow_patterns": [f"{start}*{kind}" for kind in KINDS],
        "ignore_patterns": [f"{start}*/*"],  # a star is any number of folders deep
    }
    with _answered(place):
        try:
            rows = snapshot_download(place.repo, **which, dry_run=True, tqdm_class=_bar(False))
        except DryRunError:  # out of reach: below, from the cache, or with the reason
            rows = []
        if sizes := {r.filename: r.file_size or 0 for r in rows if r.will_download}:
            tell(f"hf:{place.repo}", sizes)
        bar = _bar(bool(sizes))
        snapshot = Path(snapshot_download(place.repo, **which, tqdm_class=bar))
        if _is_damaged(snapshot / place.folder):  # the disk's fault, or somebody's
            tell(f"hf:{place.repo}", {r.filename: r.file_size or 0 for r in rows})
            snapshot_download(place.repo, **which, tqdm_class=_bar(True), force_download=True)
    folder = snapshot / place.folder
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    check_holds_tensors(names, place.at(place.revision or snapshot.name))
    return folder, place.at(snapshot.name)


def _is_damaged(folder: Path) -> bool:
    """Return whether the file of a module in the cache is not, to the last bit, what it was.

    Of another tool's folder, whether a file is a link that leads nowhere.
    """
    if folder.is_dir() and any(not path.exists() for path in folder.iterdir()):
        return True
    if not (folder / FILE).is_file():
        return False
    try:
        sha, card = identity(folder)
        if card is not None:
            check_file(folder / FILE, sha, str(folder))
    except CheckpointError:
        return True
    return False


def _bar(shown: bool) -> Any:
    """Return the class of progress bars: on a terminal, or none at all."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **(settings | {"disable": None if shown else True}))

    return Bar


def push(folder: Path, place: Place, message: str, private: bool) -> str:
    """Upload a folder's safetensors, JSON and README as one commit; the repository is made.

    Returns:
        The address with the commit.

    Raises:
        CheckpointError: for another tool's folder where other modules are, with which it would be
            one module, or behind which it would not be seen.
        ModgraftError: where you may not write, or it cannot be reached.
    """
    start = f"{place.folder}/" if place.folder else ""
    from huggingface_hub import HfApi

    with _answered(place):
        api = HfApi()
        api.create_repo(place.repo, private=private or None, exist_ok=True)
        own = {path.name for path in folder.iterdir()}
        if FILE not in own:
            names = api.list_repo_files(place.repo, revision=place.revision)
            there = [n.removeprefix(start) for n in names if n.startswith(start)]
            beside = [n for n in there if n.endswith(KINDS[0]) and "/" not in n and n not in own]
        else:
            beside = []
        if beside:
            raise CheckpointError(
                f"hf:{place.repo} has {', '.join(beside)} already, and this folder of another tool "
                f"would be mixed with it; push to a folder of it, as {place.at('main')}/NAME"
            )
        commit = api.upload_folder(
            repo_id=place.repo, folder_path=folder, path_in_repo=place.folder or None,
            revision=place.revision, commit_message=message,
            allow_patterns=[f"*{kind}" for kind in KINDS], ignore_patterns=["*/*"],
        )  # fmt: skip
    return place.at(commit.oid)


@contextmanager
def _answered(place: Place) -> Iterator[None]:
    """Say what the Hugging Face Hub refused, and what to do."""
    from huggingface_hub import errors

    name, log_in = f"hf:{place.repo}", "log in with `hf auth login`"
    try:
        with reached(name):
            yield
    except ModgraftError as error:
        match error.__cause__:
            case errors.GatedRepoError():
                why, remedy = "access must be asked for", f"Ask for it on its page, and {log_in}"
            case errors.RepositoryNotFoundError():
                why = "there is no such repository, or it is private"
                remedy = f"See the name, or {log_in}"
            case errors.RevisionNotFoundError():
                why = f"it has no revision {place.revision!r}"
                remedy = "See its page for those it has; a slash in one is written %2F"
            case errors.HfHubHTTPError(response=answer) if answer.status_code in (401, 403):
                why, remedy = "you may not do that", f"{log_in[0].upper()}{log_in[1:]}, as who may"
            case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled():
                why = "the Hugging Face Hub cannot be reached, and not all of it is in the cache"
                remedy = (
                    "See the network, and that HF_HUB_OFFLINE is not set; or give a local folder"
                )
            case _:
                raise
        raise DataError(why, file=name, remedy=remedy) from error.__cause__
