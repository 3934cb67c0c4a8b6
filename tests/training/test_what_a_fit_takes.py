"""What `fit` is given that it does not take, and says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor, fails: bool = False) -> Any:
        if fails:
            raise TypeError("of its own")
        return SimpleNamespace(loss=self.l(x).square().mean())


def _host() -> mg.Host:
    host = mg.Host(Net())
    host.implant("a", mg.LoRA(rank=1), at="l")
    return host


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"loss": nn.MSELoss()},
            r"fit\(loss=…\) is no setting; the loss is what the model",
        ),
        ({"stepz": 3}, r"fit\(stepz=…\) is no setting; did you mean steps=\?"),
        ({"q": 3}, r"there are steps, epochs, lr, "),
    ],
)
def test_a_setting_that_is_none(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(mg.ModgraftError, match=words):
        _host().fit([{"x": torch.ones(2, 4)}], train="a", progress=False, **settings)


def test_what_forward_does_not_take_is_named() -> None:
    host, rows = _host(), [{"x": torch.ones(2, 4), "z": torch.ones(2), "names": ["a", "b"]}]
    fit = {"train": "a", "steps": 1, "progress": False}
    with pytest.raises(mg.ModgraftError, match=r"names, z, which Net.forward\(x, fails\) does not"):
        host.fit(rows, **fit)
    host.fit(rows, ignore=["ids", "names", "z"], **fit)
    host.fit([{"x": torch.ones(2, 4), "modules": ["a", None]}], **fit)
    with pytest.raises(TypeError, match="of its own"):
        host.fit([{"x": torch.ones(2, 4), "fails": True}], **fit)
