"""Modules of ours as ``adapters`` saves one adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.files import locked, write_json
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
    implants, model = [host._implants[name] for name in names], host.model
    _check_folder(folder)
    mixtures = [i for i in implants if isinstance(i.method, Mixture)]
    if mixtures:
        _write_fusion(host, mixtures[0], names, folder)
        return
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
    if left := [each for each in stale if (folder / each).exists()]:
        raise CheckpointError(f"{folder} holds {left[0]} of another adapter; choose another folder")
    with locked(folder, TENSORS, CONFIG, HEAD_TENSORS, HEAD):
        for each in (CONFIG, HEAD):  # so that a kill leaves no mixture of two
            (folder / each).unlink(missing_ok=True)
        write_tensors(made, folder / TENSORS, {})
        write_json(folder / CONFIG, _about(config, name, model))
        if head:
            write_tensors(head, folder / HEAD_TENSORS, {})
            write_json(folder / HEAD, _about(config, name, model) | of_head)


def _write_fusion(host: HostLike, mixture: Implant, names: Sequence[str], folder: Path) -> None:
    """Write a mixture, and its modules to folders in that folder."""
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
    if left := [each for each in (CONFIG, TENSORS, HEAD, *OTHERS) if (folder / each).exists()]:
        raise CheckpointError(f"{folder} holds {left[0]} of an adapter; choose another folder")
    said = _about(config, ",".join(of), model) | {"adapter_names": list(of)}
    for member in of:
        write(host, [member], folder / member)
    with locked(folder, FUSION_TENSORS, FUSION):
        (folder / FUSION).unlink(missing_ok=True)
        write_tensors(tensors, folder / FUSION_TENSORS, {})
        write_json(folder / FUSION, said)


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


def _check_folder(folder: Path) -> None:
    """Raise a CheckpointError for a folder of other things."""
    if folder.is_dir() and any(folder.iterdir()) and not holds(folder):
        raise CheckpointError(f"{folder} is there and holds no adapter; choose another folder")


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
