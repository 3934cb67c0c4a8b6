"""Reads folders of the first format: ``module.json``, and the tensors in two files.

It is written no more. Its fingerprint is of names, shapes and 256 values of each weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from modgraft.core.errors import CheckpointError
from modgraft.store.card import CARD_FILE, Card, Saved, validated
from modgraft.store.file import TensorFile, is_there, read_json, read_small
from modgraft.store.stored import Stored

HOST_FILE = "host.safetensors"


class FormerCard(BaseModel):
    """The content of ``module.json`` in the first format; see :class:`Card`."""

    model_config = ConfigDict(strict=True)

    format: Literal[1]
    name: str
    type: str
    config: dict[str, Any]
    sites: list[str]
    host: dict[str, str]
    beside: list[str] = []


def stored(folder: Path, file: TensorFile) -> Stored:
    """Read the module in a folder of the first format, whose tensors are in ``file``.

    Raises:
        CheckpointError: for an incomplete folder, or a file that is no module's card.
    """
    path = folder / CARD_FILE
    if not is_there(path):
        raise CheckpointError(
            f"no module in {folder}: {file.path.name} has no card of modgraft, and {path.name} is "
            f"not there"
        )
    text = read_small(path)
    try:
        said = read_json(text)
    except ValueError as error:  # no JSON, no UTF-8
        raise CheckpointError(
            f"{path} is not a module's card ({error}); save the module again"
        ) from error
    if isinstance(said, dict) and said.get("format", 1) != 1:
        raise CheckpointError(
            f"{path}: format {said['format']!r:.40}, and {file.path.name} beside it has no card: "
            f"this version reads format 1 in this way; copy the folder again"
        )
    former: FormerCard = validated(FormerCard, said, path)
    files = [file, *([TensorFile(folder / HOST_FILE)] if former.beside else [])]
    card = Card(
        names=[former.name],
        modules=[Saved(**former.model_dump(include={"name", "type", "config", "sites", "beside"}))],
        beside=former.beside,
        host=former.host,
        versions={},
        made="",
    )

    def read() -> Mapping[str, Tensor]:
        found = {f"{former.name}:{key}": tensor for key, tensor in file.tensors().items()}
        for each in files[1:]:
            found |= {f":{key}": tensor for key, tensor in each.tensors().items()}
        return found

    entries = {f"{former.name}:{key}": entry for key, entry in file.entries.items()}
    for each in files[1:]:
        entries |= {f":{key}": entry for key, entry in each.entries.items()}
    return Stored(folder, card, lambda: entries, read)
