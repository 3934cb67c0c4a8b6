"""What several test files use: the changes of weights, and a compiled host's graphs counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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


def counted(host: mg.Host) -> tuple[nn.Module, list[Any]]:
    """``host`` compiled as one graph or not at all, and the graphs that were made of it so far."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled: Any = torch.compile(host, backend=counting, fullgraph=True)
    return compiled, graphs
