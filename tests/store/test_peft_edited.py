"""Folders of PEFT whose options were edited by hand: its numbers or a refusal, nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import modgraft as mg
from store.peft_cases import CASES, Case, batch_of, lora, model_of, output, trained

pytestmark = pytest.mark.filterwarnings("ignore")

QUERY = "bert.encoder.layer.0.attention.self.query"

COMMON: dict[str, list[Any]] = {
    "target_modules": [
        ["query", "value"], ["query"], ["query", "value", "key"], ["query", "value", "nothing"], [],
        None, "all-linear", "All-Linear", ".*(query|value)", "query|value", "(", "query",
        ["self.query", "self.value"], ["uery", "alue"], [QUERY, "value"], {"query": 1},
        ["query", 3],
        ["key", "value", "output.dense"], ".*(key|value|output.dense)",
    ],
    "exclude_modules": [None, [], ["key"], ["query"], ".*query", "bert.*", [QUERY], "("],
    "layers_to_transform": [None, [0, 1], [0], 1, [], [5], "0", -1],
    "layers_pattern": [None, "layer", ["layer"], "h", "encoder.layer", [], "lay.r", ["h", "layer"]],
    "modules_to_save": [None, [], ["classifier"], ["pooler"], ["nothing"], ["query"], "classifier"],
    "fan_in_fan_out": [True, False, None],
    "task_type": [
        None, "SEQ_CLS", "CAUSAL_LM", "TOKEN_CLS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "X", "", 3
    ],
    "inference_mode": [True, False, None],
    "peft_type": ["LORA", "IA3", "lora", None, "OFT", "VERA", "PROMPT_TUNING"],
    "peft_version": [None, "0.1", "x", 3],
    "base_model_name_or_path": [None, "", 3],
    "unknown_option": [None, False, 0, 1, "x", [], {}],
}  # fmt: skip
OF_LORA: dict[str, list[Any]] = {
    "r": [1, 4, 8, 0, -1, 4.0, "4", None, True],
    "lora_alpha": [0, 1, -3, 2.5, "6", None, 1e300],
    "lora_dropout": [0.0, 0.5, 1.0, -0.1, 1],
    "use_rslora": [True, False, None, 1],
    "use_dora": [True, False, None],
    "bias": ["none", "all", "lora_only", "x", None],
    "lora_bias": [True, False, None],
    "rank_pattern": [
        {}, {"query": 4}, {"nothing": 4}, {"query": 8}, {QUERY: 4}, {"^" + QUERY: 4}, {"(": 4},
        {"query": 0}, {"query": "4"}, {"quer": 4},
    ],
    "alpha_pattern": [
        {}, {"query": 3}, {"nothing": 3}, {QUERY: 3}, {"^" + QUERY: 3}, {"layer.0.*": 3},
        {"layer.0.attention.self.query": 3, "query": 9}, {"query": 9, ".*self.query": 3},
        {"query": 0}, {"query": None}, {"uery": 3}, {".*query": 3}, {"query|value": 3}, {"": 3},
        {"query$": 5}, {"self..uery": 5},
    ],
    "init_lora_weights": [True, False, "gaussian", "pissa", "eva", "x", None, "loftq"],
    "trainable_token_indices": [None, [1], {}],
    "target_parameters": [None, [], ["nothing"], ["query.weight"]],
    "layer_replication": [None, [], [[0, 2]]],
    "alora_invocation_tokens": [None, []],
    "use_qalora": [False, None, True],
    "ensure_weight_tying": [False, True, None],
}  # fmt: skip
OF_IA3: dict[str, list[Any]] = {
    "feedforward_modules": [
        None, [], ["output.dense"], ["dense"], ".*output.dense", "output.dense", ["nothing"],
        ["key"],
    ],
    "init_ia3_weights": [True, False, None],
}  # fmt: skip

GONE = "gone"
UNREAD_THERE = ("prepare_inputs_for_generation", "base_model.model.classifier.weight")
"""Why PEFT does not load some that we do: its class for a task asks more of a host than there is,
and it looks for a head where the task has one."""


def _edits(values: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    one = st.sampled_from(sorted(values)).flatmap(
        lambda key: st.tuples(st.just(key), st.sampled_from([*values[key], GONE]))
    )
    return st.lists(one, min_size=1, max_size=3).map(dict)


def _ours(model: nn.Module, folder: Path, batch: dict[str, Tensor]) -> Tensor | None:
    host = mg.Host(copy.deepcopy(model)).eval()
    try:
        host.load(folder)
    except mg.ModgraftError:  # any other error fails the test
        assert not list(host.implants)
        return None
    return output(host, batch)


@pytest.mark.parametrize(
    ("name", "values"),
    [("lora-bert", COMMON | OF_LORA), ("lora-ranks", OF_LORA), ("ia3-bert", COMMON | OF_IA3)],
)
def test_edited_options(name: str, values: dict[str, list[Any]], tmp_path: Path) -> None:
    case, model = CASES[name], model_of(CASES[name].host)
    batch = batch_of(case.host)
    trained(case, model, tmp_path / "theirs")
    said = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())

    @settings(
        max_examples=60, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(edits=_edits(values))
    def check(edits: dict[str, Any]) -> None:
        folder = tmp_path / "edited"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "theirs", folder)
        edited = {k: v for k, v in (said | edits).items() if v != GONE}
        (folder / "adapter_config.json").write_text(json.dumps(edited))
        got = _ours(model, folder, batch)
        if got is None:
            return
        try:
            made: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
        except (ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
            assert any(words in str(error) for words in UNREAD_THERE), (edits, error)  # noqa: PT017
            return
        expected = output(made.eval().double(), batch)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9, msg=lambda m: f"{edits}: {m}")

    check()


def test_several_adapters_lie_in_folders_of_their_names(tmp_path: Path) -> None:
    model = model_of("bert")
    made: Any = peft.get_peft_model(
        copy.deepcopy(model), CASES["lora-bert"].config(), adapter_name="fr"
    )
    made.add_adapter("de", CASES["lora-bert"].config())
    made.save_pretrained(tmp_path / "both")
    host = mg.Host(model)
    with pytest.raises(
        mg.ModgraftError, match=r"there are some in de, fr: load host\.load\('.*de'"
    ):
        host.load(tmp_path / "both")
    host.load(tmp_path / "both" / "fr")
    assert list(host.implants) == ["fr"]


@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_several_here_is_given_a_name(tmp_path: Path, lazy: bool) -> None:
    model, batch = model_of("bert"), batch_of("bert")
    for name in ("a", "b"):
        trained(CASES["ia3-bert"], model, tmp_path / name / "ia3")
    host = mg.Host(copy.deepcopy(model)).eval()
    host.load(tmp_path / "a" / "ia3", lazy=lazy)
    host.load(tmp_path / "b" / "ia3", "other", lazy=lazy)
    host.use("other + other_input")
    assert {*host.implants, *host._waiting} == {"ia3", "ia3_input", "other", "other_input"}
    expected = output(peft.PeftModel.from_pretrained(model, str(tmp_path / "b" / "ia3")), batch)
    torch.testing.assert_close(output(host, batch), expected, rtol=0, atol=1e-9)


class Own(nn.Module):
    """A host that calls layers of its own as PEFT calls what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("base_layer", "original_module", "modules_to_save", "first"):
            inner = nn.Module()
            inner.base_layer = nn.Linear(4, 4)  # type: ignore[assignment]
            self.add_module(name, inner)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        for name in ("base_layer", "original_module", "modules_to_save", "first"):
            x = self.get_submodule(f"{name}.base_layer")(x).tanh()
        return type("Out", (), {"logits": self.head(x)})


NAMED = ["first.base_layer", "original_module.base_layer", "base_layer.base_layer"]


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_host_that_calls_its_layers_as_peft_does(tmp_path: Path, bias: str) -> None:
    torch.manual_seed(0)
    model, batch = Own().double(), {"x": torch.randn(3, 4).double()}
    case: Case = lora("", NAMED, bias=bias, modules_to_save=["head"])
    made = trained(case, model, tmp_path / "theirs")
    host = mg.Host(copy.deepcopy(model)).eval()
    host.load(tmp_path / "theirs")
    torch.testing.assert_close(output(host, batch), output(made, batch), rtol=0, atol=1e-9)
    host.save("theirs", tmp_path / "ours", format="peft")
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"))
    torch.testing.assert_close(output(again, batch), output(host, batch), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("host", "saved", "words"),
    [
        ("gpt2", ["wte"], r"wte\.weight was trained as a copy .* lm_head\.weight is the same"),
        ("gpt2", ["lm_head"], r"lm_head\.weight was trained as a copy .*wte\.weight is the same"),
        ("gpt2", ["wte", "lm_head"], r"wte\.weight are two weights in the file, and in this host"),
        ("llama", ["embed_tokens", "lm_head"], None),
    ],
)
@pytest.mark.parametrize("tying", [False, True])
def test_tied_tables_that_were_saved(
    host: str, saved: list[str], words: str | None, tying: bool, tmp_path: Path
) -> None:
    model, batch = model_of(host), batch_of(host)
    target = "c_attn" if host == "gpt2" else "q_proj"
    case = lora(host, [target], modules_to_save=saved, ensure_weight_tying=tying)
    made = trained(case, model, tmp_path)
    here = mg.Host(copy.deepcopy(model)).eval()
    if words is None:
        here.load(tmp_path)
        torch.testing.assert_close(output(here, batch), output(made, batch), rtol=0, atol=1e-9)
        return
    with pytest.raises(mg.ModgraftError, match=words if not tying else "weight|lm_head"):
        here.load(tmp_path)


def test_no_targets_and_patterns_of_nothing(tmp_path: Path) -> None:
    model = model_of("bert")
    trained(CASES["lora-bert"], model, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"target_modules": None}))
    with pytest.raises(mg.ModgraftError, match=r'write "target_modules": \["query", "value"\]'):
        mg.Host(copy.deepcopy(model)).load(tmp_path / "a")
    path.write_text(json.dumps(said | {"alpha_pattern": {"none": 3}}))
    with pytest.warns(UserWarning, match="alpha_pattern has 'none', which matches no layer"):
        mg.Host(copy.deepcopy(model)).load(tmp_path / "a")
