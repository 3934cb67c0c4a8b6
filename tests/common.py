"""Helpers of several rooms: methods that change weights, compiled graphs counted, an FNet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import FNetConfig, FNetForMaskedLM

import modgraft as mg
from modgraft.store.card import card_digest
from modgraft.store.file import TensorFile, digest_of, write_tensors

WEIGHTS: dict[str, Callable[[], mg.Computation]] = {
    "lora": lambda: mg.LoRA(rank=2, alpha=3.0),
    "dora": lambda: mg.LoRA(rank=2, dora=True),
    "subnetwork": mg.SparseSubnetwork,
    "supermask": mg.Supermask,
    "sparse": mg.SparseDelta,
    "intrinsic": lambda: mg.IntrinsicDimension(dim=5),
    "rescale": mg.Rescale,
    "rescale_input": lambda: mg.Rescale(where="input"),
}


def fnet() -> nn.Module:
    """A small model of a family whose roles modgraft does not know."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 41}
    return FNetForMaskedLM(FNetConfig(**size))


def lines(text: str) -> dict[str, list[str]]:
    """Split each line of a printed table into cells; the first cell is the key."""
    return {row.split()[0]: row.split() for row in text.splitlines() if row.strip()}


def counted(host: mg.Host) -> tuple[nn.Module, list[Any]]:
    """Compile ``host`` as one graph, or fail; also return the list that collects its graphs."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled: Any = torch.compile(host, backend=counting, fullgraph=True)
    return compiled, graphs


def forge(folder: Path, tensors: Mapping[str, Tensor] | None = None, **card: Any) -> None:
    """Write other tensors, or another card, into a saved module's file, with hashes that agree."""
    file = TensorFile(folder / "module.safetensors")
    said = json.loads(file.metadata["modgraft"]) | card
    tensors = file.tensors() if tensors is None else tensors
    said["tensors"] = card.get("tensors", digest_of(tensors))
    said.pop("sha256")
    said["sha256"] = card_digest(said)
    write_tensors(tensors, file.path, {"modgraft": json.dumps(said)})


def kept(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a saved module by name."""
    return TensorFile(folder / "module.safetensors").tensors()
