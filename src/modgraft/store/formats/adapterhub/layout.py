"""Where the tensors of a module of ours lie in a folder of ``adapters``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modgraft.computation.base import Computation
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.store.file import read_json, read_small

CONFIG, TENSORS = "adapter_config.json", "adapter.safetensors"
HEAD, HEAD_TENSORS = "head_config.json", "model_head.safetensors"
FUSION, FUSION_TENSORS = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
OTHERS = ("adapter_setup.json", "embedding.pt")
KEYS = {"config", "hidden_size", "model_class", "model_name", "model_type", "name", "version"}
KEYS |= {"config_id", "type"}  # of earlier versions
STARTS = {"init_weights", "init_weights_seed", "phm_c_init", "phm_init_range"}
STARTS |= {"hypercomplex_nonlinearity"}  # how it was drawn says nothing of what it is now

Places = list[tuple[str, str]]
"""The path of theirs, without the base model's name, and our label."""


@dataclass(frozen=True)
class Tie:
    """A tensor of ours, ``<label>:<key>``, and where it lies in theirs.

    Attributes:
        ours: its name.
        theirs: the key of theirs, without the base model's name.
        turned: whether the last two axes are changed for each other.
        piece: which of how many, where several of ours are one of theirs.
        vectors: of a flat prefix, how many vectors of how many heads each piece is.
        above: of a column, what ours is counted from: theirs is the sum.
    """

    ours: str
    theirs: str
    turned: bool = False
    piece: tuple[int, int] = (0, 1)
    vectors: tuple[int, int] | None = None
    above: Tensor | None = None

    def read(self, tensor: Tensor) -> Tensor:
        """Return ours of theirs.

        Raises:
            CheckpointError: for a shape that theirs never has.
        """
        number, count = self.piece
        length, heads = self.vectors or (1, 1)
        if (
            (self.turned and tensor.dim() != 3)
            or not tensor.dim()
            or len(tensor) % (count * length * heads)
            or (self.vectors and tensor.dim() != 1)
        ):
            raise CheckpointError(f"{self.theirs} is {list(tensor.shape)}, which it never is")
        if self.vectors is not None:  # [k · pieces · heads · d]
            return tensor.view(length, count, heads, -1)[:, number]
        tensor = tensor.chunk(count)[number]
        if self.is_column:
            tensor = tensor.reshape(-1)
        if self.above is not None:
            if tensor.shape != self.above.shape:
                raise CheckpointError(f"{self.theirs} is {list(tensor.shape)}, which it never is")
            tensor = tensor - self.above
        return tensor.transpose(1, 2) if self.turned else tensor

    @property
    def is_column(self) -> bool:
        """Whether theirs is ``[n, 1]`` where ours is ``[n]``."""
        return self.ours.endswith((":phi", ":magnitude"))

    def column(self, tensor: Tensor) -> Tensor:
        """Return ours as it stands in theirs."""
        return (tensor if self.above is None else tensor + self.above)[:, None]


def written(ties: Sequence[Tie], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return theirs of ours."""
    pieces: dict[str, list[tuple[Tie, Tensor]]] = {}
    for tie in ties:
        pieces.setdefault(tie.theirs, []).append((tie, own[tie.ours]))
    made = {}
    for key, some in pieces.items():
        some.sort(key=lambda each: each[0].piece)
        if some[0][0].vectors is not None:
            made[key] = torch.stack([t for _, t in some], 1).flatten()
            continue
        shaped = [tie.column(t) if tie.is_column else t for tie, t in some]
        whole = torch.cat(shaped)
        made[key] = whole.transpose(1, 2) if some[0][0].turned else whole
    return made


@dataclass(frozen=True)
class Module:
    """What is one module of ours in one of their adapters.

    Attributes:
        kind: a word for it, by which it is called where there are several.
        method: the computation.
        sites: the labels of its sites.
        ties: its tensors.
        left_out: the paths of theirs where it would stand too, in layers that it leaves out.
    """

    kind: str
    method: Computation
    sites: Sequence[str]
    ties: Sequence[Tie]
    left_out: Sequence[str] = ()


def type_of(model: nn.Module) -> str:
    """Return the type of a host as transformers names it, such as ``bert``."""
    return str(getattr(getattr(model, "config", None), "model_type", None))


def prefix(model: nn.Module) -> str:
    """Return the path of the base model in a model, with its point."""
    base = getattr(model, "base_model_prefix", "")
    return f"{base}." if base and isinstance(getattr(model, base, None), nn.Module) else ""


def bare(key: str, model: nn.Module) -> str:
    """Return a key without the base model's name."""
    base = getattr(model, "base_model_prefix", "")
    return key.removeprefix(f"{base}.") if base else key


def check(config: Mapping[str, Any], known: Mapping[str, Any], read: set[str]) -> dict[str, Any]:
    """Return the whole configuration, if what is not in ``read`` has the one value we compute."""
    if unknown := config.keys() - known.keys():
        raise ModgraftError(f"{', '.join(sorted(unknown))} is not understood")
    for key in sorted(config.keys() & read):
        if kind_of(config[key]) != kind_of(known[key]):
            raise ModgraftError(
                f"{key}={config[key]!r:.60} is not understood; it is as {known[key]}"
            )
    for key in sorted(known.keys() - read - STARTS):
        if key in config and config[key] != known[key]:
            raise ModgraftError(
                f"{key}={config[key]!r:.60} is not computed here (only {known[key]!r} is)"
            )
    return {**known, **config}


def kind_of(value: Any) -> object:
    """Return what sort of value stands in a configuration; a list is of texts or of numbers."""
    if isinstance(value, list):
        return list, {kind_of(one) for one in value} <= {str} or {
            kind_of(one) for one in value
        } <= {int}
    return int if type(value) is float and value == value else type(value)


def content(path: Path, of: str) -> dict[str, Any]:
    """Return the object in a file.

    Raises:
        CheckpointError: for a file that cannot be read, or holds something else.
    """
    try:
        said = read_json(read_small(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not {of} ({error}); copy the folder again") from error
    if not isinstance(said, dict):
        raise CheckpointError(f"{path} is not {of}: it holds no object of names and values")
    return said


def about(path: Path, model: nn.Module, *more: str) -> dict[str, Any]:
    """Return what a file says of an adapter or a fusion, for this type of host.

    Raises:
        CheckpointError: for anything else.
    """
    said = content(path, "an adapter's")
    for key in ("name", "model_class"):
        if not isinstance(said.get(key), str):
            raise CheckpointError(f"{path} is not an adapter's: it says no {key}")
    said["version"] = version = said.get("version")
    if not isinstance(version, str | None):
        raise CheckpointError(f"{path}: version={version!r:.40} is none of adapters")
    if not isinstance(said.get("config"), dict if more else dict | str):
        raise CheckpointError(f"{path}: config={said.get('config')!r:.60} is no configuration")
    if unknown := said.keys() - {*KEYS, *more}:
        raise CheckpointError(f"{path}: {', '.join(sorted(unknown))} is not understood")
    if said.get("model_type") != type_of(model):
        raise CheckpointError(
            f"{path.parent}: the adapter is of a {said.get('model_type')!r:.40}, and this host is "
            f"a {type_of(model)}; load it into the model it was trained in"
        )
    return said
