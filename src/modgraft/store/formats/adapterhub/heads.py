"""The head that ``adapters`` saves beside an adapter: weights of the host that trained with it.

Only the head of a host's own class is known here, which is saved as a whole, and not those that
``AutoAdapterModel`` adds to a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modgraft.core.errors import CheckpointError
from modgraft.store.file import TensorFile, read_json
from modgraft.store.formats.adapterhub.layout import HEAD, HEAD_TENSORS, prefix


def read(folder: Path, model: nn.Module) -> TensorFile | None:
    """Return the head in a folder, whose tensors are named as the host's; None without one.

    Raises:
        CheckpointError: for a head of another class than the host's, or with other tensors.
    """
    if not (folder / HEAD).exists():
        return None
    try:
        said = read_json((folder / HEAD).read_bytes())
        config, kind = said["config"], said["model_class"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{folder / HEAD} is not a head's ({error!r:.200})") from error
    here = type(model).__name__
    if config is not None or kind != here:
        raise CheckpointError(
            f"{folder / HEAD}: the head is of a {kind!r:.60}, and this host is a {here}; a head is "
            f"read into a host of its own class (save one from there with adapters.init(model)), "
            f"or leave {HEAD} and {HEAD_TENSORS} out of the folder to load the adapter alone"
        )
    if not (folder / HEAD_TENSORS).exists():
        raise CheckpointError(
            f"{folder}: {HEAD_TENSORS} is not there (pytorch_model_head.bin is a pickle, which is "
            f"never read); save it anew with use_safetensors=True"
        )
    file, own = TensorFile(folder / HEAD_TENSORS), tensors(model)
    if unlike := sorted(own.keys() ^ file.entries.keys()):
        raise CheckpointError(
            f"{file.path}: {unlike[:3]} are in the head or in this {here}, and not in both"
        )
    return file


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a host's head by name: all that are not the base model's."""
    base = prefix(model)
    return {n: p for n, p in model.named_parameters() if base and not n.startswith(base)}


def about(model: nn.Module) -> dict[str, Any]:
    """Return what ``head_config.json`` says of a head beside what it says of every module."""
    of: Any = model.config
    return {"config": None, "label2id": of.label2id, "name": None, "num_labels": of.num_labels}
