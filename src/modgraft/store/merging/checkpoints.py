"""Merges whole checkpoints, the folders that ``save_pretrained`` writes, of any size.

A tensor is read in blocks from every checkpoint, merged, and written: what is in memory at a time
are a few blocks of :data:`BLOCK` numbers for each checkpoint. The methods that need a matrix as a
whole (``isotropic``, ``tsv``, ``knots``) hold that of each checkpoint, one weight at a time. Files
are read and written with plain reads and writes, which no limit of memory counts.

The new folder appears with one rename, when all of it is on the disk: until then there is none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from glob import escape
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.files import folder_path, read_json, sync, write_json
from modgraft.core.precision import wide
from modgraft.store.file import DTYPES, Entry, Header
from modgraft.store.merging.low_rank import dense
from modgraft.store.merging.methods import SOUP, Asked, asked
from modgraft.store.merging.soup import greedy

BLOCK = 2**18
"""How many numbers of a tensor are merged at a time."""

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
RECORD = "modgraft_merge.json"

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".pkl"
)  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[int, int], object]
"""Told how many numbers are merged, and how many there are."""


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
        file = self._opened.enter_context(path.open("rb", buffering=0))
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


def merge_checkpoints(
    models: Sequence[str | Path],
    out: str | Path,
    method: str = "average",
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    validate: Callable[[Path], float] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Merge checkpoints of one architecture into a new one, which ``from_pretrained`` loads.

    With a base, Δᵢ = θᵢ − θ₀ is merged and added to θ₀; without, ``average``, ``slerp`` and
    ``greedy_soup`` merge the weights θᵢ themselves. It is computed in float32 and rounded once, to
    the types of the base, or else of the first model, whose configuration and tokenizer come along.

    Args:
        models: the folders.
        out: the new folder; one that is there must be empty.
        method: see :func:`modgraft.merge`.
        base: the folder of the checkpoint that they were all trained from.
        weights: one for each model; None: 1.
        validate: the score of a candidate's folder, for ``greedy_soup``; higher is better.
        progress: told how many numbers are merged, and how many there are.
        **options: those of the method.

    Returns:
        ``out``. Its ``modgraft_merge.json`` says what it was made of.

    Raises:
        CheckpointError: for a folder of pickles, a missing shard, checkpoints of other tensors or
            shapes, a disk that is full. There is no ``out`` then.
        ModgraftError: for an unknown method or option, or a missing base.
    """
    target = folder_path(out, "merge_checkpoints")
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(f"{target} is there and not empty; choose another folder")
    paths = [Path(each) for each in models]
    if method == SOUP:
        return _soup(paths, target, base, weights, validate, progress, options)
    if validate is not None:
        raise ModgraftError(f"validate= belongs to method={SOUP!r}, and not to {method!r}")
    how = asked(method, len(paths), weights, options)
    if base is None and how.method.needs_base:
        raise ModgraftError(
            f"{method} merges what models have learned since they were one; name that one: "
            f"base='folder' (--base on the command line)"
        )
    return _merge(paths, target, how, None if base is None else Path(base), progress, {})


def _merge(
    paths: Sequence[Path],
    target: Path,
    how: Asked,
    base: Path | None,
    progress: Progress | None,
    more: dict[str, Any],
) -> Path:
    """Merge checkpoints; ``more`` is what else the record says."""
    with ExitStack() as opened:

        def open_(path: Path) -> Checkpoint:
            found = Checkpoint(path)
            opened.callback(found.close)
            return found

        start = None if base is None else open_(base)
        several = [open_(path) for path in paths]
        first = several[0] if start is None else start
        for each in several:
            _check_same(first, each)
        with new_folder(target) as part:
            _write(how, start, several, part, progress)
            copy_rest(first.folder, part)
            write_json(part / RECORD, _record(how, start, several) | more)
    return target


def _soup(
    paths: Sequence[Path],
    target: Path,
    base: str | Path | None,
    weights: Sequence[float] | None,
    validate: Callable[[Path], float] | None,
    progress: Progress | None,
    options: dict[str, Any],
) -> Path:
    """Write the average of the models that a validation chooses."""
    if validate is None or weights is not None or options or base is not None:
        raise ModgraftError(
            f"method={SOUP!r} takes validate=, a function of a checkpoint's folder that returns "
            f"its score, and no weights, base or options"
        )
    score, names = validate, {str(path): path for path in paths}
    if len(names) < len(paths):
        raise ModgraftError("a model is named twice; each is one candidate")

    def scored(some: Sequence[str]) -> float:
        if len(some) == 1:
            return score(names[some[0]])
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".soup.") as folder:
            made = merge_checkpoints([names[name] for name in some], Path(folder) / "candidate")
            return score(made)

    target.parent.mkdir(parents=True, exist_ok=True)
    soup = greedy(list(names), scored)
    chosen = [names[name] for name in soup.chosen]
    more = {"method": SOUP, "alone": soup.alone, "score": soup.score}
    return _merge(chosen, target, asked("average", len(chosen), None, {}), None, progress, more)


def _check_same(one: Checkpoint, other: Checkpoint) -> None:
    """Refuse checkpoints of other tensors or shapes; warn of another configuration."""
    if lost := set(one.entries).symmetric_difference(other.entries):
        name = sorted(lost)[0]
        there, not_there = (one, other) if name in one.entries else (other, one)
        raise CheckpointError(
            f"{one.folder} and {other.folder} are not of one architecture: {len(lost)} tensors are "
            f"in one alone; {name} is in {there.folder} and not in {not_there.folder}"
        )
    for name, entry in one.entries.items():
        shape = other.entries[name].shape
        if shape != entry.shape:
            raise CheckpointError(
                f"{name} is {list(entry.shape)} in {one.folder} and {list(shape)} in "
                f"{other.folder}; checkpoints of one shape are merged"
            )
    said = [each.folder / "config.json" for each in (one, other)]
    if all(path.is_file() for path in said):
        ours, theirs = (
            read_json(p, what="a model's configuration", remedy="copy it again") for p in said
        )
        beside = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"}
        keys = sorted((ours.keys() | theirs.keys()) - beside)
        if differ := [key for key in keys if ours.get(key) != theirs.get(key)]:
            warnings.warn(
                f"the configurations of {one.folder} and {other.folder} differ in "
                f"{', '.join(differ)[:200]}; the first one's is written",
                stacklevel=4,
            )


def _write(
    how: Asked,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    folder: Path,
    progress: Progress | None,
) -> None:
    """Write the merged tensors as the files of ``base``, or else the first model, have them."""
    first = models[0] if base is None else base
    done, every = 0, sum(math.prod(entry.shape) for entry in first.entries.values())
    for name, tensors in first.shards.items():
        with (folder / name).open("wb") as file:
            file.write(_head({tensor: first.entries[tensor] for tensor in tensors}))
            for tensor in tensors:
                for block in _merged(how, base, models, tensor):
                    file.write(block.contiguous().view(torch.uint8).numpy().data)
                    done += block.numel()
                    if progress is not None:
                        progress(done, every)
            file.flush()
            os.fsync(file.fileno())
    if len(first.shards) > 1:
        size = sum(entry.end - entry.begin for entry in first.entries.values())
        placed = {tensor: name for name, tensors in first.shards.items() for tensor in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": placed})


def _head(entries: dict[str, Entry]) -> bytes:
    """Return the beginning of a safetensors file, up to the first tensor's bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, entry in entries.items():
        size = entry.end - entry.begin
        kind = _DTYPE_NAMES[entry.dtype]
        header[name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _merged(
    how: Asked, base: Checkpoint | None, models: Sequence[Checkpoint], name: str
) -> Iterator[Tensor]:
    """Merge one tensor; give it block by block, as vectors of the type it is written in."""
    first = models[0] if base is None else base
    entry = first.entries[name]
    size = math.prod(entry.shape)
    if not entry.dtype.is_floating_point:
        yield from _equal(first, models, name)
        return
    in_blocks = how.method.by_number or len(entry.shape) != 2
    step = BLOCK if in_blocks else max(1, size)
    shape = (-1,) if in_blocks else entry.shape

    def read(each: Checkpoint, start: int) -> Tensor:
        return wide(each.numbers(name, start, min(start + step, size))).reshape(shape)

    def blocks() -> Iterable[list[Tensor]]:
        for start in range(0, size, step):
            if base is None:
                yield [read(model, start) for model in models]
            else:
                origin = read(base, start)
                yield [read(model, start) - origin for model in models]

    parents = [str(number) for number in range(len(models))]
    for number, change in enumerate(how.merge(name, parents, blocks)):
        block = dense(change)
        if base is not None:
            block = read(base, number * step) + block
        if not torch.isfinite(block).all():
            bad = [m.folder for m in models if not torch.isfinite(read(m, number * step)).all()]
            why = f"{bad[0]} does" if bad else "the sum is too large"
            raise CheckpointError(f"the merge of {name} holds NaN or infinity: {why}")
        yield block.flatten().to(entry.dtype)


def _equal(first: Checkpoint, models: Sequence[Checkpoint], name: str) -> Iterator[Tensor]:
    """Give a tensor of whole numbers, which all must have alike."""
    size = math.prod(first.entries[name].shape)
    for start in range(0, size, BLOCK):
        block = first.numbers(name, start, min(start + BLOCK, size))
        for model in models:
            if not torch.equal(block, model.numbers(name, start, min(start + BLOCK, size))):
                raise CheckpointError(
                    f"{name} holds whole numbers ({first.entries[name].dtype}), which are not "
                    f"merged, and {first.folder} and {model.folder} have others"
                )
        yield block


def copy_rest(source: Path, folder: Path) -> None:
    """Copy what is no weights: configuration, tokenizer, licence."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        ours = path.name.lower() == "readme.md" or path.name == RECORD
        if path.is_file() and not weights and not ours and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
            sync(folder / path.name)


def _record(how: Asked, base: Checkpoint | None, models: Sequence[Checkpoint]) -> dict[str, Any]:
    """Describe what a checkpoint was made of, with the hashes of all files."""
    return {
        "method": how.name,
        "options": dict(how.options),
        "base": None if base is None else {"name": str(base.folder), "files": base.digests()},
        "parents": [
            {"name": str(model.folder), "weight": weight, "files": model.digests()}
            for model, weight in zip(models, how.weights, strict=True)
        ],
    }


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside ``target`` that becomes it when the block ends without an error.

    What a killed process left beside it is removed; a living one holds a lock on its own.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{escape(target.name)}.????????.part"):
            _remove_left(left)
        part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    except OSError as error:
        raise CheckpointError(f"{target} cannot be made: {error.strerror}") from error
    descriptor = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o777 & ~mask)
        sync(part)
        part.rename(target)  # onto nothing, or an empty folder
        sync(target.parent)
    except OSError as error:
        if isinstance(error, ModgraftError):
            raise
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}; nothing of it is left"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(descriptor)


def _remove_left(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        return  # another process is at work
    finally:
        os.close(descriptor)
