"""Every method that has tensors, each with a site in BERT, for tests of Shared and HyperNetwork."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import modgraft as mg
from contract.hosts import FEATURES

METHODS: dict[str, tuple[mg.Computation, Any]] = {
    "lora": (mg.LoRA(rank=2), "query"),
    "dora": (mg.LoRA(rank=2, dora=True, bias=True), "query"),
    "subnetwork": (mg.SparseSubnetwork(), "query"),
    "supermask": (mg.Supermask(), "query"),
    "sparse": (mg.SparseDelta(density=0.1), "query"),
    "intrinsic": (mg.IntrinsicDimension(dim=9), "query"),
    "rescale": (mg.Rescale(), "query"),
    "adapter": (mg.Adapter(width=3), "output"),
    "parallel": (mg.ParallelAdapter(width=3), "attention"),
    "compacter": (mg.Compacter(width=4), "output"),
    "conv": (mg.ConvAdapter(), "output"),
    "fusion": (mg.GatedFusion(dim=FEATURES), "output"),
    "released": (mg.GatedFusion(dim=FEATURES, form="released"), "output"),
    "prefix": (mg.Prefix(length=2), "self_attention"),
    "prefix_mlp": (mg.Prefix(length=2, reparametrise=3), "self_attention"),
    "invertible": (mg.InvertibleAdapter(), "output"),
}


class Nothing(mg.FunctionComposition):
    """Return y as it is: a method without any parameter."""

    def build(self, site: mg.Site) -> None:
        pass

    def forward(self, y: Tensor, x: Tensor | None, side: mg.Side | None) -> Tensor:
        return y
