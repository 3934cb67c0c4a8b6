"""A fusion of ``adapters``: a mixture of bottlenecks, whose folders stand in its own or beside it.

    adapter_fusion_config.json         {config, adapter_names, …}
    model_adapter_fusion.safetensors   query, key and value at each place of the adapters

Theirs is y + Σ_j a_j V e_j with e_j the effect of adapter j, and a = softmax_j((Q y)ᵀ K e_j).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modgraft.aggregation.representation import Fuse
from modgraft.computation.adapter import Adapter
from modgraft.computation.compacter import Compacter
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.engine.implant import Implant
from modgraft.routing.mixture import Mixture
from modgraft.store.file import TensorFile
from modgraft.store.formats.adapterhub import adapter
from modgraft.store.formats.adapterhub.configurations import modules, said
from modgraft.store.formats.adapterhub.heads import Head
from modgraft.store.formats.adapterhub.layout import (
    CONFIG,
    FUSION,
    FUSION_TENSORS,
    HEAD,
    OTHERS,
    Module,
    about,
    bare,
    check,
    prefix,
)
from modgraft.store.formats.base import module_name
from modgraft.store.formats.found import Found, Waiting, stored
from modgraft.store.stored import Stored

_KNOWN: dict[str, Any] = {
    "key": True, "query": True, "value": True, "query_before_ln": False, "regularization": True,
    "residual_before": False, "temperature": False, "value_before_softmax": True,
    "value_initialized": True, "dropout_prob": None,
}  # fmt: skip
_TRAINING = {"regularization", "value_initialized"}


def read(folder: Path, model: nn.Module) -> Stored:
    """Read the fusion in a folder and the adapters that it is over."""
    path = folder / FUSION
    of = about(path, model, "adapter_names")
    _check_files(folder)
    names = of.get("adapter_names")
    if not isinstance(names, list) or not names or ",".join(map(str, names)) != of["name"]:
        raise CheckpointError(f"{path}: adapter_names={names!r:.80} are not those of its name")
    members = [adapter.found(_folder(folder, name), model) for name in names]
    called = _called(names)
    head = _head(folder, members)
    try:
        c = check({k: v for k, v in of["config"].items() if k not in _TRAINING}, _KNOWN, {"value"})
        places = _places([member.means for member in members])
    except ModgraftError as error:
        raise CheckpointError(f"{path}: {error}") from error
    unused = {path: path for path in members[0].means[0].left_out}
    name = "_".join(called)
    fused = Found(
        name=f"{name}_fusion" if name in called else name,
        method=Mixture(called, aggregate=Fuse(value=c["value"], effects=True)),
        sites=list(places),
        tensors=_waiting(
            folder,
            model,
            _keys(places, of["name"], c["value"]),
            _keys(unused, of["name"], c["value"]).keys(),
        ),
    )
    return stored(
        folder,
        [*(replace(m.modules[0], name=n) for m, n in zip(members, called, strict=True)), fused],
        head.beside,
        [check for member in members for check in member.verify],
        names=[fused.name],
        versions={"adapters": of["version"] or "unknown"},
    )


def _check_files(folder: Path) -> None:
    """Raise a CheckpointError for files that are not read with a fusion, or lacking."""
    if beside := [each for each in (CONFIG, HEAD, *OTHERS) if (folder / each).exists()]:
        raise CheckpointError(
            f"{folder}: {beside[0]} is there beside the fusion, and is not read with it; move it "
            f"to a folder of its own"
        )
    if not (folder / FUSION_TENSORS).exists():
        raise CheckpointError(
            f"{folder}: {FUSION_TENSORS} is not there (pytorch_model_adapter_fusion.bin is a "
            f"pickle, which is never read); save it anew with use_safetensors=True"
        )


def _head(folder: Path, members: Sequence[adapter.Adapter]) -> Head:
    """Return the one head that is beside the adapters of a fusion.

    Raises:
        CheckpointError: for two.
    """
    found = [member.head for member in members if member.head.file is not None]
    if len(found) > 1:
        one, two = (head.file.path.parent for head in found[:2] if head.file is not None)
        raise CheckpointError(
            f"{folder}: two of its adapters have a head each ({one}, {two}), and a host has one; "
            f"leave all but one out of their folders"
        )
    return found[0] if found else Head()


def _waiting(folder: Path, model: nn.Module, keys: Mapping[str, str], unused: Set[str]) -> Waiting:
    """Return the tensors of a fusion, which wait in its file.

    Args:
        folder: its folder.
        model: the host's.
        keys: our names by theirs.
        unused: theirs in layers that all its adapters leave out, where nothing reads them.

    Raises:
        CheckpointError: for tensors that are lacking or not understood.
    """
    file = TensorFile(folder / FUSION_TENSORS)
    own = {bare(key, model): key for key in file.entries}
    if unlike := sorted((own.keys() - unused) ^ keys.keys()):
        raise CheckpointError(
            f"{file.path}: {unlike[:3]} are in the file or meant by its adapters, and not both"
        )
    return {
        ours: (file.entries[own[key]], partial(file.tensor, own[key])) for key, ours in keys.items()
    }


def _called(names: Sequence[str]) -> list[str]:
    """Return what the adapters of a fusion are called here, where each has a name of its own."""
    found: list[str] = []
    for name in names:
        here = module_name(name, "adapter")
        more = (f"{here}_{number}" for number in count(1))
        found.append(here if here not in found else next(m for m in more if m not in found))
    return found


def _folder(folder: Path, name: object) -> Path:
    """Return the folder of an adapter of a fusion: in its own, or beside it."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        raise CheckpointError(f"{folder / FUSION}: adapter_names: {name!r:.60} is no folder's name")
    found = [each / name for each in (folder, folder.parent)]
    for each in found:
        if (each / CONFIG).is_file() and not (each / FUSION).exists():
            return each
    raise CheckpointError(
        f"{folder}: the adapter {name!r} of the fusion is neither in {found[0]} nor in {found[1]}; "
        f"save it there: model.save_adapter(folder, {name!r}, use_safetensors=True)"
    )


def _places(members: Sequence[Sequence[Module]]) -> dict[str, str]:
    """Return the paths of theirs by our labels, which all members have alike.

    Raises:
        ModgraftError: for adapters that are fused otherwise here, or not all at the same places.
    """
    for found in members:
        if len(found) != 1 or not isinstance(found[0].method, Adapter | Compacter):
            raise ModgraftError("a fusion is read over bottlenecks and Compacters in sequence")
        if set(found[0].sites) != set(members[0][0].sites):
            raise ModgraftError("the adapters of the fusion are not at the same places")
    ties = members[0][0].ties
    return {
        tie.ours.partition(":")[0]: tie.theirs.partition(".adapters.")[0]
        for tie in ties
        if ".adapters." in tie.theirs
    }


def _keys(places: Mapping[str, str], name: str, value: bool) -> dict[str, str]:
    """Return our names of a fusion's tensors by theirs."""
    words = [("query", "Q", ("weight", "bias")), ("key", "K", ("weight", "bias"))]
    words += [("value", "V", ("weight",))] * value
    return {
        f"{path}.adapter_fusion_layer.{name}.{theirs}.{part}": f"{label}:combine.{ours}.{part}"
        for label, path in places.items()
        for theirs, ours, parts in words
        for part in parts
    }


def written(
    implant: Implant, members: Sequence[Implant], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the configuration of a mixture as a fusion.

    Raises:
        ModgraftError: for another mixture, or modules that are none of their bottlenecks.
    """
    method, fuse = implant.method, getattr(implant.method, "aggregate", None)
    if not isinstance(method, Mixture) or not isinstance(fuse, Fuse):
        raise ModgraftError(
            f"{implant.name!r} is a mixture that adapters has not; it has Mixture({method!r:.60}…, "
            f"aggregate=Fuse(effects=True)) of bottlenecks"
        )
    if fuse.value and not fuse.effects:
        raise ModgraftError(
            f"{implant.name!r}: the V of adapters reads the modules' effects alone, and that of "
            f"Fuse() their results; Fuse(effects=True) is written"
        )
    places = _places([modules(said([m], model), model, m.name) for m in members])
    name, own = ",".join(m.name for m in members), implant.tensors()
    keys = _keys(places, name, fuse.value)
    static = {} if fuse.value else {"value": False, "regularization": False}
    static |= {} if fuse.value else {"value_initialized": False}
    return {prefix(model) + k: own[ours] for k, ours in keys.items()}, {**_KNOWN, **static}
