"""Merges the tensors of checkpoints one by one, and writes them as the files of a new checkpoint.

A tensor is read in blocks from every checkpoint, merged, and written: what is in memory at a time
are a few blocks of :data:`modgraft.store.merging.weights.BLOCK` numbers for each checkpoint. The
methods of matrices (``isotropic``, ``tsv``, ``knots``) hold one matrix of each at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modgraft.core.errors import CheckpointError
from modgraft.core.files import write_json
from modgraft.core.precision import wide
from modgraft.store.file import DTYPES, Entry
from modgraft.store.merging.low_rank import dense
from modgraft.store.merging.matrices import Matrices, matrices
from modgraft.store.merging.table import Asked
from modgraft.store.merging.weights import BLOCK, INDEX, ONE_FILE, Checkpoint

RECORD = "modgraft_merge.json"
"""The file that says what a checkpoint was made of."""

WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".pkl"
)  # fmt: skip
"""How the names of files of weights end, in any tool's format."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[int, int], object]
"""Told how many numbers are merged, and how many there are."""


@dataclass(frozen=True)
class Merging:
    """What is merged, and how.

    Attributes:
        how: the method.
        base: what is subtracted from each model first, and added to the result; None: nothing.
        models: those that are merged.
    """

    how: Asked
    base: Checkpoint | None
    models: Sequence[Checkpoint]

    @property
    def first(self) -> Checkpoint:
        """The checkpoint whose types, files and configuration the new one has."""
        return self.models[0] if self.base is None else self.base

    @cached_property
    def _matrices(self) -> dict[str, Matrices | None]:
        """What each tensor is as matrices, where the method asks for that."""
        return matrices(self.first) if self.how.of_matrices else {}

    def write(self, folder: Path, progress: Progress | None = None) -> list[str]:
        """Write the merged tensors as the first one's files have them, and copy what else it has.

        Returns:
            The tensors that a method of matrices averaged though they have two axes or more.

        Raises:
            CheckpointError: for whole numbers that differ, or a result that holds NaN or infinity.
        """
        entries = self.first.entries
        shards = {name: tensors for name, tensors in self.first.shards.items() if tensors}
        done, every = 0, sum(math.prod(entry.shape) for entry in entries.values())
        for name, tensors in shards.items():
            with (folder / name).open("wb") as file:
                file.write(_head({tensor: entries[tensor] for tensor in tensors}))
                for tensor in tensors:
                    for block in self._merged(tensor):
                        file.write(block.contiguous().view(torch.uint8).numpy().data)
                        done += block.numel()
                        if progress is not None:
                            progress(done, every)
        if shards.keys() != {ONE_FILE}:
            placed = {tensor: name for name, tensors in shards.items() for tensor in tensors}
            size = {"total_size": self.first.nbytes}
            write_json(folder / INDEX, {"metadata": size, "weight_map": placed})
        copy_rest(self.first.folder, folder)
        return sorted(name for name, found in self._matrices.items() if found is None)

    def _merged(self, name: str) -> Iterator[Tensor]:
        """Merge one tensor; give it block by block, as vectors of the type it is written in."""
        entry = self.first.entries[name]
        size = math.prod(entry.shape)
        if not entry.dtype.is_floating_point:
            yield from self._equal(name, size)
        elif (found := self._matrices.get(name)) is None:
            yield from self._part(name, name, 0, size, BLOCK, (-1,))
        else:
            step = found.rows * found.columns
            for i in range(found.count):
                label = name if found.count == 1 else f"{name}:{i}"
                shape = found.rows, found.columns
                yield from self._part(name, label, i * step, (i + 1) * step, step, shape)

    def _part(
        self, name: str, label: str, begin: int, end: int, step: int, shape: Sequence[int]
    ) -> Iterator[Tensor]:
        """Merge the numbers ``begin`` to ``end`` of a tensor, ``step`` at a time, each ``shape``.

        What the method draws at random depends on ``label``, and on the model's place in the list.
        """
        kind = self.first.entries[name].dtype

        def read(each: Checkpoint, start: int) -> Tensor:
            return wide(each.numbers(name, start, min(start + step, end))).reshape(shape)

        def blocks() -> Iterable[list[Tensor]]:
            for start in range(begin, end, step):
                origin = 0.0 if self.base is None else read(self.base, start)
                yield [read(model, start) - origin for model in self.models]

        parents = [str(number) for number in range(len(self.models))]
        merged = self.how.merge(label, parents, shape, blocks)
        for start, change in zip(range(begin, end, step), merged, strict=True):
            block = dense(change)
            if self.base is not None:
                block = read(self.base, start) + block
            block = block.flatten().to(kind)
            if not block.isfinite().all():
                if (same := self._same(name, start, block.numel())) is not None:
                    yield same
                    continue
                every = [*self.models, *([] if self.base is None else [self.base])]
                bad = [m.folder for m in every if not read(m, start).isfinite().all()]
                why = f"{bad[0]} does" if bad else f"it is too large for {kind}"
                raise CheckpointError(f"the merge of {name} holds NaN or infinity: {why}")
            yield block

    def _same(self, name: str, start: int, count: int) -> Tensor | None:
        """Return numbers that all have alike, such as a mask of −∞; None where some differ."""
        own = self.first.numbers(name, start, start + count)
        others = (model.numbers(name, start, start + count) for model in self.models)
        alike = all(torch.equal(own, other) for other in others)  # NaN is like nothing
        return own if alike else None

    def _equal(self, name: str, size: int) -> Iterator[Tensor]:
        """Give a tensor of whole numbers, alike in all that have it; of counts the largest."""
        have = [model for model in self.models if name in model.entries]
        if name.endswith("num_batches_tracked"):  # of nn.BatchNorm2d, whose averages are merged
            yield torch.stack([each.numbers(name) for each in (self.first, *have)]).amax(0)
            return
        for start in range(0, size, BLOCK):
            end = min(start + BLOCK, size)
            block = self.first.numbers(name, start, end)
            for model in have:
                if not torch.equal(block, model.numbers(name, start, end)):
                    raise CheckpointError(
                        f"{name} holds whole numbers ({block.dtype}), which are not merged, and "
                        f"{self.first.folder} and {model.folder} have others"
                    )
            yield block


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


def copy_rest(source: Path, folder: Path) -> None:
    """Copy what is no weights: configuration, tokenizer, licence."""
    for path in source.rglob("*"):
        at = path.relative_to(source)
        weights = path.suffix in WEIGHTS or path.name.endswith(".index.json")
        ours = path.name.lower() == "readme.md" or path.name == RECORD
        if path.is_file() and not weights and not ours and not any(p[0] == "." for p in at.parts):
            (folder / at).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / at)
