"""Read vision features of images from files, and check them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modgraft.core.errors import DataError, MissingFileError
from modgraft.core.files import is_file, read_json
from modgraft.data.records import OR_SKIP, Record, Skips

_AGAIN = "Extract the features again (modgraft.data.extract_features)"


def load_features(
    path: str | Path,
    records: Iterable[Record],
    *,
    names: str | Path | None = None,
    width: int | None = None,
    skips: Skips | None = None,
) -> dict[str, Tensor]:
    """Read the features of every record with an image, from a `.npy` or `.safetensors` file.

    The file holds one array `[n, m, d]` (or `[n, d]`, one patch each), with a JSON file {id: row}
    beside it, as mm-cot publishes them. A `.safetensors` file may instead hold a tensor `[m, d]`
    (or `[d]`) for each id. Nothing is unpickled. Rows of questions without an image are ignored.

    The file is mapped into memory: a row is read when it is used, and keeps its type (float16 stays
    float16) until a batch is made of it.

    Args:
        path: The file of features.
        records: The questions; other ids in the file are an error.
        names: The JSON file {id: row}; by default `<stem>.json` or `name_map.json` beside `path`.
        width: The width d that features must have; by default that of the first.
        skips: Collects bad questions; by default, the first one raises.

    Returns:
        Id to `[m, d]`, in the file's floating-point type.

    Raises:
        MissingFileError: The file of features or of rows does not exist.
        DataError: The format is unknown, a record lacks features or features lack a record, or
            features have another width, are not floating point, not finite, or all zero. The
            message names file, id and remedy.
    """
    file = Path(path)
    if not is_file(file):
        raise MissingFileError("there is no such file (vision features)", file=file, remedy=_AGAIN)
    records = list(records)
    if file.suffix == ".npy":
        table = _by_row(_read_npy(file), file, names)
    elif file.suffix == ".safetensors":
        tensors = _read_safetensors(file)
        single = next(iter(tensors.values())) if len(tensors) == 1 else None
        ids = {record.id for record in records}
        # a single tensor that is not named by an id is the array of all features
        whole = single is not None and (names is not None or not ids.intersection(tensors))
        table = _by_row(single, file, names) if whole and single is not None else tensors
    else:
        reason = f"features in the format {file.suffix!r} cannot be read"
        remedy = (
            "Save them as .safetensors ({id: tensor}) or .npy (one array); pickles are not read"
        )
        raise DataError(reason, file=file, remedy=remedy)
    return check_features(table, records, width=width, skips=skips, file=file)


def check_features(
    table: Mapping[str, Any],
    records: Iterable[Record],
    *,
    width: int | None = None,
    skips: Skips | None = None,
    file: str | Path = "features",
) -> dict[str, Tensor]:
    """Check the features of every record with an image, and return them as tensors `[m, d]`.

    `table` is {id: array or tensor}; the rest is as in `load_features`.
    """
    records, skips = list(records), skips or Skips(False)
    ids = {record.id for record in records} | skips.ids
    for qid in table:
        if qid not in ids:
            remedy = f"Load the questions they belong to, {OR_SKIP}"
            skips(DataError("features for an unknown question", id=qid, file=file, remedy=remedy))
    out: dict[str, Tensor] = {}
    for record in records:
        if record.image is None:
            continue
        try:
            if record.id not in table:
                remedy = f"{_AGAIN}, {OR_SKIP}"
                reason = "the question has an image, but no features"
                raise DataError(reason, id=record.id, file=file, remedy=remedy)
            out[record.id] = _check_map(table[record.id], record.id, file, width)
        except DataError as error:
            skips(error)
        else:
            width = out[record.id].shape[1]
    return out


def _check_map(value: np.ndarray | Tensor, qid: str, file: str | Path, width: int | None) -> Tensor:
    given = value.detach() if isinstance(value, Tensor) else _as_tensor(value, qid, file)
    map_ = given[None] if given.ndim == 1 else given  # [d] -> [1, d]
    remedy = f"{_AGAIN}, {OR_SKIP}"
    if not given.is_floating_point():
        reason = f"the features are {given.dtype}, not floating point"
    elif map_.ndim != 2 or 0 in map_.shape:
        reason = f"the features have shape {list(given.shape)}, expected [patches, width]"
    elif width is not None and map_.shape[1] != width:
        reason = f"the features are {map_.shape[1]} wide, expected {width}"
        remedy = f"Use the features of the one model that the module was made for, {OR_SKIP}"
    elif not torch.isfinite(map_.float()).all():  # a batch is float32
        reason = "the features hold NaN or infinity"
    elif not map_.any():
        reason = "the features are all zero, as written where an image was missing"
    else:
        return map_.contiguous()
    raise DataError(reason, id=qid, file=file, remedy=remedy)


def _as_tensor(value: Any, qid: str, file: str | Path) -> Tensor:
    """Return an array as a tensor: the same memory, if its bytes lie as torch wants them."""
    array = np.asarray(value)
    try:
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except TypeError as error:
        reason = f"the features are {array.dtype}, not floating point of 16, 32 or 64 bits"
        raise DataError(reason, id=qid, file=file, remedy=_AGAIN) from error


def _read_npy(file: Path) -> np.ndarray:
    if is_zipfile(file):
        reason = "an archive of arrays (.npz), and no .npy array"
        raise DataError(reason, file=file, remedy="Save the one array with numpy.save")
    try:
        # "c": torch warns of arrays that cannot be written, and none is written to
        array = np.lib.format.open_memmap(file, mode="c")
        if (size := file.stat().st_size) != (told := array.offset + array.nbytes):
            raise ValueError(f"it has {size} bytes, and its header tells of {told}")
        return array
    except Exception as error:  # a header is read as Python's literals, which fail in many ways
        reason = f"not a whole .npy array of numbers ({error})"
        raise DataError(reason, file=file, remedy=_AGAIN) from error


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        reason = f"not a whole .safetensors file ({error})"
        raise DataError(reason, file=file, remedy=_AGAIN) from error


def _by_row(
    array: np.ndarray | Tensor, file: Path, names: str | Path | None
) -> dict[str, np.ndarray | Tensor]:
    """Return id → its row of the array, by the JSON file of rows."""
    beside = [file.with_suffix(".json"), file.with_name("name_map.json")]
    map_file = Path(names) if names else next((f for f in beside if f.is_file()), beside[0])
    remedy = (
        f"Write {{id: row}} to it, or pass names=<file>; it says which row of {file.name} is whose"
    )
    rows = read_json(map_file, what="the rows of the features", remedy=remedy)
    if array.ndim not in (2, 3):
        reason = f"an array of shape {list(array.shape)}, expected [n, m, d] or [n, d]"
        raise DataError(reason, file=file, remedy=_AGAIN)
    out: dict[str, np.ndarray | Tensor] = {}
    for qid, row in rows.items():
        # in mm-cot's file, the rows are strings
        text = str(row) if isinstance(row, int | str) and not isinstance(row, bool) else ""
        if not text.isdecimal() or int(text) >= len(array):
            reason = f"row {row!r} is none of the {len(array)} rows of {file.name}"
            raise DataError(reason, id=qid, file=map_file, remedy="Correct the file of rows")
        out[qid] = array[int(text)]
    return out
