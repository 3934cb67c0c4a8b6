"""What `fit` is given that it does not take, and says."""

from __future__ import annotations

from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from modgraft.training.fit import fit
from modgraft.training.settings import Settings


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
        ({"q": 3}, r"there are steps, epochs, until, lr, "),
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


def test_the_signature_of_host_fit_is_that_of_fit() -> None:
    own = signature(mg.Host.fit).parameters
    theirs = signature(fit).parameters
    names = [f.name for f in fields(Settings)]
    assert [n for n in own if n not in ("self", "loader", "train", "modules", "unknown")] == names
    for name in names:
        assert own[name].kind is Parameter.KEYWORD_ONLY
        assert own[name].default == theirs[name].default, name
        assert own[name].annotation == theirs[name].annotation, name
        assert f"{name}:" in (mg.Host.fit.__doc__ or "") or f"``{name}``" in mg.Host.fit.__doc__
    assert own["unknown"].kind is Parameter.VAR_KEYWORD


def test_every_setting_reaches_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import modgraft.training.fit as module

    seen: dict[str, Any] = {}
    monkeypatch.setattr(module, "fit", lambda host, loader, **settings: seen.update(settings))
    odd = {f.name: object() for f in fields(Settings)}
    _host().fit([], train="a", **odd)
    assert seen == odd
    _host().fit([], train="a", steps=3)
    assert seen == {f.name: f.default for f in fields(Settings)} | {"steps": 3}


def test_modules_is_the_composition_to_train_in(tmp_path: Path) -> None:
    rows = [{"x": torch.ones(2, 4)}]
    given: dict[str, Any] = {"train": "b", "steps": 2, "lr": 0.1, "progress": False}

    def made() -> mg.Host:
        host = _host()
        host.implant("b", mg.LoRA(rank=1), at="l", active=False)
        return host

    torch.manual_seed(0)
    one, other = made(), made()
    other.load_state_dict(one.state_dict())
    found = one.fit(rows, modules="2*b", folder=tmp_path, note=False, **given)
    with other.using("2*b"):
        assert other.fit(rows, **given).losses == found.losses
    assert str(one.composition) == "a"
    assert not torch.equal(one["b"].places[0].B, torch.zeros(4, 1))
    with pytest.raises(mg.ModgraftError, match=r"composition: '2\*b' there, 'b' here"):
        one.fit(rows, modules="b", folder=tmp_path, note=False, **given)
    with pytest.raises(mg.ModgraftError, match="no module 'c'"):
        one.fit(rows, modules="c", **given)


def test_a_part_of_the_host_is_named_as_such() -> None:
    host = _host()
    with pytest.raises(
        mg.ModgraftError, match=r"train='l': .*the host's own part is train='host.l'"
    ):
        host.fit([{"x": torch.ones(2, 4)}], train=["a", "l"], steps=1)
    with pytest.raises(mg.ModgraftError, match="no module 'q'"):
        host.fit([{"x": torch.ones(2, 4)}], train=["a", "q"], steps=1)
    wrapped = mg.Host(nn.Sequential(nn.ModuleDict({"inner": Net()})["inner"]))
    with pytest.raises(mg.ModgraftError, match=r"train='host\.0\.l'"):
        wrapped.fit([], train="l", steps=1)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("host.", "no part of the host has an empty name; there are 'host.l'"),
        ("net.l", "the host's own part is train='host.l'"),
        ("l.weight", "the host's own part is train='host.l'"),
        ("Host.l", "the host's own part is train='host.l'"),
        (3, r"train=3: name modules, as 'qa'"),
        (["a", 3], r"train=\['a', 3\]: name modules, as 'qa'"),
    ],
)
def test_what_is_no_name_of_what_trains(train: Any, words: str) -> None:
    with pytest.raises(mg.ModgraftError, match=words):
        _host().fit([{"x": torch.ones(2, 4)}], train=train, steps=1, progress=False)


def test_a_setting_that_is_nearly_one_of_fits_own_arguments() -> None:
    with pytest.raises(mg.ModgraftError, match="did you mean modules="):
        _host().fit([{"x": torch.ones(2, 4)}], train="a", module="a", steps=1)
