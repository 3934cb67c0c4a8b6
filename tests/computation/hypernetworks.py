"""A host with a hypernetwork ``h`` for the tasks fr and de, and the tensors it should generate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import modgraft as mg
from computation import methods
from contract.hosts import HOSTS, side, tensor_of

METHODS = {**methods.METHODS, "soft_prompt": (mg.SoftPrompt(length=2), None)}
FR, DE = "h['fr']", "h['de']"
TASKS = ("fr", "de")


def grafted(
    module: mg.Computation, at: Any, name: str = "bert", stir: bool = True, **kw: Any
) -> mg.Host:
    host = mg.Host(HOSTS[name].model()).eval()
    kw = {"tasks": TASKS, "embedding": 4, **kw}
    implant = host.implant("h", mg.HyperNetwork(module, **kw), at=at, active=False)
    if stir:
        with torch.no_grad():
            for p in implant.parameters():
                p.normal_(0, 0.3)
    return host


def run(host: nn.Module, composition: Any, name: str = "bert", needs: bool = False) -> Tensor:
    kind = next(host.parameters()).dtype
    kw = {"side": {"image": side().to(kind)}} if needs else {}
    with torch.no_grad():
        return tensor_of(host(**HOSTS[name].batch(), modules=composition, **kw))


def drawn(h: mg.Implant, place: Any, task: int, key: str, shape: torch.Size) -> Tensor:
    """Compute H z + b row by row, with z = [t; s] or W₂ relu(W₁ [t; s] + b₁) + b₂."""
    t = h.places[0].state_dict()
    z = torch.cat([t[f"generator.tasks.{task}"], place.site])
    if "generator.project.0.weight" in t:
        z = torch.relu(t["generator.project.0.weight"] @ z + t["generator.project.0.bias"])
        z = t["generator.project.2.weight"] @ z + t["generator.project.2.bias"]
    head = f"generator.heads.{key.replace('.', '-')}-{'x'.join(map(str, shape))}"
    rows = zip(t[f"{head}.weight"], t[f"{head}.bias"], strict=True)
    return torch.stack([row @ z + b for row, b in rows]).reshape(shape)
