"""Folders of the real PEFT, read and written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import modgraft as mg
from store.peft_cases import CASES, batch_of, model_of, output, trained

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def _loaded(model: Any, folder: Path) -> mg.Host:
    host = mg.Host(copy.deepcopy(model)).eval()
    host.load(folder)
    return host


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saved_computes_the_same_here(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], model_of(CASES[name].host)
    batch = batch_of(case.host)
    made = trained(case, model, tmp_path / "theirs")
    host = _loaded(model, tmp_path / "theirs")
    assert [type(host[n].method).__name__ for n in host.implants] == list(case.types)
    expected, bare = output(made, batch), output(model, batch)
    got = output(host, batch)
    if "prompt" in name and case.host in ("gpt2", "llama"):
        expected = expected[:, -got.shape[1] :]
    assert (expected - bare).abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_here_computes_the_same_in_peft(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], model_of(CASES[name].host)
    batch = batch_of(case.host)
    trained(case, model, tmp_path / "theirs")
    host = _loaded(model, tmp_path / "theirs")
    host.save(list(host.implants), tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    got = output(host, batch)
    expected = output(theirs, batch)
    if "prompt" in name and case.host in ("gpt2", "llama"):
        expected = expected[:, -got.shape[1] :]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    before, after = (
        load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours")
    )
    if "prompt-t5" in name:
        before["prompt_embeddings"] = before["prompt_embeddings"][:3]  # PEFT reads no more
    for key in [k for k in before if ".modules_to_save." in k or ".original_module." in k]:
        del before[key]  # bias="all" writes a bias of a saved layer three times
    assert before.keys() == after.keys()
    for key in before:
        if "magnitude" in key:  # kept as a difference from the host's
            torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-15)
        else:
            assert torch.equal(before[key], after[key]), key
