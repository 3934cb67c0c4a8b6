"""AdapterHub's folders, as ``adapters`` saves one adapter, which may be several modules of ours.

    adapter_config.json       its configuration, its name, the host's type and class
    adapter.safetensors       its tensors; its name is a part of theirs
    head_config.json          of a head that was saved with it
    model_head.safetensors    the head's tensors

A configuration that is set to what is not computed here in the same way is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.store.file import TensorFile
from modgraft.store.formats.adapterhub import heads
from modgraft.store.formats.adapterhub.configurations import modules
from modgraft.store.formats.adapterhub.layout import (
    CONFIG,
    OTHERS,
    TENSORS,
    Module,
    Tie,
    about,
    bare,
)
from modgraft.store.formats.adapterhub.older import today
from modgraft.store.formats.base import module_name
from modgraft.store.formats.found import Found, Waiting, stored
from modgraft.store.stored import Stored

_POOL = re.compile(r".*\.prefix_tuning\.pool\.")
"""What stands in the keys of a prefix that is there again, at each layer."""


@dataclass(frozen=True)
class Adapter:
    """What one adapter's folder holds.

    Attributes:
        name: what it is called.
        version: of ``adapters``, by which it was saved.
        means: what its configuration means.
        modules: the same, with names and tensors.
        head: the head beside it.
        verify: what says whether its tensors contradict each other.
    """

    name: str
    version: str
    means: Sequence[Module]
    modules: Sequence[Found]
    head: heads.Head
    verify: Sequence[Callable[[], None]]


def read(folder: Path, model: nn.Module) -> Stored:
    """Read the adapter in a folder; see :mod:`modgraft.store.formats.base`."""
    one = found(folder, model)
    return stored(
        folder,
        one.modules,
        one.head.beside,
        one.verify,
        stem=one.name,
        composition=" >> ".join(module.name for module in one.modules),
        versions={"adapters": one.version},
    )


def found(folder: Path, model: nn.Module) -> Adapter:
    """Return what is in an adapter's folder.

    Raises:
        CheckpointError: for a damaged folder, or one that holds what is not understood.
    """
    _check_files(folder)
    said = about(folder / CONFIG, model)
    file = TensorFile(folder / TENSORS)
    try:
        means = modules(today(said, file.entries), model, said["name"])
    except ModgraftError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from error
    head = heads.read(folder, model)
    _check_undone(folder, said["model_class"], means, head)
    own = {bare(key, model): key for key in file.entries if not _POOL.match(key)}
    _check(file, own, {tie.theirs for module in means for tie in module.ties})
    name = module_name(said["name"], "adapter")
    names = _names(name, means)
    made = [
        Found(each, module.method, module.sites, _waiting(file, own, module))
        for each, module in zip(names, means, strict=True)
    ]
    again = partial(_check_again, file, own)
    return Adapter(name, said["version"] or "unknown", means, made, head, [again, head.verify])


def _waiting(file: TensorFile, own: Mapping[str, str], module: Module) -> Waiting:
    """Return the tensors of a module, which wait in a file where ``own`` says."""

    def make(tie: Tie) -> Tensor:
        try:
            return tie.read(file.tensor(own[tie.theirs]))
        except CheckpointError as error:
            raise CheckpointError(f"{file.path}: {error}; copy the folder again") from error

    return {tie.ours: (file.entries[own[tie.theirs]], partial(make, tie)) for tie in module.ties}


def _check_files(folder: Path) -> None:
    """Raise a CheckpointError for files that are not read, or lacking."""
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


def _check_undone(folder: Path, of: str, means: Sequence[Module], head: heads.Head) -> None:
    """Raise a CheckpointError for an invertible adapter that a head may undo."""
    undone = of.endswith(("AdapterModel", "ModelWithHeads")) and (head.file is None or head.undoes)
    if undone and any(module.kind == "invertible" for module in means):
        raise CheckpointError(
            f"{folder}: its inv_adapter was trained in a {of}, whose head may "
            f"undo it; it is read from a model of the host's own class, or with a head that does "
            f"not (of classes, tags or spans)"
        )


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


def _check_again(file: TensorFile, own: Mapping[str, str]) -> None:
    """Raise a CheckpointError if a prefix stands otherwise at a layer than in the model."""
    for key in file.entries:
        if _POOL.match(key):
            first = own.get(_POOL.sub("prefix_tuning.", key))
            if first is None or not torch.equal(file.tensor(first), file.tensor(key)):
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
