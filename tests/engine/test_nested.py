"""Nested tensors: texts of unequal length in one batch, without padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg


def jagged(*texts: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(texts), layout=torch.jagged)


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 8, generator=generator) for n in (3, 40, 1)]


class Block(nn.Module):
    """A pair of layers that read one input, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.query(x)) * self.key(x)


def stirred(module: mg.Computation) -> mg.Host:
    torch.manual_seed(0)
    host = mg.Host(Block()).eval()
    host.implant("m", module, at=["query", "key"])
    host.implant("n", mg.LoRA(rank=2), at="query")
    for p in host.implants.parameters():
        nn.init.normal_(p, std=0.3)
    return host


@pytest.mark.parametrize(
    "make",
    [
        lambda: mg.LoRA(rank=2), lambda: mg.LoRA(rank=2, dora=True), lambda: mg.Adapter(width=3),
        mg.Rescale,
    ],
    ids=["lora", "dora", "adapter", "rescale"],
)  # fmt: skip
def test_each_text_is_what_it_is_alone(make: Callable[[], mg.Computation]) -> None:
    host, some = stirred(make()), texts()

    def gradients(outs: list[Tensor]) -> list[Tensor]:
        host.zero_grad()
        torch.stack([out.square().sum() for out in outs]).sum().backward()
        return [p.grad.clone() for p in host.implants.parameters() if p.grad is not None]

    found, alone = host(jagged(*some)).unbind(), [host(x) for x in some]
    torch.testing.assert_close(list(found), alone, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(list(found)), gradients(alone), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(host(jagged(*some)).unbind(), found)


def test_what_cannot_act_on_them_says_so() -> None:
    host, nested = stirred(mg.ConvAdapter()), jagged(*texts())
    with pytest.raises(
        mg.ModgraftError, match=r"m .*does not act at query on a nested tensor.*padded"
    ):
        host(nested)
    with pytest.raises(mg.ModgraftError, match=r"a composition for each example.*padded"):
        host(nested, modules=["n", None, "n"])
    assert host(nested, modules="n").is_nested
    torch.testing.assert_close(
        host(nested, modules=None).unbind()[0], host(texts()[0], modules=None)
    )
