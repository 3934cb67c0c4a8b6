"""The file that is a module: tensors as safetensors, and in its header the card.

It is read as a stranger's: its header is measured against the file before anything is allocated,
and nothing of it is run. It is replaced as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from modgraft.core.errors import CheckpointError
from modgraft.core.files import whole

CARD = "modgraft"
"""The entry of the header's metadata that is the card."""

LARGEST_HEADER = 2**25
"""Bytes: a card of a hundred thousand sites is a third of it."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The types that a tensor of a module, or of a host, may have."""


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it: its type, its shape, and its bytes in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file, mapped into memory; its tensors are read when they are asked for.

    The file may be replaced meanwhile: what was opened stays what it was.

    Args:
        path: the file's.

    Raises:
        CheckpointError: for what is no regular file, or whose header and size do not agree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            kind = path.stat()
        except OSError as error:
            raise self._broken(f"{error.strerror or error}") from error
        if not stat.S_ISREG(kind.st_mode):  # a pipe would be waited for
            raise self._broken("it is no regular file")
        if kind.st_size < 10:
            raise self._broken(f"{kind.st_size} bytes are less than a header")
        try:
            storage: Any = torch.UntypedStorage.from_file(str(path), False, kind.st_size)
        except RuntimeError as error:
            raise self._broken(str(error).partition("\n")[0]) from error
        self._bytes = torch.empty(0, dtype=torch.uint8).set_(storage)
        length = int(self._bytes[:8].view(torch.int64))
        self._start = 8 + length
        if not 2 <= length <= min(LARGEST_HEADER, kind.st_size - 8):
            raise self._broken(f"its header of {length} bytes is not in it, or no module's")
        header = self._json(bytes(self._bytes[8 : self._start].numpy()))
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        self.entries = {name: self._entry(name, said) for name, said in header.items()}
        at = 0
        for entry in sorted(self.entries.values(), key=lambda e: (e.begin, e.end)):
            if entry.begin != at:
                raise self._broken("its tensors overlap, or leave bytes that belong to none")
            at = entry.end
        if self._start + at != kind.st_size:
            raise self._broken(
                f"its header speaks of {self._start + at:,} bytes, and it has {kind.st_size:,}"
            )

    def tensor(self, name: str) -> Tensor:
        """Read a tensor into memory of its own."""
        entry = self.entries[name]
        own = self._raw(entry).clone()
        return own.view(entry.dtype).reshape(entry.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors, each into memory of its own."""
        return {name: self.tensor(name) for name in self.entries}

    def digest(self) -> str:
        """Hash the tensors with their names, types and shapes."""
        found = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            found.update(f"{name}\0{entry.dtype}{list(entry.shape)}\0".encode())
            found.update(self._raw(entry).numpy().data)
        return found.hexdigest()

    def _raw(self, entry: Entry) -> Tensor:
        return self._bytes[self._start + entry.begin : self._start + entry.end]

    def _json(self, header: bytes) -> dict[str, Any]:
        try:
            said = read_json(header)
        except ValueError as error:
            raise self._broken(f"its header: {error}") from error
        if not isinstance(said, dict):
            raise self._broken("its header is no JSON object")
        return said

    def _metadata(self, said: Any) -> dict[str, str]:
        if not isinstance(said, dict) or not all(isinstance(v, str) for v in said.values()):
            raise self._broken("its metadata are not texts by name")
        return said

    def _entry(self, name: str, said: Any) -> Entry:
        match said:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [begin, end]} if (
                len(said) == 3
                and kind in DTYPES
                and all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end))
            ):
                entry = Entry(DTYPES[kind], tuple(shape), begin, end)
            case _:
                raise self._broken(f"its header describes {name!r:.80} as {said!r:.80}")
        size = entry.dtype.itemsize
        for n in shape:
            size = min(size * n, 2**62)  # a shape of many axes would make a number without end
        if size != end - begin:
            raise self._broken(f"{name!r:.80}, {kind} {shape!r:.80}, has {end - begin} bytes")
        return entry

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be read ({why}); it is missing or cut short, or was changed: copy "
            f"the folder again"
        )


def read_json(text: str | bytes) -> Any:
    """Read JSON in which no name occurs twice in an object, and no number is NaN.

    Raises:
        ValueError: for anything else; also for what is nested too deep.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("a name occurs twice in one object")
        return value

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with whole(path) as part:
        save_file(own, part, metadata={"format": "pt", **metadata})


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors as :meth:`TensorFile.digest` does."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        own = tensor.detach().cpu().contiguous()
        found.update(f"{name}\0{own.dtype}{list(own.shape)}\0".encode())
        found.update(own.reshape(-1).view(torch.uint8).numpy().data if own.numel() else b"")
    return found.hexdigest()
