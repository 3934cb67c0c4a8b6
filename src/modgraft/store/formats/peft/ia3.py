"""IA³ as PEFT has it, and back: what scales the outputs of layers, and what their inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modgraft.computation.rescale import Rescale
from modgraft.core.errors import ModgraftError
from modgraft.core.layers import LINEAR, weight_matrix
from modgraft.core.sites import Site
from modgraft.store.formats.peft.folder import PREFIX, Folder, Group, Piece, Written
from modgraft.store.formats.peft.options import IA3Options
from modgraft.store.formats.peft.targets import ends_in

_MAPS = (nn.Conv2d, nn.Conv3d)


def read(folder: Folder, said: IA3Options) -> list[Group]:
    """Return an IA³: what scales outputs, and what scales inputs."""
    paths, end = folder.sites(".ia3_l"), ".ia3_l"
    found: dict[Literal["output", "input"], tuple[list[str], list[Piece]]]
    found = {"output": ([], []), "input": ([], [])}
    for path in paths:
        layer, key = folder.modules[path], PREFIX + path + end
        if not isinstance(layer, (*LINEAR, *_MAPS)):
            folder.refuse(f"IA³ at {path}, a {type(layer).__name__}: PEFT has none there")
        inner = ends_in(said.feedforward_modules or [], path)
        if inner is None:
            folder.refuse(
                f"feedforward_modules={said.feedforward_modules!r:.80} is a pattern that is not "
                f"run, since it may take long; write a list of names in its place"
            )
        if isinstance(layer, _MAPS):
            size = layer.in_channels if inner else layer.out_channels
            folder.take(key, 1, size, *[1] * (layer.weight.dim() - 2))
        else:
            rows, columns = weight_matrix(layer).shape
            size = columns if inner else rows
            folder.take(key, *((1, size) if inner else (size, 1)))
        sites, pieces = found["input" if inner else "output"]
        label = folder.label(path)
        sites.append(label)
        pieces.append(Piece(f"{label}:phi", (size,), lambda key=key: folder.tensor(key).flatten()))
    folder.check_targets(said, paths)
    return [
        Group(Rescale(where=where), *of, suffix="_input" if where == "input" else "")
        for where, of in found.items()
        if of[0]
    ]


@torch.no_grad()
def write(name: str, sites: Sequence[tuple[Site, Rescale]]) -> Written:
    """Return scales as an IA³; the other parts of a fused layer are scaled by 1."""
    tensors: dict[str, Tensor] = {}
    inner: dict[str, bool] = {}
    for site, place in sites:
        layer, path, is_inner = site.module, site.path, place.where == "input"
        if not isinstance(layer, (*LINEAR, *_MAPS)) or site.parameter is not None:
            raise ModgraftError(
                f"{name!r} is at {site.label}, and PEFT has no IA³ at a {type(layer).__name__}"
            )
        if is_inner and site.part is not None:
            raise ModgraftError(
                f"{name!r} scales the input of a part, {site.label}; PEFT's IA³ scales that of all "
                f"of the layer"
            )
        if inner.setdefault(path, is_inner) != is_inner or (path in tensors and not site.part):
            raise ModgraftError(f"PEFT's IA³ scales {path} once, and there are two scales of it")
        whole = site.part.padded(place.phi - 1, -1) + 1 if site.part else place.phi
        tensors[path] = tensors[path] * whole if path in tensors else whole
    shaped = {
        f"{path}.ia3_l": phi.view(1, -1, *[1] * (layer.weight.dim() - 2))
        if isinstance(layer := _layer(sites, path), _MAPS)
        else phi.view(1, -1)
        if inner[path]
        else phi.view(-1, 1)
        for path, phi in tensors.items()
    }
    return Written(shaped, {"feedforward_modules": [p for p in tensors if inner[p]]}, list(tensors))


def aim_inner(paths: Sequence[str], said: dict[str, Any]) -> None:
    """Write ``feedforward_modules`` in the way of ``target_modules``, of which it is a part."""
    inner = said["feedforward_modules"]
    if isinstance(said["target_modules"], str):
        said["feedforward_modules"] = "|".join(re.escape(path) for path in inner)
        return
    short = sorted({path.rpartition(".")[2] for path in inner})
    means = [path for path in paths if ends_in(short, path)]
    if said["target_modules"] == sorted({path.rpartition(".")[2] for path in paths}):
        if sorted(means) == sorted(inner):
            said["feedforward_modules"] = short
        else:
            said["target_modules"] = list(paths)


def _layer(sites: Sequence[tuple[Site, Any]], path: str) -> Any:
    return next(site.module for site, _ in sites if site.path == path)
