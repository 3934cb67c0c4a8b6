"""VeRA as PEFT has it, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modgraft.computation.vera import VeRA, projections
from modgraft.core.layers import LINEAR, weight_matrix
from modgraft.core.sites import Site
from modgraft.store.formats.peft.folder import (
    PREFIX,
    Folder,
    Group,
    Piece,
    Written,
    check_whole,
)
from modgraft.store.formats.peft.options import VeraOptions


def read(folder: Folder, said: VeraOptions) -> Group:
    """Return a VeRA; A and B are drawn as PEFT draws them where they were not saved."""
    method = VeRA(said.r, said.d_initial, said.vera_dropout, said.projection_prng_key)
    paths, pieces, rows, columns = folder.sites(".vera_lambda_b"), [], 0, 0
    for path in paths:
        layer, label = folder.modules[path], folder.label(path)
        if not isinstance(layer, LINEAR):
            folder.refuse(f"VeRA at {path}, a {type(layer).__name__}: PEFT has none there")
        out, into = weight_matrix(layer).shape
        rows, columns = max(rows, out), max(columns, into)
        for ours, end, size in (("b", "vera_lambda_b", out), ("d", "vera_lambda_d", said.r)):
            key = f"{PREFIX}{path}.{end}"
            folder.take(key, size)
            pieces.append(Piece(f"{label}:{ours}", (size,), lambda key=key: folder.tensor(key)))
    sizes = {"A": (said.r, columns), "B": (rows, said.r)}
    for ours, size in sizes.items() if paths else ():
        key = f"base_model.vera_{ours}"
        if said.save_projection:
            folder.take(key, *size)

        def make(ours: str = ours, key: str = key) -> Tensor:
            if said.save_projection:
                return folder.tensor(key)
            return projections(said.r, rows, columns, said.projection_prng_key)[ours]

        pieces.append(Piece(f"{folder.label(paths[0])}:{ours}", size, make))
    folder.check_targets(said, paths)
    return Group(method, [folder.label(path) for path in paths], pieces)


def write(name: str, method: VeRA, sites: Sequence[tuple[Site, VeRA]]) -> Written:
    """Return a VeRA as PEFT has it, with A and B."""
    for site, _ in sites:
        check_whole(name, "VeRA", site, LINEAR)
    tensors: dict[str, Tensor] = {
        f"{site.path}.vera_lambda_{ours}": tensor
        for site, place in sites
        for ours, tensor in (("b", place.b), ("d", place.d))
    }
    first = sites[0][1]
    said = {
        "r": method.rank, "d_initial": method.initial, "vera_dropout": method.dropout,
        "projection_prng_key": method.seed, "save_projection": True, "bias": "none",
    }  # fmt: skip
    shared = {f"vera_{ours}": first.get_buffer(ours) for ours in ("A", "B")}
    return Written(tensors, said, [site.path for site, _ in sites], shared)
