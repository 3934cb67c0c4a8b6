"""Merges whole checkpoints, the folders that ``save_pretrained`` writes, of any size.

A tensor is read in blocks from every checkpoint, merged, and written: what is in memory at a time
are a few blocks of :data:`BLOCK` numbers for each checkpoint. The methods of matrices
(``isotropic``, ``tsv``, ``knots``) hold one weight of each checkpoint at a time.

The new folder appears with one rename, when all of it is on the disk: until then there is none.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.files import folder_path, new_folder, read_json, write_json
from modgraft.core.precision import wide
from modgraft.store.file import DTYPES, Entry
from modgraft.store.merging.low_rank import dense
from modgraft.store.merging.methods import METHODS, SOUP, Asked, asked
from modgraft.store.merging.soup import greedy
from modgraft.store.merging.weights import INDEX, Checkpoint

BLOCK = 2**16
"""How many numbers of a tensor are merged at a time."""

RECORD = "modgraft_merge.json"
"""The file that says what a checkpoint was made of."""

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".pkl"
)  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[int, int], object]
"""Told how many numbers are merged, and how many there are."""


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
    if isinstance(models, str | Path):
        raise ModgraftError(f"merge_checkpoints({str(models)!r:.80}, …): give a list of folders")
    if (validate is not None) != (method == SOUP):
        raise ModgraftError(
            f"method={SOUP!r} takes validate=, a function of a checkpoint's folder that returns "
            f"its score, and no other method does"
        )
    soup = validate is not None
    how = asked("average" if soup else method, len(models), weights, options)
    if soup and (weights is not None or base is not None):
        raise ModgraftError(f"method={SOUP!r} takes no weights and no base: it is an average")
    if base is None and METHODS[how.name].needs_base:
        raise ModgraftError(
            f"{method} merges what models have learned since they were one; name that one: "
            f"base='folder'"
        )
    paths = [Path(each) for each in (*([] if base is None else [base]), *models)]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ModgraftError(f"{twice[0]} is named twice; say weights= in place of that")
    with ExitStack() as opened:
        several = [opened.enter_context(closing(Checkpoint(path))) for path in paths]
        for each in several[1:]:
            _check_same(several[0], each)
        size = several[0].nbytes
        with new_folder(target) as folder:
            if (free := shutil.disk_usage(folder).free) < size:
                raise CheckpointError(
                    f"{target} takes {size:,} bytes, and its disk has {free:,}; make room, or "
                    f"choose another disk"
                )
            start = None if base is None else several.pop(0)
            said: dict[str, Any] = {"method": method, "options": dict(how.options)}
            if validate is not None:
                several, scores = _chosen(several, folder, validate)
                how = asked("average", len(several), None, {})
                said |= scores
            _write(how, start, several, folder, progress)
            said["base"] = start and {"name": str(start.folder), "files": start.digests()}
            said["parents"] = [
                {"name": str(model.folder), "weight": weight, "files": model.digests()}
                for model, weight in zip(several, how.weights, strict=True)
            ]
            write_json(folder / RECORD, said)
    return target


def _chosen(
    models: Sequence[Checkpoint], part: Path, validate: Callable[[Path], float]
) -> tuple[list[Checkpoint], dict[str, Any]]:
    """Choose the models of a greedy soup; return them, and the scores."""
    named = {str(model.folder): model for model in models}

    def score(names: Sequence[str]) -> float:
        some = [named[name] for name in names]
        if len(some) == 1:
            return validate(some[0].folder)
        with TemporaryDirectory(dir=part) as folder:
            _write(asked("average", len(some), None, {}), None, some, Path(folder), None)
            return validate(Path(folder))

    soup = greedy(list(named), score)
    return [named[name] for name in soup.chosen], {"alone": soup.alone, "score": soup.score}


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
        there = other.entries[name]
        whole = not (entry.dtype.is_floating_point and there.dtype.is_floating_point)
        if entry.shape != there.shape or (whole and entry.dtype != there.dtype):
            ours, theirs = (f"{e.dtype} {list(e.shape)}" for e in (entry, there))
            raise CheckpointError(
                f"{name} is {ours} in {one.folder} and {theirs} in {other.folder}; checkpoints of "
                f"one shape are merged"
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
    """Write the merged tensors as the files of ``base``, or else the first model, have them, and
    copy what else is in its folder."""
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
    if len(first.shards) > 1:
        placed = {tensor: name for name, tensors in first.shards.items() for tensor in tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": first.nbytes}, "weight_map": placed})
    copy_rest(first.folder, folder)


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
    in_blocks = how.in_blocks(entry.shape)
    step, shape = (BLOCK, (-1,)) if in_blocks else (max(1, size), entry.shape)

    def read(each: Checkpoint, start: int) -> Tensor:
        return wide(each.numbers(name, start, min(start + step, size))).reshape(shape)

    def blocks() -> Iterable[list[Tensor]]:
        for start in range(0, size, step):
            origin = 0.0 if base is None else read(base, start)
            yield [read(model, start) - origin for model in models]

    parents = [str(number) for number in range(len(models))]
    for number, change in enumerate(how.merge(name, parents, entry.shape, blocks)):
        block = dense(change)
        if base is not None:
            block = read(base, number * step) + block
        block = block.flatten().to(entry.dtype)
        if not block.isfinite().all():
            if (same := _same(first, models, name, number * step, block.numel())) is not None:
                yield same
                continue
            bad = [m.folder for m in models if not read(m, number * step).isfinite().all()]
            why = f"{bad[0]} does" if bad else f"it is too large for {entry.dtype}"
            raise CheckpointError(f"the merge of {name} holds NaN or infinity: {why}")
        yield block


def _same(
    first: Checkpoint, models: Sequence[Checkpoint], name: str, start: int, count: int
) -> Tensor | None:
    """Return numbers that all have alike, such as a mask of −∞; None where they have others."""
    own = first.numbers(name, start, start + count)
    others = (model.numbers(name, start, start + count) for model in models)
    alike = all(torch.equal(own, other) for other in others)  # NaN is like nothing
    return own if alike else None


def _equal(first: Checkpoint, models: Sequence[Checkpoint], name: str) -> Iterator[Tensor]:
    """Give a tensor of whole numbers, which all must have alike; of a count of batches the most."""
    size = math.prod(first.entries[name].shape)
    if name.endswith("num_batches_tracked"):  # of nn.BatchNorm2d, whose averages are merged
        yield torch.stack([each.numbers(name) for each in (first, *models)]).amax(0)
        return
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
    for path in source.rglob("*"):
        at = path.relative_to(source)
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        ours = path.name.lower() == "readme.md" or path.name == RECORD
        if path.is_file() and not weights and not ours and not any(p[0] == "." for p in at.parts):
            (folder / at).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / at)
