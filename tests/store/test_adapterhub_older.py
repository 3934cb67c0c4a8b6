"""Configurations of earlier versions of ``adapters``, which its version of today still loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapterhub_format import CLOSE, computed, copied, model, output_of

import modgraft as mg
from modgraft.core.errors import CheckpointError
from modgraft.store.formats.adapterhub.older import today

NICE = {"block_type": "nice", "non_linearity": "relu", "reduction_factor": 2}


def older(
    folder: Path, own: dict[str, Any] | None = None, leave: tuple[str, ...] = (), **said: Any
) -> Path:
    """Change what a file says: its configuration, and beside that."""
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text("utf-8"))
    content["config"] |= own or {}
    content["config"] = {k: v for k, v in content["config"].items() if k not in leave}
    content = {k: v for k, v in content.items() if k not in leave} | said
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def same(folder: Path, method: str, name: str) -> None:
    host = mg.Host(model(name))
    host.load(folder)
    atol = CLOSE.get(name, 1e-9)
    torch.testing.assert_close(computed(host, name), output_of(method, name), rtol=0, atol=atol)


def test_earlier_keys_and_one_factor_for_all_are_read(tmp_path: Path) -> None:
    folder = older(
        copied(tmp_path), {"reduction_factor": {"default": 4, "1": 4}}, ("version", "dropout"),
        config_id="9076f36a74755ac4", type="text_task",
    )  # fmt: skip
    same(folder, "pfeiffer", "bert")


def test_an_invertible_adapter_within_a_configuration_is_read(tmp_path: Path) -> None:
    leave = ("inv_adapter", "inv_adapter_reduction_factor", "version")
    folder = copied(tmp_path, "pfeiffer_invertible", "llama")
    same(
        older(folder, {"invertible_adapter": NICE}, leave, type="text_lang"),
        "pfeiffer_invertible", "llama",
    )  # fmt: skip


def test_an_invertible_adapter_that_a_task_never_had_is_left_out(tmp_path: Path) -> None:
    """The first versions named one in each configuration, and saved none of a task's."""
    folder = older(copied(tmp_path), {"invertible_adapter": NICE}, type="text_task")
    same(folder, "pfeiffer", "bert")
    folder = older(folder, {"invertible_adapter": NICE}, type="text_lang")
    with pytest.raises(CheckpointError, match="tensors are missing"):
        mg.Host(model("bert")).load(folder)


@pytest.mark.parametrize(
    ("version", "sigma", "means"),
    [(None, "gelu", "gelu_new"), (None, "gelu_orig", "gelu"), ("2.0.1", "gelu", "gelu")],
)
def test_activations_without_a_version_have_other_names(
    version: str | None, sigma: str, means: str
) -> None:
    said = {"config": {"non_linearity": sigma}, "version": version}
    assert today(said, []) == {"non_linearity": means}


@pytest.mark.parametrize(
    ("config", "leave", "said", "words"),
    [
        ({"reduction_factor": {"0": 2, "default": 4}}, (), {}, "widths of their own"),
        ({"invertible_adapter": NICE | {"non_linearity": "tanh"}}, (), {}, "for both"),
        ({"invertible_adapter": "nice"}, (), {}, "invertible_adapter='nice' is not understood"),
        ({}, ("name",), {}, "says no name"),
        ({}, ("config",), {}, "config=None is no configuration"),
        ({}, (), {"config": "seq_bn[x=1]"}, r"config='seq_bn\[x=1\]' is no name that is read"),
        ({}, (), {"config": "seq_bn"}, "where this host needs"),
        ({}, (), {"version": "new"}, "version='new' is none of adapters"),
        ({}, (), {"surprise": 1}, "surprise is not understood"),
    ],
)
def test_what_is_not_read_is_refused_in_words(
    config: dict[str, Any], leave: tuple[str, ...], said: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder, host = older(copied(tmp_path), config, leave, **said), mg.Host(model("bert"))
    with pytest.raises(CheckpointError, match=words) as error:
        host.load(folder)
    assert "Error(" not in str(error.value)
    assert not host.implants


def test_a_lora_of_a_version_with_another_scale_is_refused(tmp_path: Path) -> None:
    folder = older(copied(tmp_path, "lora"), leave=("version",))
    with pytest.raises(CheckpointError, match=r"alpha is not r: before adapters 1\.1 the scale"):
        mg.Host(model("bert")).load(folder)


def test_a_name_of_their_table_is_its_configuration(tmp_path: Path) -> None:
    host = mg.Host(model("bert"))
    host.implant("m", mg.Rescale(), at=["key", "value", "up"])
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.normal_()
    host.save("m", tmp_path / "new", format="adapterhub")
    again = mg.Host(model("bert"))
    again.load(older(tmp_path / "new", config="ia3"))
    assert torch.equal(computed(again, "bert"), computed(host, "bert"))
