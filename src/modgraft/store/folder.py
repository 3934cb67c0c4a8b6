"""Save a module to a folder and load it: ``module.json`` (its card) and ``module.safetensors``.

Weights of the host that trained with the module, such as a classifier's, are beside it in
``host.safetensors``, and are written into the host that it is loaded into.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from modgraft.computation.base import Computation
from modgraft.core.config import C, Configured, resolve
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.engine.implant import Implant, learning_parts
from modgraft.routing.mixture import Mixture
from modgraft.store.fingerprint import (
    fingerprint,
    half_fingerprints,
    is_in_another_precision,
)
from modgraft.training.host_like import HostLike

FORMAT = 1


class Card(BaseModel):
    """The content of ``module.json``.

    Attributes:
        format: the version of this format.
        name: the module's.
        type: the class of its computation.
        config: the arguments of that class; a computation among them has a type and config too.
        sites: the labels of its sites.
        host: the :func:`fingerprint` of the host that it was trained in, without those weights, and
            that in half precision.
        beside: the names of the host's weights that trained with it, which are in the folder too.
    """

    model_config = ConfigDict(strict=True)

    format: int
    name: str
    type: str
    config: dict[str, Any]
    sites: list[str]
    host: dict[str, str]
    beside: list[str] = []


def save(implant: Implant, model: nn.Module, folder: Path) -> Path:
    """Write a module to ``folder``: its card, its tensors, and the host's that trained with it.

    The folder appears whole or not at all, and replaces a module that is there already.

    Args:
        implant: the module.
        model: the host's model, whose fingerprint goes into the card.
        folder: where to.

    Raises:
        CheckpointError: for a folder that is there and holds no module.
    """
    beside = sorted(implant.beside | learning_parts(model))
    card = Card(
        format=FORMAT,
        name=implant.name,
        **to_json(implant.method),
        sites=list(implant.paths),
        host={**fingerprint(model, beside), **half_fingerprints(model, beside)},
        beside=beside,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    whole = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(implant.tensors(), whole / "module.safetensors")
        if beside:
            _write({k: model.get_parameter(k) for k in beside}, whole / "host.safetensors")
        (whole / "module.json").write_text(
            json.dumps(dict(card), indent=2) + "\n", encoding="utf-8"
        )
        if folder.exists():
            if not (folder / "module.json").is_file():
                raise CheckpointError(
                    f"{folder} is there and holds no module; choose another folder"
                )
            shutil.rmtree(folder)
        whole.replace(folder)
    except BaseException:
        shutil.rmtree(whole, ignore_errors=True)
        raise
    return folder


def _write(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    whole = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    save_file(whole, file, metadata={"format": "pt"})


def load(host: HostLike, folder: Path, name: str | None, *, strict: bool) -> Implant:
    """Implant the module saved in ``folder``.

    Args:
        host: where to implant it.
        folder: where :func:`save` put it.
        name: its name in this host; None: the one it was saved under.
        strict: whether the host must be the one it was trained in, weight for weight.

    Raises:
        CheckpointError: for an incomplete folder, tensors that do not fit or hold NaN, weights of
            the host that another module needs otherwise, or (with ``strict``) a module trained in
            another host. The host is then as it was.
    """
    card, tensors = read(folder)
    beside = _read_beside(folder, card, host)
    here, there = fingerprint(host.model, beside), card.host
    differs = [k for k in here if here[k] != there.get(k)]
    if strict and differs:
        rounded = differs == ["weights"] and is_in_another_precision(host.model, there, beside)
        other = "this host in another precision" if rounded else "another host"
        raise CheckpointError(
            f"{folder}: the module was trained in {other} ({', '.join(differs)} differ: "
            f"{there.get('architecture')} there, {here['architecture']} here); load it into the "
            f"host it was trained in, or say host.load(..., strict=False) to try it all the same"
        )
    method = from_json({"type": card.type, "config": card.config}, folder, Computation)
    finds_sites = isinstance(method, Mixture) or card.sites == [""]
    at = None if finds_sites else card.sites
    name = name or card.name
    expect = None if at is None else len(card.sites)
    one = len(method.task_names(name)) == 1  # of several tasks none is in force by itself
    try:
        implant = host.implant(name, method, at, expect=expect, active=one)
    except ModgraftError:
        raise
    except Exception as error:  # torch's, of sizes that no memory has
        why = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{folder}: {type(method).__name__} cannot be made as its card says "
            f"({type(error).__name__}: {why}); there is no memory for it here, or the card was "
            f"changed: copy the folder again"
        ) from error
    try:
        _fill(implant, tensors, folder)
        host._implants.put_beside(implant, host.model, beside)
    except BaseException:
        host.remove(name)
        raise
    return implant


def read(folder: Path) -> tuple[Card, dict[str, torch.Tensor]]:
    """Read a saved module's card and its tensors.

    Raises:
        CheckpointError: for an incomplete folder, or a file that is no module's card.
    """
    path = folder / "module.json"
    if not path.is_file():
        raise CheckpointError(f"no module in {folder}: {path.name} is not there")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8
        raise CheckpointError(
            f"{path} is not a module's card ({error}); save the module again"
        ) from error
    if isinstance(said, dict) and said.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{path}: format {said['format']!r}, this version reads {FORMAT}")
    try:
        card = Card.model_validate(said)
    except ValidationError as error:
        why = "; ".join(f"{e['loc'][0] if e['loc'] else 'it'}: {e['msg']}" for e in error.errors())
        raise CheckpointError(
            f"{path} is not a module's card ({why}); save the module again"
        ) from error
    return card, _read_tensors(folder / "module.safetensors")


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); it is missing or cut short, or was changed: copy "
            f"the folder again"
        ) from error


def _read_beside(folder: Path, card: Card, host: HostLike) -> dict[str, torch.Tensor]:
    """Read the weights of the host that trained with the module, if they can be written into it.

    Raises:
        CheckpointError: for a weight that this host has not, or not in that shape, or that trained
            with another of its modules to another value.
    """
    if not card.beside:
        return {}
    tensors = _read_tensors(folder / "host.safetensors")
    own = dict(host.model.named_parameters())
    for name in card.beside:
        stored, found = tensors.get(name), own.get(name)
        if stored is None or found is None or stored.shape != found.shape:
            said = ["is not there" if t is None else f"is {list(t.shape)}" for t in (stored, found)]
            raise CheckpointError(
                f"{folder}: {card.name!r} was trained together with the host's {name}, which "
                f"{said[0]} in the folder and {said[1]} in this host; make the host as it was there"
            )
        if not torch.isfinite(stored).all():
            raise CheckpointError(
                f"{folder}: {name} holds NaN or infinity; the run that wrote it had diverged"
            )
        users = [n for n, implant in host._implants.items() if name in implant.beside]
        if users and not torch.equal(stored.to(found), found):
            raise CheckpointError(
                f"{folder}: {card.name!r} was trained together with the host's {name}, and so was "
                f"{users[0]!r} here, to another value; one host has room for one of them: "
                f"host.remove({users[0]!r}) first, or load it into another host"
            )
    return tensors


def _fill(implant: Implant, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Copy saved tensors into a module, which is resized where training decides a size."""
    present = implant.tensors()
    if present.keys() != tensors.keys():
        extra, lacking = tensors.keys() - present.keys(), present.keys() - tensors.keys()
        raise CheckpointError(
            f"{folder}: {len(lacking)} tensors are missing {sorted(lacking)[:3]} and {len(extra)} "
            f"are not the module's {sorted(extra)[:3]}; the file and its card are of two modules"
        )
    for path, place in zip(implant.paths, implant.places, strict=True):
        if stored := {k: tensors[f"{path}:{k}"] for k in place.state_dict()}:
            place.resize_to(stored)  # type: ignore[operator]
    present = implant.tensors()
    with torch.no_grad():
        for key, tensor in tensors.items():
            if tensor.shape != present[key].shape:
                raise CheckpointError(
                    f"{folder}: {key} is {list(tensor.shape)} where this host needs "
                    f"{list(present[key].shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"{folder}: {key} holds NaN or infinity; the run that wrote it had diverged"
                )
            present[key].copy_(tensor)


def to_json(method: Configured) -> dict[str, Any]:
    """Describe a computation by its type and its constructor's arguments, nested ones likewise.

    Returns:
        ``{"type": "LoRA", "config": {"rank": 8, …}}``.
    """
    config = {
        key: to_json(value) if isinstance(value, Configured) else value
        for key, value in method.config().items()
    }
    return {"type": type(method).__name__, "config": config}


def from_json(said: Any, folder: Path, kind: type[C]) -> C:
    """Make the computation that :func:`to_json` described.

    Args:
        said: the description.
        folder: where it was read, for error messages.
        kind: the base class it must have.

    Raises:
        CheckpointError: for a description that is not a type and its arguments.
        UnknownNameError: for a type that nobody has defined.
        ModgraftError: for arguments that the type refuses.
    """
    match said:
        case {"type": str() as name, "config": dict() as config} if len(said) == 2:
            found = resolve(name, kind)
        case _:
            raise CheckpointError(
                f"{folder}: a computation is described as {{'type': 'LoRA', 'config': {{…}}}}, "
                f"not as {str(said)[:80]}; save the module again"
            )
    takes = [f.name for f in fields(found)]  # type: ignore[arg-type]
    if unknown := config.keys() - set(takes):
        raise CheckpointError(
            f"{folder}: {name} takes no {', '.join(sorted(unknown))} (it takes "
            f"{', '.join(takes) or 'nothing'}); the module was saved by another version, or changed"
        )
    given = {
        key: from_json(value, folder, Configured) if _nested(value) else value
        for key, value in config.items()
    }
    try:
        return found(**given)
    except TypeError as error:
        raise CheckpointError(
            f"{folder}: {name} cannot be made from {sorted(given)}: {error}; save the module again"
        ) from error


def _nested(value: Any) -> bool:
    """Return whether ``value`` describes a computation.

    A dictionary of lists (``Fixed``) does not.
    """
    return isinstance(value, dict) and not all(isinstance(v, list) for v in value.values())
