"""Compares what checkpoints say of themselves, before their numbers are merged."""

from __future__ import annotations

import warnings

from modgraft.core.errors import CheckpointError
from modgraft.core.files import read_json
from modgraft.store.merging.weights import Checkpoint

_BESIDE = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"}
"""What of a configuration changes no function of the weights."""


def check_alike(one: Checkpoint, other: Checkpoint) -> None:
    """Refuse checkpoints of other tensors or shapes; warn of another configuration.

    Raises:
        CheckpointError: with the tensor.
    """
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
    _compare_configurations(one, other)


def _compare_configurations(one: Checkpoint, other: Checkpoint) -> None:
    paths = [each.folder / "config.json" for each in (one, other)]
    if not all(path.is_file() for path in paths):
        return
    ours, theirs = (
        read_json(p, what="a model's configuration", remedy="copy it again") for p in paths
    )
    keys = sorted((ours.keys() | theirs.keys()) - _BESIDE)
    if differ := [key for key in keys if ours.get(key) != theirs.get(key)]:
        warnings.warn(
            f"the configurations of {one.folder} and {other.folder} differ in "
            f"{', '.join(differ)[:200]}; the first one's is written",
            stacklevel=5,  # who called merge_checkpoints
        )
