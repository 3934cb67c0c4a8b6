"""Modules of ours as ``adapters`` saves one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.files import together, write_json
from modgraft.engine.implant import Implant, learning_parts
from modgraft.routing.mixture import Mixture
from modgraft.store.file import write_tensors
from modgraft.store.formats.adapterhub import fusion, heads
from modgraft.store.formats.adapterhub.configurations import modules
from modgraft.store.formats.adapterhub.configurations import said as configuration_of
from modgraft.store.formats.adapterhub.layout import (
    CONFIG,
    FUSION,
    FUSION_TENSORS,
    HEAD,
    HEAD_TENSORS,
    OTHERS,
    TENSORS,
    Module,
    prefix,
    written,
)
from modgraft.store.formats.adapterhub.read import holds
from modgraft.training.host_like import HostLike

VERSION = "adapters.1.3.0"


def write(host: HostLike, names: Sequence[str], folder: Path) -> None:
    """Write modules to a folder as one adapter; see :class:`modgraft.store.formats.base.Format`.

    A mixture is written as a fusion, and its modules to folders in that folder.
    """
    mixtures = [
        i for i in (host._implants[name] for name in names) if isinstance(i.method, Mixture)
    ]
    made = _fusion(host, mixtures[0], names, folder) if mixtures else _adapter(host, names, folder)
    with together(folder, holds, "no adapter") as part:
        for name, content in made.items():
            if name.endswith(".json"):
                write_json(part / name, content)
            else:
                write_tensors(content, part / name, {})


Files = dict[str, Mapping[str, Any]]
"""What is written, by the name of the file in the folder: tensors, or what stands in JSON."""


def _adapter(host: HostLike, names: Sequence[str], folder: Path) -> Files:
    """Return the files of one adapter."""
    implants, model = [host._implants[name] for name in names], host.model
    beside = {each for i in implants for each in i.beside} | learning_parts(model)
    name = _common(names)
    head, of_head = heads.written(model, beside, name)
    config = configuration_of(implants, model)
    if config.get("phm_layer") and config["shared_phm_rule"] and not prefix(model):
        raise ModgraftError(
            f"{name!r}: of a {type(model).__name__} adapters neither saves nor loads the "
            f"rule that a Compacter's layers share; it can be written with shared=False"
        )
    made: dict[str, Tensor] = {}
    for module in modules(config, model, name):
        found = written(module.ties, _of(module, implants).tensors())
        made |= {prefix(model) + key: tensor for key, tensor in found.items()}
    stale = [*OTHERS, FUSION, "pytorch_adapter.bin", "pytorch_model_head.bin"]
    stale += [HEAD, HEAD_TENSORS] * (not head)
    _check_without(folder, stale, "another adapter")
    about = _about(config, name, model)
    files: Files = {TENSORS: made, CONFIG: about}
    return files | ({HEAD_TENSORS: head, HEAD: about | of_head} if head else {})


def _fusion(host: HostLike, mixture: Implant, names: Sequence[str], folder: Path) -> Files:
    """Return the files of a mixture, with those of its modules in folders of their names."""
    of, model = mixture.method.members, host.model
    if other := sorted({*names} - {mixture.name, *of}):
        raise ModgraftError(
            f"a folder of adapters holds one fusion and its adapters; {other[0]!r} is none of them"
        )
    if mixture.beside | learning_parts(model):
        raise ModgraftError(
            f"{mixture.name!r} trained together with weights of the host, which are not written "
            f"beside a fusion; save it as modgraft's"
        )
    tensors, config = fusion.written(mixture, [host._implants[m] for m in of], model)
    _check_without(folder, (CONFIG, TENSORS, HEAD, *OTHERS), "an adapter")
    said = _about(config, ",".join(of), model) | {"adapter_names": list(of)}
    files: Files = {FUSION_TENSORS: tensors, FUSION: said}
    for member in of:
        place = folder / member
        if place.is_dir() and any(place.iterdir()) and not holds(place):
            raise CheckpointError(f"{place} is there and holds no adapter; choose another folder")
        own = _adapter(host, [member], place)
        files |= {f"{member}/{name}": content for name, content in own.items()}
    return files


def _check_without(folder: Path, names: Sequence[str], whose: str) -> None:
    if left := [each for each in names if (folder / each).exists()]:
        raise CheckpointError(f"{folder} holds {left[0]} of {whose}; choose another folder")


def _about(config: Mapping[str, Any], name: str, model: nn.Module) -> dict[str, Any]:
    """Return what their files say of every module."""
    of: Any = model.config
    return {
        "config": config,
        "hidden_size": getattr(of, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": getattr(of, "_name_or_path", "") or None,
        "model_type": of.model_type,
        "name": name,
        "version": VERSION,
    }


def _common(names: Sequence[str]) -> str:
    """Return the beginning that names have in common, up to a ``_``; else the first name."""
    parts = [name.split("_") for name in names]
    alike = takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False))
    same = [each[0] for each in alike]
    return "_".join(same) if same and len(names) > 1 else names[0]


def _of(module: Module, implants: Sequence[Implant]) -> Implant:
    """Return the implant that is a module of a configuration."""
    kind, sites = type(module.method), set(module.sites)
    for implant in implants:
        if type(implant.method) is kind and set(implant.paths) == sites:
            return implant
    raise ModgraftError(
        f"{', '.join(i.name for i in implants)} cannot be one adapter of AdapterHub: nothing of "
        f"them is the {kind.__name__} at {', '.join(module.sites[:3])}"
    )
