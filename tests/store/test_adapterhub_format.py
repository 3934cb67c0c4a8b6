"""Folders that ``adapters`` really saved load here with its outputs, and are written as they were.

``benchmarks/adapterhub.py`` made the fixtures, and with ``--check`` loads what is written here.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import modgraft as mg
from modgraft.core.errors import CheckpointError

FOLDER = Path(__file__).parents[1] / "fixtures" / "adapterhub"
MADE = json.loads((FOLDER / "made.json").read_text("utf-8"))
CLOSE = {"t5": 1e-6, "llama": 5e-6, "vit": 1e-6}  # as in tests/peers; all others 1e-9
REFUSED = {
    ("parallel", "gpt2"): r"output_adapter in a gpt2 that reads the residual \(is_parallel\)",
    ("parallel", "llama"): r"output_adapter in a llama that reads the residual \(is_parallel\)",
    ("compacter", "t5"): "rule that its Compacter's layers share is not in it",
    ("compacter_plus_plus", "t5"): "rule that its Compacter's layers share is not in it",
}
TASKS = {
    "head_classification": "ForSequenceClassification",
    "head_pooled": "ForSequenceClassification",
    "head_tagging": "ForTokenClassification",
    "head_question_answering": "ForQuestionAnswering",
}
BASES = ("encoder.", "decoder.", "shared.")  # of a T5, which has no name for what is no head
CASES = [(path.parent.name, path.name) for path in sorted(FOLDER.glob("saved/*/*"))]
HEADS = [case for case in CASES if case[0].startswith("head_")]
READ = [case for case in CASES if case not in {*REFUSED, *HEADS}]


def model(name: str, method: str = "") -> nn.Module:
    kind, config = MADE["hosts"][name]["class"], MADE["hosts"][name]["config"]
    if method in TASKS:
        kind, config = kind.partition("For")[0], config | {"num_labels": 3}
        kind = kind.removesuffix("LMHeadModel") + TASKS[method]
        if method == "head_question_answering":
            config |= {"num_labels": 2}
    elif method.startswith("head_image"):
        config = config | {"num_labels": 3}
    cls = getattr(transformers, kind)
    made = cls(cls.config_class(**config)).eval()
    weights = {in_today(k): t for k, t in load_file(FOLDER / f"{name}.safetensors").items()}
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "pooler" in key:
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
            elif not method.startswith("head_") or key.startswith((*BASES, made.base_model_prefix)):
                parameter.copy_(weights[f"weight/{key}"])
    return made.double()


def in_today(key: str) -> str:
    """Return what today's transformers calls a weight of a ViT that ``adapters`` has."""
    for old, new in {
        r"vit\.encoder\.layer\.": "vit.layers.",
        r"\.attention\.attention\.(query|key|value)": lambda m: f".attention.{m[1][0]}_proj",
        r"(vit\..*)\.attention\.output\.dense": r"\1.attention.o_proj",
        r"(vit\.layers\.\d)\.intermediate\.dense": r"\1.mlp.fc1",
        r"(vit\.layers\.\d)\.output\.dense": r"\1.mlp.fc2",
    }.items():
        key = re.sub(old, new, key)
    return key


def batch(name: str, method: str = "") -> dict[str, torch.Tensor]:
    saved = load_file(FOLDER / f"{name}.safetensors")
    found = {k.removeprefix("input/"): t for k, t in saved.items() if "input/" in k}
    if method.startswith("head_") and name != "vit":
        labels = found.pop("labels", None)
        if not method.endswith("lm"):
            found["input_ids"][:, 4] = 1  # where a text ends
        elif labels is not None:
            found["decoder_input_ids"] = labels
    return {k: t.double() if t.is_floating_point() else t for k, t in found.items()}


def computed(host: mg.Host, name: str, method: str = "") -> torch.Tensor:
    """Return the logits, those of a span's start and end side by side."""
    with torch.no_grad():
        output = host(**batch(name, method))
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits


def output_of(method: str, name: str) -> torch.Tensor:
    """Return what ``adapters`` computed."""
    outputs = load_file(FOLDER / "outputs.safetensors")
    if f"{method}/{name}" in outputs:
        return outputs[f"{method}/{name}"]
    return load_file(FOLDER / f"{method}.safetensors")[f"{name}/output"]


def copied(tmp_path: Path, method: str = "pfeiffer", name: str = "bert") -> Path:
    return Path(shutil.copytree(FOLDER / "saved" / method / name, tmp_path / "folder"))


def change(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    said = json.loads(path.read_text("utf-8"))
    for key, value in changes.items():
        (said if key in said else said["config"])[key] = value
    path.write_text(json.dumps(said), encoding="utf-8")


def test_every_fixture_is_used() -> None:
    assert len(READ) == 108


# three of the hosts classify, and these folders have no heads: test_beside.py asks for the words
@pytest.mark.filterwarnings("ignore:.*(does not hold|did not train with)")
@pytest.mark.parametrize(("method", "name"), READ)
def test_a_real_save_gives_its_outputs_and_is_written_as_it_was(
    method: str, name: str, tmp_path: Path
) -> None:
    folder, host = FOLDER / "saved" / method / name, mg.Host(model(name))
    host.load(folder)
    output, expected = computed(host, name), output_of(method, name)
    torch.testing.assert_close(output, expected, rtol=0, atol=CLOSE.get(name, 1e-9))

    host.save(None, tmp_path / "new", format="adapterhub")
    there, here = (tensors_of(f) for f in (folder, tmp_path / "new"))
    assert there.keys() == here.keys()
    for key, tensor in there.items():
        off = 1e-15 if key.endswith(".m.weight") else 0  # a sum with the norms of the host
        torch.testing.assert_close(here[key], tensor.double(), rtol=off, atol=off)
    for file in ("adapter_config.json", "head_config.json", "adapter_fusion_config.json"):
        if (folder / file).exists():
            there, here = (
                json.loads((f / file).read_text("utf-8")) for f in (folder, tmp_path / "new")
            )
            assert meant(here, name) == meant(there, name)


def test_a_union_takes_another_name() -> None:
    host = mg.Host(model("bert"))
    folder = FOLDER / "saved" / "mam" / "bert"
    host.load(folder)
    host.load(folder, name="again", active=False)
    assert {*host.implants} == {
        f"{name}_{kind}" for name in ("m", "again") for kind in ("self_prefix", "bottleneck")
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder; of a prefix, which is there again at each layer, one."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {k: t for k, t in load_file(path).items() if ".prefix_tuning.pool." not in k}
    return found


def meant(said: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration without what is of its start, of no host on a hub, and of nothing."""
    configs = said["config"] or {}
    for one in (said, configs, *configs.get("configs", [])):
        for drawn in ("init_weights", "model_name"):
            one.pop(drawn, None)
        if name not in ("t5", "bart"):
            one.pop("cross_adapter", None)
        if one.get("mh_adapter") is one.get("output_adapter") is False:
            one.pop("reduction_factor")  # of bottlenecks that are nowhere
    if configs.get("architecture") == "union":
        configs["configs"].sort(key=lambda one: json.dumps(one, sort_keys=True))
    return said


@pytest.mark.parametrize(("method", "name"), REFUSED)
def test_real_saves_that_are_not_computed_alike_or_lack_a_tensor_are_refused(
    method: str, name: str
) -> None:
    host = mg.Host(model(name))
    with pytest.raises(CheckpointError, match=REFUSED[method, name]):
        host.load(FOLDER / "saved" / method / name)
    assert not host.implants


def test_a_rule_that_adapters_would_lose_is_not_written(tmp_path: Path) -> None:
    host = mg.Host(model("t5"))
    host.implant("m", mg.Compacter(reduction=2), at="block")
    with pytest.raises(mg.ModgraftError, match="shared=False"):
        host.save("m", tmp_path / "new", format="adapterhub")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("pfeiffer", "ln_before", True),
        ("pfeiffer", "use_gating", True),
        ("pfeiffer", "residual_before_ln", "post_add"),
        ("pfeiffer", "original_ln_after", False),
        ("pfeiffer", "inv_adapter", "nice"),
        ("pfeiffer", "dropout", 0.1),
        ("pfeiffer", "scaling", "learned"),
        ("pfeiffer", "non_linearity", "leakyrelu"),
        ("pfeiffer", "reduction_factor", {"0": 4, "default": 2}),
        ("pfeiffer", "mh_adapter", "yes"),
        ("lora", "use_dora", True),
        ("lora", "dtype", "int8"),
        ("lora", "vera_d", 0.1),
        ("lora", "use_gating", True),
        ("lora", "architecture", "reft"),
        ("lora", "architecture", "union"),
        ("lora", "surprise", 1),
        ("lora", "alpha", "8"),
        ("lora", "attn_matrices", ["q", ["v"]]),
        ("lora", "leave_out", 3),
        ("lora", "r", True),
    ],
)
def test_what_is_set_and_not_understood_is_refused_by_name(
    method: str, key: str, value: object, tmp_path: Path
) -> None:
    folder, host = copied(tmp_path, method), mg.Host(model("bert"))
    change(folder, **{key: value})
    with pytest.raises(CheckpointError, match=key):
        host.load(folder)
    assert not host.implants


@pytest.mark.parametrize("name", ["head_config.json", "adapter_fusion_config.json", "embedding.pt"])
def test_broken_heads_fusions_and_embeddings_are_refused(name: str, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / name).write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=name):
        mg.Host(model("bert")).load(folder)


@pytest.mark.parametrize("name", ["vit", "bart"])
def test_a_place_that_no_layer_of_the_host_has_is_refused(name: str, tmp_path: Path) -> None:
    folder = copied(tmp_path, "pfeiffer", name)
    change(folder, is_parallel=True)
    with pytest.raises(CheckpointError, match=r"\(is_parallel\): no layer of the host has that"):
        mg.Host(model(name)).load(folder)


def test_an_invertible_adapter_that_is_undone_has_no_place_in_the_format(tmp_path: Path) -> None:
    host = mg.Host(model("gpt2"))
    host.implant("m", mg.InvertibleAdapter(), at=["embedding", "decoder.output"])
    with pytest.raises(mg.ModgraftError, match="undoes an invertible adapter"):
        host.save("m", tmp_path / "new", format="adapterhub")


def test_prompts_and_prefixes_that_are_computed_otherwise_are_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, "prefix")
    path = folder / "adapter_config.json"
    said = json.loads(path.read_text("utf-8"))
    said["config"]["architecture"] = "prompt_tuning"
    path.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(CheckpointError, match="after the positions and the norm"):
        mg.Host(model("bert")).load(folder)
    said["config"]["architecture"], said["model_type"] = "prefix_tuning", "t5"
    path.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(CheckpointError, match="relative positions"):
        mg.Host(model("t5")).load(folder)
    host = mg.Host(model("bert"))
    host.implant("m", mg.Prefix(length=2, counted=True))
    with pytest.raises(mg.ModgraftError, match="counts as positions"):
        host.save("m", tmp_path / "new", format="adapterhub")


def test_a_prefix_that_stands_otherwise_at_a_layer_is_refused(tmp_path: Path) -> None:
    folder, host = copied(tmp_path, "prefix"), mg.Host(model("bert"))
    tensors = load_file(folder / "adapter.safetensors")
    key = next(key for key in tensors if ".pool." in key)
    save_file(tensors | {key: tensors[key] + 1}, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="is there again"):
        host.load(folder)
    assert not host.implants


@pytest.mark.parametrize(("method", "name"), HEADS)
def test_heads_of_adapter_models_are_those_of_the_class_that_computes_them(
    method: str, name: str, tmp_path: Path
) -> None:
    host = mg.Host(model(name, method))
    host.load(FOLDER / "saved" / method / name)
    output, expected = computed(host, name, method), output_of(method, name)
    torch.testing.assert_close(output, expected, rtol=0, atol=CLOSE.get(name, 1e-9))

    host.save(None, tmp_path, format="adapterhub")
    again = mg.Host(model(name, method))
    again.load(tmp_path)
    assert torch.equal(computed(again, name, method), output)


def flexible(tmp_path: Path, method: str, name: str, **changes: object) -> Path:
    """Return a folder with a head of an AdapterModel, whose configuration is changed."""
    folder = copied(tmp_path, method, name)
    path = folder / "head_config.json"
    said = json.loads(path.read_text("utf-8"))
    said["config"] |= changes
    path.write_text(json.dumps(said), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("method", "name", "key", "value"),
    [
        ("head_classification", "roberta", "layers", 3),
        ("head_classification", "roberta", "use_pooler", True),
        ("head_classification", "distilbert", "activation_function", "tanh"),
        ("head_classification", "bert", "head_type", "multilabel_classification"),
        ("head_classification", "bert", "head_type", "multiple_choice"),
        ("head_classification", "bert", "dropout_prob", 0.5),
        ("head_classification", "bert", "label2id", ["A"]),
        ("head_classification", "bert", "bias", "no"),
        ("head_causal_lm", "gpt2", "shift_labels", False),
        ("head_tagging", "bert", "surprise", 1),
    ],
)
def test_a_head_that_the_host_does_not_compute_is_refused(
    method: str, name: str, key: str, value: object, tmp_path: Path
) -> None:
    folder, host = flexible(tmp_path, method, name, **{key: value}), mg.Host(model(name, method))
    with pytest.raises(CheckpointError, match=f"head_config.json.*{key}"):
        host.load(folder)
    assert not host.implants


def test_the_words_of_a_tied_head_are_those_of_the_host(tmp_path: Path) -> None:
    folder = copied(tmp_path, "head_causal_lm", "gpt2")
    tensors = load_file(folder / "model_head.safetensors")
    save_file({k: t + 1 for k, t in tensors.items()}, folder / "model_head.safetensors")
    with pytest.raises(CheckpointError, match="is not the table of words"):
        mg.Host(model("gpt2")).load(folder)


@pytest.mark.parametrize(("key", "value"), [("alpha", 6), ("dropout", 0.1)])
def test_dora_that_is_another_function_is_refused(key: str, value: float, tmp_path: Path) -> None:
    folder = copied(tmp_path, "dora", "t5")
    change(folder, **{key: value})
    with pytest.raises(CheckpointError, match=f"use_dora with {key}"):
        mg.Host(model("t5")).load(folder)


def test_labels_that_the_host_calls_otherwise_are_warned_of(tmp_path: Path) -> None:
    labels = {"no": 0, "perhaps": 1, "yes": 2}
    folder = flexible(tmp_path, "head_tagging", "bert", label2id=labels)
    with pytest.warns(UserWarning, match="perhaps"):
        mg.Host(model("bert", "head_tagging")).load(folder)


@pytest.mark.parametrize("key", ["model_class", "config"])
def test_a_head_of_another_class_is_refused(key: str, tmp_path: Path) -> None:
    folder, host = copied(tmp_path, "head", "roberta"), mg.Host(model("roberta"))
    said = json.loads((folder / "head_config.json").read_text("utf-8"))
    said[key] = "RobertaAdapterModel" if key == "model_class" else {"head_type": "classification"}
    (folder / "head_config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(CheckpointError, match="the head is of a"):
        host.load(folder)


def test_a_union_of_two_at_one_layer_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, "lora")
    path = folder / "adapter_config.json"
    said = json.loads(path.read_text("utf-8"))
    said["config"] = {"architecture": "union", "configs": [said["config"], said["config"]]}
    path.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(CheckpointError, match="two of a kind"):
        mg.Host(model("bert")).load(folder)


def test_a_fusion_needs_its_adapters_and_the_same_mathematics(tmp_path: Path) -> None:
    folder = copied(tmp_path, "fusion", "gpt2")
    shutil.rmtree(folder / "n")
    with pytest.raises(CheckpointError, match="the adapter 'n' of the fusion is neither in"):
        mg.Host(model("gpt2")).load(folder)
    host = mg.Host(model("gpt2"))
    for name in "ab":
        host.implant(name, mg.Adapter(reduction=4), at="block")
    host.implant("f", mg.Mixture(["a", "b"], aggregate=mg.Fuse()))
    with pytest.raises(mg.ModgraftError, match=r"Fuse\(effects=True\) is written"):
        host.save("f", tmp_path / "new", format="adapterhub")
    assert not (tmp_path / "new").exists()


def test_the_head_of_one_adapter_of_a_fusion_comes_with_it(tmp_path: Path) -> None:
    folder = copied(tmp_path, "fusion", "gpt2")
    tensors = {"score.weight": torch.ones(2, 16)}
    config = model("gpt2").config
    config.num_labels = 2  # type: ignore[union-attr]
    classifier = transformers.GPT2ForSequenceClassification(config).eval()  # type: ignore[arg-type]
    said = {"config": None, "model_class": "GPT2ForSequenceClassification"}
    for name in "mn":
        save_file(tensors, folder / name / "model_head.safetensors")
        (folder / name / "head_config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(CheckpointError, match="have a head each"):
        mg.Host(classifier).load(folder)
    (folder / "m" / "head_config.json").unlink()
    again = mg.Host(classifier)
    again.load(folder)
    assert torch.equal(classifier.get_parameter("score.weight"), tensors["score.weight"])


def test_a_pickle_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(CheckpointError, match=r"pickle.*use_safetensors=True"):
        mg.Host(model("bert")).load(folder)


@pytest.mark.parametrize("extra", [True, False])
def test_a_tensor_too_many_or_too_few_is_refused(extra: bool, tmp_path: Path) -> None:
    folder = copied(tmp_path)
    tensors = load_file(folder / "adapter.safetensors")
    key = next(iter(tensors))
    tensors = {**tensors, f"{key}.more": torch.ones(2)} if extra else {
        k: t for k, t in tensors.items() if k != key
    }  # fmt: skip
    save_file(tensors, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="not understood"):
        mg.Host(model("bert")).load(folder)


@pytest.mark.parametrize(
    ("method", "name", "end", "shape"),
    [
        ("lora", "gpt2", "c_attn.loras.m.lora_B", (33, 3)),
        ("compacter", "bert", "W_right", (8,)),
        ("pfeiffer", "bert", "adapter_up.weight", (3, 3)),
    ],
)
def test_another_shape_is_refused(
    method: str, name: str, end: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    folder, host = copied(tmp_path, method, name), mg.Host(model(name))
    tensors = load_file(folder / "adapter.safetensors")
    tensors = {k: torch.ones(shape) if k.endswith(end) else t for k, t in tensors.items()}
    save_file(tensors, folder / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"which it never is|where this host needs"):
        host.load(folder)
    assert not host.implants


def test_another_host_another_version_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="this host is a gpt2"):
        mg.Host(model("gpt2")).load(FOLDER / "saved" / "lora" / "bert")
    folder = copied(tmp_path, "lora")
    change(folder, version="adapters.1.0.1")
    with pytest.raises(CheckpointError, match="scale of a LoRA"):
        mg.Host(model("bert")).load(folder)
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not an adapter's"):
        mg.Host(model("bert")).load(folder)


def test_layers_left_out_are_said_so(tmp_path: Path) -> None:
    host = mg.Host(model("bert"))
    host.implant("m", mg.LoRA(rank=2, alpha=3.0), at="bert.encoder.layer.1.*.query")
    host.save("m", tmp_path, format="adapterhub")
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["config"]
    assert (config["attn_matrices"], config["leave_out"]) == (["q"], [0])
    again = mg.Host(model("bert"))
    assert again.load(tmp_path).paths == host["m"].paths


def test_prefixes_of_a_decoder_alone_are_written(tmp_path: Path) -> None:
    host = mg.Host(model("bart"))
    host.implant("m_self", mg.Prefix(length=2, reparametrise=3), at="model.decoder.*.self_attn")
    host.implant("m_cross", mg.Prefix(length=2, reparametrise=3), at="cross_attention")
    host.save(["m_self", "m_cross"], tmp_path, format="adapterhub")
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["config"]
    assert (config["encoder_prefix"], config["leave_out"]) == (False, [])
    again = mg.Host(model("bart"))
    again.load(tmp_path)
    assert torch.equal(computed(again, "bart"), computed(host, "bart"))


@pytest.mark.parametrize(
    ("module", "at"),
    [
        (mg.LoRA(rank=2, rslora=True), "query"),
        (mg.LoRA(rank=2), "cls.predictions.decoder"),
        (mg.Adapter(width=3), "output"),
        (mg.Adapter(), "*.intermediate.dense"),
        (mg.Rescale(where="input"), "down"),
        (mg.SoftPrompt(length=2), None),
    ],
)
def test_what_has_no_place_in_the_format_is_refused(
    module: mg.Computation, at: str | None, tmp_path: Path
) -> None:
    host = mg.Host(model("bert"))
    host.implant("m", module, at=at)
    with pytest.raises(mg.ModgraftError, match=r"writ|reduction="):
        host.save("m", tmp_path / "new", format="adapterhub")
    assert not (tmp_path / "new").exists()
