"""The file that is a module: tensors as safetensors, and in its header the card.

It is read as a stranger's: its header is measured against the file before anything is allocated,
and nothing of it is run. It is replaced as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as the header describes it: its type, its shape, and its bytes in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header:
    """The header of a safetensors file, measured against the file's size.

    Args:
        head: the file's first bytes, as many as :meth:`length` says at least.
        size: how many bytes the file has.
        name: the file's, for errors.

    Raises:
        CheckpointError: where header and size do not agree.
    """

    def __init__(self, head: bytes, size: int, name: object) -> None:
        self._name, self.start = name, self.length(head[:8], size, name)
        header = self._json(head[8 : self.start])
        self.metadata = self._metadata(header.pop("__metadata__", {}))
        self.entries = {key: self._entry(key, said) for key, said in header.items()}
        at = 0
        for entry in sorted(self.entries.values(), key=lambda e: (e.begin, e.end)):
            if entry.begin != at:
                raise broken(name, "its tensors overlap, or leave bytes that belong to none")
            at = entry.end
        if self.start + at != size:
            raise broken(name, f"its header speaks of {self.start + at:,} bytes of {size:,}")

    @staticmethod
    def length(first: bytes, size: int, name: object) -> int:
        """Return where the tensors begin, from the first eight bytes.

        Raises:
            CheckpointError: for a header that is longer than the file, or than any module's.
        """
        if first == b"version ":
            raise broken(name, "it is git-lfs's pointer to the file: `git lfs pull` brings that")
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise broken(name, f"its header of {length:,} bytes is not in it, or no module's")
        return 8 + length

    def _json(self, header: bytes) -> dict[str, Any]:
        try:
            said = read_json(header)
        except ValueError as error:
            raise broken(self._name, f"its header: {error}") from error
        if not isinstance(said, dict):
            raise broken(self._name, "its header is no JSON object")
        return said

    def _metadata(self, said: Any) -> dict[str, str]:
        if not isinstance(said, dict) or not all(isinstance(v, str) for v in said.values()):
            raise broken(self._name, "its metadata are not texts by name")
        return said

    def _entry(self, key: str, said: Any) -> Entry:
        match said:
            case {"dtype": str(kind), "shape": [*shape], "data_offsets": [begin, end]} if (
                len(said) == 3
                and kind in DTYPES
                and all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end))
            ):
                entry = Entry(DTYPES[kind], tuple(shape), begin, end)
            case {"dtype": str(kind)} if kind not in DTYPES and re.fullmatch(
                r"[A-Z]+\d\w{0,9}", kind
            ):
                raise CheckpointError(
                    f"{self._name}: {key!r:.80} holds {kind}, which is not read; save it in one of "
                    f"{', '.join(DTYPES)}"
                )
            case _:
                raise broken(self._name, f"its header describes {key!r:.80} as {said!r:.80}")
        size = entry.dtype.itemsize
        for n in shape:
            size = min(size * n, 2**62)  # a shape of many axes would make a number without end
        if size != end - begin:
            raise broken(self._name, f"{key!r:.80}, {kind} {shape!r:.80}, has {end - begin} bytes")
        return entry


class TensorFile:
    """A safetensors file, mapped into memory; its tensors are read when they are asked for.

    The file may be replaced meanwhile: what was opened stays what it was. One that was written to
    in its place is read only where a :meth:`digest` says what it is.

    Args:
        path: the file's.

    Raises:
        CheckpointError: for what is no regular file, or whose header and size do not agree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes, opened = mapped(path)
        self._inode, self._written = opened.st_ino, opened.st_mtime_ns
        size = len(self._bytes)
        length = Header.length(self._bytes[:8].numpy().tobytes(), size, path)
        self._start = length
        self.metadata = self._header().metadata

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Type, shape and place of each tensor by its name; a file that waits does without."""
        return self._header().entries

    def _header(self) -> Header:
        head = self._bytes[: self._start].numpy().tobytes()
        return Header(head, len(self._bytes), self.path)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor into memory of its own."""
        self.check_size()
        if self._written_at() != self._written:
            raise CheckpointError(
                f"{self.path} was written to since it was opened, and what was there is lost; "
                f"remove what was to be read of it (host.remove), and load the folder again"
            )
        entry = self.entries[name]
        own = self._raw(entry).clone()
        return own.view(entry.dtype).reshape(entry.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Read all tensors, each into memory of its own."""
        return {name: self.tensor(name) for name in self.entries}

    def digest(self) -> str:
        """Hash the tensors with their names, types and shapes."""
        self.check_size()
        self._written = self._written_at()  # what is hashed is known
        found = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            found.update(f"{name}\0{entry.dtype}{list(entry.shape)}\0".encode())
            found.update(self._raw(entry).numpy().data)
        return found.hexdigest()

    def check_size(self) -> None:
        """Refuse a file that was cut where it stands: reading it would end the process.

        Raises:
            CheckpointError: for such a file, whatever stands in its place by now.
        """
        reader, writer = os.pipe()
        try:  # the system refuses to copy its last byte where reading it would end the process
            os.write(writer, self._bytes[-1:].numpy().data)
        except OSError as error:
            raise broken(self.path, f"it no longer has {len(self._bytes):,} bytes") from error
        finally:
            os.close(reader)
            os.close(writer)

    def _written_at(self) -> int:
        """Return when the file was written to; one that was replaced is here as it was."""
        try:
            now = self.path.stat()
        except OSError:  # removed, and still here
            return self._written
        return now.st_mtime_ns if now.st_ino == self._inode else self._written

    def _raw(self, entry: Entry) -> Tensor:
        return self._bytes[self._start + entry.begin : self._start + entry.end]


def mapped(path: Path) -> tuple[Tensor, os.stat_result]:
    """Map a file into memory.

    Returns:
        its bytes, and what the system said of it.

    Raises:
        CheckpointError: for what is no regular file, cannot be read, or is too short for a header.
    """
    while True:
        before, why = stat_of(path), ""
        if before.st_size < 10:
            raise broken(path, f"{before.st_size} bytes are less than a header")
        try:
            path.open("rb").close()  # whose error says more
            storage: Any = torch.UntypedStorage.from_file(str(path), False, before.st_size)
        except OSError as error:
            raise unreadable(path, error) from error
        except RuntimeError as error:
            storage, why = None, str(error).partition("\n")[0]
        now = stat_of(path)
        if (now.st_ino, now.st_size) == (before.st_ino, before.st_size):
            break  # or else another file has just taken its place
    if storage is None:
        raise broken(path, why)
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage), before


def stat_of(path: Path) -> os.stat_result:
    """Return what the system says of a file.

    Raises:
        CheckpointError: for what is no regular file: a pipe would be waited for.
    """
    try:
        kind = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(kind.st_mode):
        raise broken(path, "it is no regular file")
    return kind


def read_small(path: Path) -> bytes:
    """Read a file that is no larger than a header may be.

    Raises:
        CheckpointError: for a larger one, or what is no regular file.
    """
    if (size := stat_of(path).st_size) > LARGEST_HEADER:
        raise broken(path, f"it has {size:,} bytes, more than any of a module")
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def is_there(path: Path) -> bool:
    """Return whether something is at a path.

    Raises:
        CheckpointError: where that cannot be seen.
    """
    try:
        return path.exists()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: object, error: OSError) -> CheckpointError:
    """Return the error of a file that the system does not read."""
    if isinstance(error, FileNotFoundError):
        return broken(path, "it is not there")
    return CheckpointError(
        f"{path} cannot be read ({error.strerror or error}); see to its permissions, or copy the "
        f"folder to where you may read it"
    )


def broken(path: object, why: str) -> CheckpointError:
    """Return the error of a file that cannot be read."""
    return CheckpointError(
        f"{path} cannot be read ({why}); it is missing or cut short, or was changed: copy the "
        f"folder again"
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
        words = text if isinstance(text, str) else text.decode()
        said = json.loads(words, object_pairs_hook=unique, parse_constant=refuse)
        if "\\ud" in words.lower():
            json.dumps(said, ensure_ascii=False).encode()  # half a character can be escaped
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return said


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    shared = Counter(t.untyped_storage().data_ptr() for t in own.values())
    for name, tensor in own.items():  # safetensors takes no two views of one memory
        if shared[tensor.untyped_storage().data_ptr()] > 1:
            own[name] = tensor.clone()
    with whole(path) as part:
        try:
            save_file(own, part, metadata={"format": "pt", **metadata})
        except SafetensorError as error:  # also where there is no room
            raise OSError(str(error)) from error


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors as :meth:`TensorFile.digest` does."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        own = tensor.detach().cpu().contiguous()
        found.update(f"{name}\0{own.dtype}{list(own.shape)}\0".encode())
        found.update(own.reshape(-1).view(torch.uint8).numpy().data if own.numel() else b"")
    return found.hexdigest()
