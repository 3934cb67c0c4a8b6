"""A module of ours as ``adapters`` saves one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modgraft.computation.adapter import Adapter, ParallelAdapter
from modgraft.computation.compacter import Compacter
from modgraft.computation.lora import LoRA
from modgraft.computation.rescale import Rescale
from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.core.files import locked, write_json
from modgraft.engine.implant import Implant, learning_parts
from modgraft.store.file import write_tensors
from modgraft.store.formats.adapterhub.read import (
    BOTTLENECK,
    CONFIG,
    LORA,
    OTHERS,
    SIGMA,
    TENSORS,
    Places,
    bottlenecks,
    holds,
    prefix,
    understood,
    weights,
)
from modgraft.store.formats.adapterhub.read import (
    names as names_of,
)
from modgraft.training.host_like import HostLike

VERSION = "adapters.1.3.0"


def write(host: HostLike, names: Sequence[str], folder: Path) -> None:
    """Write one module to a folder; see :class:`modgraft.store.formats.Format`."""
    if len(names) != 1:
        raise ModgraftError(f"a folder of adapters holds one adapter, not {', '.join(names)}")
    implant, model = host._implants[names[0]], host.model
    if beside := sorted(implant.beside | learning_parts(model)):
        raise ModgraftError(
            f"{implant.name!r} trained together with the host's {beside[0]}, which is not written "
            f"in this format; save it as modgraft's"
        )
    config, places = _said(implant, model)
    if config.get("phm_layer") and config["shared_phm_rule"] and not prefix(model):
        raise ModgraftError(
            f"{implant.name!r}: of a {type(model).__name__} adapters neither saves nor loads the "
            f"rule that a Compacter's layers share; it can be written with shared=False"
        )
    own, made = implant.tensors(), {}
    for each in names_of(implant.method, places, implant.name, model):
        key = prefix(model) + each.theirs
        tensor = own[each.ours]
        tensor = tensor[:, None] if each.ours.endswith(":phi") else tensor
        tensor = tensor.transpose(1, 2) if each.turned else tensor
        made[key] = torch.cat([made[key], tensor]) if key in made else tensor
    of: Any = model.config
    about = {
        "config": config,
        "hidden_size": getattr(of, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": getattr(of, "_name_or_path", "") or None,
        "model_type": of.model_type,
        "name": implant.name,
        "version": VERSION,
    }
    if folder.is_dir() and any(folder.iterdir()) and not holds(folder):
        raise CheckpointError(f"{folder} is there and holds no adapter; choose another folder")
    stale = (*OTHERS, "pytorch_adapter.bin", "embedding.pt")
    if left := [name for name in stale if (folder / name).exists()]:
        raise CheckpointError(f"{folder} holds {left[0]} of another adapter; choose another folder")
    with locked(folder, TENSORS, CONFIG):
        write_tensors(made, folder / TENSORS, {})
        write_json(folder / CONFIG, about)


def _said(implant: Implant, model: nn.Module) -> tuple[dict[str, Any], Places]:
    """Return the configuration of ours as theirs, and its places."""
    method: Any = implant.method
    tries: list[dict[str, Any]] = []
    make: Callable[[nn.Module, Mapping[str, Any]], Places]
    if isinstance(method, Adapter | ParallelAdapter | Compacter):
        made, make = {**BOTTLENECK, **_bottleneck_said(implant)}, bottlenecks
        ends = [(False, True), (True, True), (True, False)]
        for before in (False,) if isinstance(method, ParallelAdapter) else (False, True):
            for mh, output in ends:
                one = {"original_ln_before": before, "mh_adapter": mh, "output_adapter": output}
                tries.append({**made, **one})
    elif isinstance(method, LoRA | Rescale):
        made, make = {**LORA, **_lora_said(method)}, weights
        several = [m for n in range(8) if (m := [k for i, k in enumerate("qkv") if n >> i & 1])]
        for matrices in ([], *several):
            for up, down in ((False, False), (True, False), (False, True), (True, True)):
                one = {"selfattn_lora": bool(matrices), "intermediate_lora": up}
                one |= {"output_lora": down}
                tries.append({**made, **one, "attn_matrices": matrices or made["attn_matrices"]})
    else:
        raise ModgraftError(
            f"{implant.name!r} is a {type(method).__name__}, which is not written as an adapter of "
            f"AdapterHub; Adapter, ParallelAdapter, Compacter, LoRA and Rescale are"
        )
    why = "its sites are none of theirs"
    for one in tries:
        try:
            every = make(model, one)
        except ModgraftError as error:
            why = str(error) if len(tries) == 1 else why
            continue
        own = set(implant.paths)
        here = [place for place in every if place[1] in own]
        if len(here) != len(own):
            continue
        numbers = [{int(re.findall(r"\d+", p)[0]) for p, _ in some} for some in (every, here)]
        one["leave_out"] = sorted(numbers[0] - numbers[1])
        try:
            if {label for _, label in make(model, one)} == own:
                understood(one, model)
                return one, here
        except ModgraftError as error:
            why = str(error)
    raise ModgraftError(
        f"{implant.name!r} cannot be written as an adapter of AdapterHub: {why} "
        f"({', '.join(implant.paths[:3])}); save it as modgraft's"
    )


def _bottleneck_said(implant: Implant) -> dict[str, Any]:
    method: Any = implant.method
    factor = 16 if method.reduction is None else method.reduction
    if method.width is not None:
        raise ModgraftError(
            f"{implant.name!r}: adapters says a width by reduction_factor alone; say reduction="
        )
    words = {ours: theirs for theirs, ours in SIGMA.items()}
    said = {"reduction_factor": factor, "non_linearity": words[method.nonlinearity]}
    said |= {"scaling": method.scale, "is_parallel": isinstance(method, ParallelAdapter)}
    if isinstance(method, Compacter):
        said |= {"phm_layer": True, "phm_dim": method.n, "phm_rank": method.rank}
        said["shared_phm_rule"] = method.shared
    if isinstance(method, ParallelAdapter):
        said["init_weights"] = "mam_adapter"
    return said


def _lora_said(method: Any) -> dict[str, Any]:
    if isinstance(method, Rescale):
        if method.where == "input":
            raise ModgraftError("Rescale(where='input') is not written: adapters scales outputs")
        return {"r": 1, "alpha": 1, "composition_mode": "scale", "init_weights": "ia3"}
    if method.rslora or method.dora or method.bias:
        raise ModgraftError("LoRA with rslora, dora or bias is not written as one of AdapterHub")
    alpha = method.rank if method.alpha is None else method.alpha
    alpha = int(alpha) if alpha == int(alpha) else alpha
    return {"r": method.rank, "alpha": alpha, "dropout": method.dropout}
