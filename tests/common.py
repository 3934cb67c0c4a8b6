"""Helpers of several rooms: methods that change weights, compiled graphs counted, an FNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import FNetConfig, FNetForMaskedLM

import modgraft as mg

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
