"""A host of which it is known how much has to change, for the tests of the ladder.

The signs of two of eight inputs are the class, one of four, and the frozen layer before the head
lets one of the two through: a head alone is right half of the time, and with a change of rank 1 at
the layer always.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import modgraft as mg

torch.set_num_threads(1)


class Net(nn.Module):
    """head(tanh(W x)), where W has forgotten the second input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(8))
            self.layer.weight[1, 1] = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.layer(x)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def host() -> mg.Host:
    torch.manual_seed(0)
    return mg.Host(Net())


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    labels = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return [{"x": a, "labels": b} for a, b in zip(x, labels, strict=True)]


def loader(seed: int = 0) -> DataLoader:
    return DataLoader(rows(256, seed), batch_size=16, shuffle=True)  # type: ignore[arg-type]


def right(seed: int) -> Any:
    """Return what measures a host on other examples: which of them are right, [200]."""
    given = rows(200, seed)
    x, labels = (torch.stack([row[key] for row in given]) for key in ("x", "labels"))
    return lambda host: (host(x=x).logits.argmax(-1) == labels).float()


def lora(rank: int, *rates: float) -> mg.Rung:
    return mg.Rung(
        f"lora_{rank}",
        f"LoRA {rank}",
        rates or (1e-1,),
        ((mg.LoRA(rank, alpha=2 * rank), "layer"),),
    )


NOTHING = mg.Rung("nothing", "Nothing", (1e-1,))
FULL = mg.Rung("full", "Full", (1e-1,), host=True)
ALL = (NOTHING, lora(1, 1e-2, 1e-1), lora(4, 1e-5, 1e-1), FULL)
GIVEN: dict[str, Any] = {
    "evaluate": right(1), "test": right(2), "beside": "host.head", "rungs": ALL, "steps": 120,
    "keep": 3, "progress": False,
}  # fmt: skip


def climb(**more: Any) -> Any:
    return mg.ladder(host(), loader(), **{**GIVEN, **more})
