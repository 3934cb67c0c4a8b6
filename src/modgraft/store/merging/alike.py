"""Compares what checkpoints say of themselves, before their numbers are merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modgraft.core.errors import CheckpointError, warn
from modgraft.core.files import read_json
from modgraft.store.merging.weights import Checkpoint

_BESIDE = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"}
"""What of a configuration changes no function of the weights."""


def check_alike(several: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints of other tensors or shapes; warn of another configuration.

    What some have alone may differ: whole numbers, such as positions that a model counts itself,
    of which the first one's stay; and copies of tied embeddings, which are left out.

    Raises:
        CheckpointError: with the tensor.
    """
    first, *others = several
    for other in others:
        for one, two in ((first, other), (other, first)):
            for name in one.entries.keys() - two.entries.keys():
                if _is_tied(one, name) and _is_tied(two):
                    one.leave_out(name)
        _check_tensors(first, other)
        _compare_configurations(first, other)


def _check_tensors(one: Checkpoint, other: Checkpoint) -> None:
    lost = set(one.entries).symmetric_difference(other.entries)
    both = one.entries | other.entries
    if lost_weights := sorted(name for name in lost if both[name].dtype.is_floating_point):
        name = lost_weights[0]
        there, not_there = (one, other) if name in one.entries else (other, one)
        raise CheckpointError(
            f"{one.folder} and {other.folder} are not of one architecture: {len(lost)} tensors are "
            f"in one alone; {name} is in {there.folder} and not in {not_there.folder}"
        )
    for name in sorted(lost):
        there, not_there = (one, other) if name in one.entries else (other, one)
        warn(
            f"{name} is in {there.folder} alone, and not in {not_there.folder}; whole numbers are "
            f"not merged: the first one's stay, others are left out",
        )
        if there is other:
            other.leave_out(name)
    for name in one.entries.keys() & other.entries.keys():
        _check_shape(name, one, other)


def _check_shape(name: str, one: Checkpoint, other: Checkpoint) -> None:
    entry, there = one.entries[name], other.entries[name]
    whole = not (entry.dtype.is_floating_point and there.dtype.is_floating_point)
    if entry.shape != there.shape or (whole and entry.dtype != there.dtype):
        ours, theirs = (f"{e.dtype} {list(e.shape)}" for e in (entry, there))
        rows = len(entry.shape) == 2 and entry.shape[1:] == there.shape[1:]
        more = "; of other vocabularies, see resize_token_embeddings" if rows else ""
        raise CheckpointError(
            f"{name} is {ours} in {one.folder} and {theirs} in {other.folder}; checkpoints of "
            f"one shape are merged{more}"
        )


def _is_tied(checkpoint: Checkpoint, name: str | None = None) -> bool:
    """Return whether the embeddings are tied to the head, and ``name`` is a copy of another one."""
    path = checkpoint.folder / "config.json"
    if not path.is_file() or _said(path).get("tie_word_embeddings") is not True:
        return False
    return name is None or any(
        checkpoint.equal(name, other)
        for other, entry in checkpoint.entries.items()
        if other != name and entry.shape == checkpoint.entries[name].shape
    )


def _said(path: Path) -> dict[str, Any]:
    return read_json(path, what="a model's configuration", remedy="copy it again")


def _compare_configurations(one: Checkpoint, other: Checkpoint) -> None:
    paths = [each.folder / "config.json" for each in (one, other)]
    if not all(path.is_file() for path in paths):
        return
    ours, theirs = map(_said, paths)
    keys = sorted((ours.keys() | theirs.keys()) - _BESIDE)
    if differ := [key for key in keys if ours.get(key) != theirs.get(key)]:
        warn(
            f"the configurations of {one.folder} and {other.folder} differ in "
            f"{', '.join(differ)[:200]}; the first one's is written",
        )
