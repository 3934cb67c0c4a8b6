"""What is in a folder of PEFT and is not understood, and what PEFT has no place for."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import modgraft as mg
from modgraft.core.errors import CheckpointError
from store.peft_cases import CASES, Case, model_of, trained

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def _folder(name: str, tmp_path: Path) -> tuple[Any, Path]:
    model = model_of(CASES[name].host)
    trained(CASES[name], model, tmp_path / "theirs")
    return model, tmp_path / "theirs"


def _say(folder: Path, **said: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _refused(model: Any, folder: Path, words: str) -> None:
    host = mg.Host(copy.deepcopy(model)).eval()
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    with pytest.raises(mg.ModgraftError, match=words):
        host.load(folder)
    assert not list(host.implants)
    assert all(torch.equal(v, before[k]) for k, v in host.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "said", "words"),
    [
        ("lora-bert", {"layer_replication": [[0, 1]]}, "sets layer_replication="),
        ("lora-bert", {"use_qalora": True}, "sets use_qalora=True, which is not understood"),
        ("lora-bert", {"alora_invocation_tokens": [3]}, "sets alora_invocation_tokens="),
        ("lora-bert", {"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ("lora-bert", {"a_new_option": 3}, "a_new_option=3, an option of LORA that is not known"),
        ("lora-bert", {"r": "8"}, "sets r='8'"),
        ("lora-bert", {"r": 8}, "tensors of rank 4, and its options say 8"),
        ("lora-bert", {"target_modules": ["query"]}, r"tensors for .*value, which .* not mean"),
        ("lora-bert", {"target_modules": ["query", "value", "key"]}, "such layers have no tensors"),
        ("lora-bert", {"bias": "all"}, "says that the host's .*bias is saved too"),
        ("lora-bert", {"alpha_pattern": {"(.*a)+": 2}}, "is not run, since it may take long"),
        ("lora-bert", {"peft_type": "LOHA"}, "peft_type='LOHA' has no class here"),
        ("lora-bert", {"use_dora": True}, "lora_magnitude_vector is missing"),
        ("lora-head", {"modules_to_save": None}, "left over, such as base_model.model.classifier"),
        ("oft-llama", {"coft": True}, "sets coft=True"),
        ("oft-llama", {"peft_version": "0.17.0"}, "another series before PEFT 0.18"),
        ("oft-llama", {"oft_block_size": 8}, r"is \[4, 6\] where this host needs"),
        ("vera-llama", {"r": 7}, r"where this host needs \[7\]"),
        ("tokens-llama", {"token_indices": [1]}, r"where this host needs \[1, 16\]"),
        ("prompt-t5", {"num_virtual_tokens": 4}, r"is \[6, 16\] where this host needs \[8, 16\]"),
        ("ia3-bert", {"feedforward_modules": []}, "where this host needs"),
    ],
)  # fmt: skip
def test_options_that_are_not_understood(
    name: str, said: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model, folder = _folder(name, tmp_path)
    _say(folder, **said)
    _refused(model, folder, words)


Q = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q), "left over|is missing|no tensors"),
        (lambda t: t.pop(Q.replace("_A", "_B")), "lora_B.weight is missing"),
        (lambda t: t.update({Q: torch.zeros(4, 15)}), r"is \[4, 15\] where this host needs"),
        (lambda t: t.update({Q + ".more": torch.zeros(1)}), "1 tensors are left over"),
        (lambda t: t.update({Q.replace("query", "quary"): torch.zeros(4, 16)}), "does not have"),
        (lambda t: t.update({Q: t[Q] * torch.nan}), "holds NaN or infinity"),
        (lambda t: t.update({Q: torch.zeros(4, 16, dtype=torch.int8)}), "holds int8"),
        (
            lambda t: t.update({"base_model.model.classifier.weight": torch.zeros(3, 16)}),
            "1 tensors are left over",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, torch.Tensor]], Any], words: str, tmp_path: Path
) -> None:
    model, folder = _folder("lora-bert", tmp_path)
    _change(folder, change)
    _refused(model, folder, words)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    model, folder = _folder("lora-bert", tmp_path)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    _refused(model, folder, "is a pickle.*safe_serialization=True")


def test_a_host_of_another_size(tmp_path: Path) -> None:
    _, folder = _folder("lora-bert", tmp_path)
    _refused(model_of("gpt2"), folder, "belongs to a layer .* that this GPT2LMHeadModel")


def test_a_convolution_whose_branch_reads_other_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
    case = Case("", lambda: peft.LoraConfig(r=2, target_modules=["0"]))
    trained(case, model, tmp_path)
    _refused(model, tmp_path, "a convolution of 2 groups: PEFT's branch reads all channels")


def test_patterns_of_strangers_end(tmp_path: Path) -> None:
    model, folder = _folder("lora-bert", tmp_path)
    _say(folder, target_modules="(.*)*(.*)*(.*)*x")
    start = time.perf_counter()
    mg.Host(model).load(folder)  # the tensors say what is changed; the pattern is not run
    assert time.perf_counter() - start < 5


def test_another_model_is_named(tmp_path: Path) -> None:
    model, folder = _folder("lora-bert", tmp_path)
    _say(folder, base_model_name_or_path="someone/bert")
    model.config._name_or_path = "here/bert"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        mg.Host(model).load(folder)
    assert any("'someone/bert', and this host is 'here/bert'" in str(w.message) for w in seen)


@pytest.mark.parametrize(
    ("kind", "method", "at", "words"),
    [
        ("bert", mg.Adapter(reduction=4), "output", "is an Adapter, which PEFT's format has no"),
        ("t5", mg.Prefix(length=2), None, "leaves the text its positions, and PEFT"),
        ("bert", mg.Shared(mg.LoRA(rank=2)), "query", "is a Shared, which PEFT's format has no"),
        ("gpt2", mg.Rescale(where="input"), "query", "scales the input of a part"),
        ("gpt2", mg.OFT(block=4), "query", "changes the whole of a Linear or Embedding"),
        ("gpt2", mg.VeRA(rank=2), "query", "changes the whole of a Linear or Conv1D"),
        ("bert", mg.LoRA(rank=2, dora=True, bias=True), "query", "no DoRA that changes the bias"),
        ("bert", mg.SoftPrompt(length=2), None, "after the class token"),
        ("gpt2", mg.TrainableTokens(ids=(3,)), "transformer.wte", "PEFT would change .*lm_head"),
        ("bert", mg.Rescale(), "embedding", "no IA³ at a Embedding"),
    ],
)  # fmt: skip
def test_what_peft_has_no_place_for(
    kind: str, method: mg.Computation, at: Any, words: str, tmp_path: Path
) -> None:
    host = mg.Host(model_of(kind))
    host.implant("m", method, at=at)
    with pytest.raises(mg.ModgraftError, match=words):
        host.save("m", tmp_path / "ours", format="peft")
    assert not (tmp_path / "ours").exists()


def test_several_modules_and_other_folders(tmp_path: Path) -> None:
    host = mg.Host(model_of("bert"))
    host.implant("a", mg.LoRA(rank=2), at="query")
    host.implant("b", mg.LoRA(rank=2), at="value")
    with pytest.raises(mg.ModgraftError, match="one module in a folder, and a, b are several"):
        host.save(["a", "b"], tmp_path / "ours", format="peft")
    with pytest.raises(mg.ModgraftError, match="has no place for licence="):
        host.save("a", tmp_path / "ours", format="peft", licence="MIT")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds nothing of PEFT"):
        host.save("a", tmp_path / "other", format="peft")
