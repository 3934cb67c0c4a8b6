"""AdapterHub's folders, as ``adapters`` saves one adapter, which may be several modules of ours.

    adapter_config.json       its configuration, its name, the host's type and class
    adapter.safetensors       its tensors; its name is a part of theirs
    head_config.json          of a head that was saved with it
    model_head.safetensors    the head's tensors

A configuration that is set to what is not computed here in the same way is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.store.card import Card, Saved, to_json
from modgraft.store.file import Entry, TensorFile
from modgraft.store.formats.adapterhub import heads
from modgraft.store.formats.adapterhub.configurations import modules
from modgraft.store.formats.adapterhub.layout import (
    CONFIG,
    OTHERS,
    TENSORS,
    Module,
    about,
    bare,
)
from modgraft.store.formats.base import module_name
from modgraft.store.stored import Stored

_POOL = re.compile(r".*\.prefix_tuning\.pool\.")
"""What stands in the keys of a prefix that is there again, at each layer."""


def read(folder: Path, model: nn.Module) -> Stored:
    """Read the adapter in a folder; see :mod:`modgraft.store.formats.base`."""
    for name in OTHERS:
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder}: {name} is there, and setups and embeddings of adapters are "
                f"not read; {CONFIG} and {TENSORS} alone in a folder are the adapter without"
            )
    if not (folder / TENSORS).exists():
        raise CheckpointError(
            f"{folder}: {TENSORS} is not there (pytorch_adapter.bin is a pickle, which is never "
            f"read); save it anew: model.save_adapter(folder, name, use_safetensors=True)"
        )
    said = about(folder / CONFIG, model)
    name = said["name"]
    try:
        found = modules(said["config"], model, name)
    except ModgraftError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    file, head = TensorFile(folder / TENSORS), heads.read(folder, model)
    undone = said["model_class"].endswith("AdapterModel") and (head.file is None or head.undoes)
    if undone and any(module.kind == "invertible" for module in found):
        raise CheckpointError(
            f"{folder}: its inv_adapter was trained in a {said['model_class']}, whose head may "
            f"undo it; it is read from a model of the host's own class, or with a head that does "
            f"not (of classes, tags or spans)"
        )
    own = {bare(key, model): key for key in file.entries if not _POOL.match(key)}
    _check(file, own, {tie.theirs for module in found for tie in module.ties})
    names = _names(module_name(name, "adapter"), found)

    def tensors() -> Mapping[str, Tensor]:
        every = {key: file.tensor(whole) for key, whole in own.items()}
        _check_again(file, every)
        made = {}
        for each, module in zip(names, found, strict=True):
            for tie in module.ties:
                try:
                    tensor = tie.read(every[tie.theirs])
                except CheckpointError as error:
                    raise CheckpointError(f"{file.path}: {error}; copy the folder again") from error
                made[f"{each}:{tie.ours}"] = tensor.contiguous()
        return made | {f":{n}": tensor for n, tensor in head.tensors().items()}

    saved = [
        Saved(name=each, **to_json(module.method), sites=list(module.sites))
        for each, module in zip(names, found, strict=True)
    ]
    card = Card(
        names=names,
        modules=saved,
        composition=" >> ".join(names),
        beside=sorted(head.names),
        versions={"adapters": said["version"]},
        made="",
    )
    entries: dict[str, Entry] = {
        f"{each}:{tie.ours}": file.entries[own[tie.theirs]]
        for each, module in zip(names, found, strict=True)
        for tie in module.ties
    }
    entries |= {f":{n}": entry for n, entry in head.entries.items()}
    return Stored(folder, card, entries, tensors)


def _check(file: TensorFile, own: Mapping[str, str], expected: set[str]) -> None:
    """Raise a CheckpointError for tensors that are lacking or not understood."""
    if own.keys() == expected:
        return
    if any("shared_parameters" in key for key in expected - own.keys()):
        raise CheckpointError(
            f"{file.path}: the rule that its Compacter's layers share is not in it (adapters "
            f"leaves it out in a T5, or a model without a head); save one with "
            f"shared_phm_rule=False, or from a model with a head"
        )
    lacking, extra = sorted(expected - own.keys()), sorted(own.keys() - expected)
    raise CheckpointError(
        f"{file.path}: {len(lacking)} tensors are missing {lacking[:3]} and {len(extra)} are "
        f"not understood {extra[:3]}; the adapter is of another host, or of another kind than "
        f"its configuration says"
    )


def _check_again(file: TensorFile, every: Mapping[str, Tensor]) -> None:
    """Raise a CheckpointError if a prefix stands otherwise at a layer than in the model."""
    for key in file.entries:
        if _POOL.match(key):
            first = every.get(_POOL.sub("prefix_tuning.", key))
            if first is None or not torch.equal(first, file.tensor(key)):
                raise CheckpointError(
                    f"{file.path}: {key} is there again, and is not the prefix of the model; copy "
                    f"the folder again"
                )


def _names(name: str, found: Sequence[Module]) -> list[str]:
    """Return the names of modules: the adapter's, and where there are several their kind."""
    if len(found) == 1:
        return [name]
    kinds = [module.kind for module in found]
    return [
        f"{name}_{kind}{kinds[: i + 1].count(kind) if kinds.count(kind) > 1 else ''}"
        for i, kind in enumerate(kinds)
    ]
