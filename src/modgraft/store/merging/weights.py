"""Reads the weights of a checkpoint, the folder that ``save_pretrained`` writes, part by part.

Files are read with plain reads, and not mapped: no limit of memory counts them.
"""

from __future__ import annotations

import hashlib
import math
import os
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from modgraft.core.errors import CheckpointError
from modgraft.core.files import read_json
from modgraft.store.file import Entry, Header, broken

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"

BLOCK = 2**16
"""How many numbers of a tensor are read at a time."""


class Checkpoint:
    """A folder of weights, of which slices are read.

    Args:
        folder: a folder with ``model.safetensors``, or with an index and its shards.

    Raises:
        CheckpointError: for a folder of pickles, without weights, with a missing shard, or whose
            index and shards do not agree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened = ExitStack()
        self._at: dict[str, tuple[FileIO, int]] = {}
        self.entries: dict[str, Entry] = {}
        self.shards: dict[str, list[str]] = {}
        """The tensors of each file, in the order of their bytes."""
        try:
            for name, wanted in self._files().items():
                self._open(name, wanted)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """How many bytes its tensors have."""
        return sum(entry.end - entry.begin for entry in self.entries.values())

    def close(self) -> None:
        """Close its files."""
        self._opened.close()

    def numbers(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Read the numbers ``start`` to ``end`` of a tensor, as a vector."""
        entry = self.entries[name]
        size = entry.dtype.itemsize
        file, begin = self._at[name]
        count = math.prod(entry.shape) if end is None else end
        data = bytearray((count - start) * size)
        file.seek(begin + start * size)
        at, left = memoryview(data), len(data)
        while left:  # a read gives 2 GiB at most
            if not (got := file.readinto(at[len(data) - left :])):
                raise CheckpointError(f"{file.name} has become shorter while it was read")
            left -= got
        return torch.frombuffer(data, dtype=entry.dtype) if data else torch.empty(0)

    def equal(self, one: str, other: str) -> bool:
        """Return whether two tensors of one shape are the same, to the last bit."""
        if self.entries[one].dtype != self.entries[other].dtype:
            return False
        size = math.prod(self.entries[one].shape)
        return all(
            torch.equal(self.numbers(one, start, end), self.numbers(other, start, end))
            for start in range(0, size, BLOCK)
            for end in [min(start + BLOCK, size)]
        )

    def leave_out(self, name: str) -> None:
        """Do as if there were no such tensor."""
        del self.entries[name]
        for tensors in self.shards.values():
            if name in tensors:
                tensors.remove(name)

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each of its files."""
        found = {}
        for name in self.shards:
            with (self.folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def _files(self) -> dict[str, list[str] | None]:
        """Return the files of weights, each with the tensors that the index expects in it."""
        if (self.folder / ONE_FILE).is_file():
            return {ONE_FILE: None}
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is no folder; give one that save_pretrained wrote"
            )
        index = self.folder / INDEX
        if not index.is_file():
            pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt"))
            if pickles:
                raise CheckpointError(
                    f"{self.folder} holds {pickles[0]}, a pickle, which may run anything when it "
                    f"is read, and no {ONE_FILE}; load it where you trust it, and "
                    f"save_pretrained(folder) writes safetensors"
                )
            raise CheckpointError(
                f"{self.folder} holds no weights: neither {ONE_FILE} nor {INDEX} is there; give a "
                f"folder that save_pretrained wrote"
            )
        said = read_json(index, what="a checkpoint's index", remedy="copy the folder again")
        placed = said.get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise CheckpointError(f"{index} has no weight_map; copy the folder again")
        found: dict[str, list[str] | None] = {}
        for tensor, name in placed.items():
            if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
                raise CheckpointError(
                    f"{index} places {tensor!r:.80} in {name!r:.80}, no file's name"
                )
            found.setdefault(name, []).append(tensor)  # type: ignore[union-attr]
        if missing := [name for name in found if not (self.folder / name).is_file()]:
            raise CheckpointError(
                f"{self.folder}: {len(missing)} of {len(found)} shards are missing, {missing[0]} "
                f"for one; copy the folder again"
            )
        return found

    def _open(self, name: str, wanted: list[str] | None) -> None:
        path = self.folder / name
        try:
            file = self._opened.enter_context(path.open("rb", buffering=0))
        except OSError as error:
            raise broken(path, error.strerror or str(error)) from error
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        header = Header(head + file.read(Header.length(head, size, path) - 8), size, path)
        if wanted is not None and (lost := set(wanted).symmetric_difference(header.entries)):
            raise CheckpointError(
                f"{path} and the index beside it do not agree about {sorted(lost)[0]!r:.80}; copy "
                f"the folder again"
            )
        ordered = sorted(header.entries.items(), key=lambda item: item[1].begin)
        self.shards[name] = [tensor for tensor, _ in ordered]
        for tensor, entry in ordered:
            if tensor in self.entries:
                raise CheckpointError(f"{self.folder}: {tensor!r:.80} is in two of its files")
            self.entries[tensor] = entry
            self._at[tensor] = file, header.start + entry.begin
