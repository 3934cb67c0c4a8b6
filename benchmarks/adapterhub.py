"""What AdapterHub's ``adapters`` computes, written down for ``tests/peers/test_adapterhub.py``.

``adapters`` pins an older ``transformers`` than modgraft runs with, so it has an environment of its
own, and this file uses nothing of modgraft:

    python3 -m venv /tmp/adapters-env
    /tmp/adapters-env/bin/pip install torch==2.13.0 transformers==4.57.6 adapters==1.3.0
    /tmp/adapters-env/bin/python benchmarks/adapterhub.py tests/fixtures/adapterhub
    /tmp/adapters-env/bin/python benchmarks/adapterhub.py tests/fixtures/adapterhub --check FOLDER

The first writes ``HOST.safetensors`` for each small host (weights, a padded batch, the bare
output), ``METHOD.safetensors`` for each method (``HOST/tensor/NAME`` as ``adapters`` names it,
``HOST/grad/NAME`` of mean(output²), ``HOST/output``; of some ``METHOD/HOST`` in
``outputs.safetensors`` and no more), and ``made.json`` with versions and
configurations. All is float32 but the outputs, which ``adapters`` computed in float64 from that.
``saved/METHOD/HOST`` is the folder that ``save_adapter`` makes of them, as safetensors. The second
loads folders of that layout, written by modgraft, and compares outputs with those of the fixtures.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIZE = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
HOSTS = {
    "bert": (
        "Bert",
        "ForMaskedLM",
        {
            **SIZE,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {
            **IDS,
            "vocab_size": 41,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        {
            "vocab_size": 41,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.0,
        },
    ),
    "llama": (
        "Llama",
        "ForCausalLM",
        {**SIZE, **IDS, "intermediate_size": 24, "num_key_value_heads": 1},
    ),
    "roberta": (
        "Roberta",
        "ForSequenceClassification",
        {**SIZE, **QUIET, "intermediate_size": 24, "max_position_embeddings": 34},
    ),
    "distilbert": (
        "DistilBert",
        "ForSequenceClassification",
        {
            "vocab_size": 41,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
    ),
    "bart": (
        "Bart",
        "ForConditionalGeneration",
        {
            "vocab_size": 41,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "decoder_start_token_id": 1,
            "forced_eos_token_id": None,
            "dropout": 0.0,
        },
    ),
    "vit": (
        "ViT",
        "ForImageClassification",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 4,
            "patch_size": 2,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
}
PHM = {"reduction_factor": 2, "phm_dim": 4, "phm_rank": 2}
INVERTIBLE = {
    "mh_adapter": False,
    "output_adapter": False,
    "reduction_factor": 4,
    "non_linearity": "relu",
    "inv_adapter": "nice",
    "inv_adapter_reduction_factor": 2,
}
METHODS = {
    "houlsby": ("DoubleSeqBnConfig", {"reduction_factor": 4}),
    "pfeiffer": ("SeqBnConfig", {"reduction_factor": 4}),
    "parallel": ("ParBnConfig", {"reduction_factor": 4}),
    "compacter": ("CompacterConfig", PHM),
    "compacter_apart": ("CompacterConfig", {**PHM, "phm_dim": 2, "shared_phm_rule": False}),
    "compacter_plus_plus": ("CompacterPlusPlusConfig", PHM),
    "lora": ("LoRAConfig", {"r": 3, "alpha": 6}),
    "ia3": ("IA3Config", {}),
    "prefix": ("PrefixTuningConfig", {"prefix_length": 4, "flat": True}),
    "prefix_reparametrised": ("PrefixTuningConfig", {"prefix_length": 4, "bottleneck_size": 8}),
    "stack": ("SeqBnConfig", {"reduction_factor": 4}),
    "invertible": ("BnConfig", INVERTIBLE),
}
EVERY = {"reduction_factor": 4, "mh_adapter": True, "cross_adapter": True}
SPLIT = {"reduction_factor": 4, "original_ln_before": False, "non_linearity": "relu"}
METHODS |= {
    "houlsby_attention": ("BnConfig", {**SPLIT, "mh_adapter": True, "output_adapter": False}),
    "houlsby_output": ("BnConfig", {**SPLIT, "mh_adapter": False, "output_adapter": True}),
    "pfeiffer_invertible": ("SeqBnInvConfig", {"reduction_factor": 4}),
    "mam": (
        "ConfigUnion",
        [
            ("PrefixTuningConfig", {"prefix_length": 3, "bottleneck_size": 8}),
            ("ParBnConfig", {"reduction_factor": 4}),
        ],
    ),
    "several": (
        "ConfigUnion",
        [
            ("LoRAConfig", {"r": 2, "alpha": 4, "intermediate_lora": True}),
            ("PrefixTuningConfig", {"prefix_length": 3, "flat": True}),
            ("DoubleSeqBnConfig", {"reduction_factor": 4}),
        ],
    ),
    "head": ("LoRAConfig", {"r": 2, "alpha": 4}),
    "fusion": ("SeqBnConfig", {"reduction_factor": 4}),
    "fusion_static": ("DoubleSeqBnConfig", {"reduction_factor": 4}),
    "cross": ("DoubleSeqBnConfig", {"reduction_factor": 4, "cross_adapter": True}),
    "on_attention": ("SeqBnConfig", {**EVERY, "original_ln_before": True}),
    "beside_attention": ("ParBnConfig", EVERY),
    "dora": ("DoRAConfig", {"r": 3, "alpha": 3}),
    "left_out": ("LoRAConfig", {"r": 2, "alpha": 4, "leave_out": [0, 2]}),
}
PICKLED = {
    "pytorch_adapter.bin": "adapter.safetensors",
    "pytorch_model_head.bin": "model_head.safetensors",
}
OUTPUT_ALONE = ("cross", "on_attention", "beside_attention", "dora", "left_out")
OLD = ("bert", "gpt2", "t5", "llama")
PREFIXED = ("bert", "gpt2", "llama", "roberta", "distilbert", "bart")
# Two adapters, one on the other; and at Llama's embeddings alone: the models with static heads do
# not undo it, and in others no single layer puts out what it acts on. A prefix in a T5 is for
# tests/peers alone.
ONLY = {method: OLD for method in METHODS if method not in OUTPUT_ALONE} | {
    "stack": ("bert", "gpt2"),
    "invertible": ("llama",),
    "pfeiffer_invertible": ("llama",),
    "lora": (*OLD, "roberta", "distilbert", "bart"),
    "ia3": (*OLD, "roberta", "distilbert", "bart"),
    "prefix": ("t5", *PREFIXED),
    "prefix_reparametrised": ("t5", *PREFIXED),
    "mam": ("bert",),
    "several": ("bert", "gpt2", "llama"),
    "head": ("roberta", "distilbert"),
    "fusion": ("gpt2", "t5", "llama"),
    "fusion_static": ("bert", "gpt2"),
}
NOT_SAVED = ("stack",)
# Of these the outputs alone are kept, all in one file.
FURTHER = ("roberta", "distilbert", "bart", "vit")
MORE = {
    "houlsby": FURTHER,
    "pfeiffer": FURTHER,
    "parallel": ("roberta", "distilbert"),
    "compacter": ("roberta", "distilbert", "vit"),
    "compacter_plus_plus": ("distilbert", "bart"),
    "cross": ("t5", "bart"),
    "on_attention": ("roberta", "distilbert", "bart", "t5"),
    "beside_attention": ("roberta", "distilbert", "t5"),
    "dora": ("t5", "llama"),
    "lora": ("vit",),
    "ia3": ("vit",),
    "prefix": ("vit",),
    "left_out": ("t5", "bart"),
    "invertible": ("bert", "roberta", "distilbert", "gpt2", "bart"),
    "pfeiffer_invertible": ("roberta", "gpt2"),
    "fusion": ("bert", "distilbert", "bart"),
}
OUTPUTS = "outputs"
# Heads of AutoAdapterModel, each beside an adapter: how it is added, and its options by host.
ONE = {"layers": 1, "activation_function": None}
LAST = {**ONE, "bias": False}  # as GPT-2's own
HEADS = {
    "head_classification": {
        "bert": {},
        "roberta": {},
        "distilbert": {"activation_function": "relu"},
        "bart": {},
        "gpt2": LAST,
        "llama": LAST,
    },
    "head_pooled": {"bert": {**ONE, "use_pooler": True}},
    "head_tagging": {host: {} for host in ("bert", "roberta", "distilbert", "gpt2", "llama")},
    "head_question_answering": {host: {} for host in ("bert", "roberta", "distilbert", "bart")},
    "head_causal_lm": dict.fromkeys(("gpt2", "llama"), LAST),
    "head_masked_lm": {"bert": {}},
    "head_seq2seq_lm": {"t5": {}, "bart": {}},
    "head_image_classification": {"vit": ONE},
}
METHODS |= {method: ("SeqBnConfig", {"reduction_factor": 8}) for method in HEADS}
MORE |= {method: tuple(hosts) for method, hosts in HEADS.items()}


def stir(module: nn.Module) -> None:
    """Weights away from their start, which is so small that nothing would show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.add_(0.1)


def build(name: str) -> nn.Module:
    """The host, the same one every time."""
    stem, task, config = HOSTS[name]
    torch.manual_seed(0)
    # its prefixes are masked out where a mask is bool, as in the other implementations
    config = getattr(transformers, stem + "Config")(**config, attn_implementation="eager")
    model = getattr(transformers, stem + task)(config)
    stir(model)
    return model.eval()


def flexible(host: str) -> nn.Module:
    """The host's base model under heads of ``adapters``; its pooler, if it has one, is a ramp."""
    plain = build(host)
    own = {k: v for k, v in plain.base_model.state_dict().items() if not k.startswith("lm_head")}
    model = getattr(adapters, f"{HOSTS[host][0]}AdapterModel")(plain.config)
    lacking = model.base_model.load_state_dict(own, strict=False).missing_keys
    with torch.no_grad():
        for key in (key for key in lacking if "pooler" in key):
            weight = model.base_model.get_parameter(key)
            weight.copy_(torch.linspace(-1, 1, weight.numel()).view(weight.shape))
    return model.eval()


def add_head(model: nn.Module, method: str, options: dict[str, Any]) -> None:
    """Add a head of the adapter's name, as the method has it."""
    kind = method.removeprefix("head_").replace("pooled", "classification")
    labels = {} if kind == "question_answering" or kind.endswith("lm") else {"num_labels": 3}
    model.add_prediction_head_from_config("m", {"head_type": kind, **labels, **options})


def without_positions(t5: nn.Module) -> None:
    """Relative positions that weigh nothing: where a prefix of k is there, ``adapters`` counts
    the keys from k on and the queries from 0, so that a token is k away from itself."""
    with torch.no_grad():
        for name, parameter in t5.named_parameters():
            if "relative_attention_bias" in name:
                parameter.zero_()


def batch(name: str, method: str = "") -> dict[str, Tensor]:
    """Three examples, the second padded at its end."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 41, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    made = {"input_ids": ids, "attention_mask": mask}
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 4, 4, generator=generator)}
    if method.startswith("head_") and not method.endswith("lm"):
        ids[:, 4] = 1  # where a text ends, of which BART makes classes
        return made
    if name in ("t5", "bart"):
        key = "decoder_input_ids" if method.startswith("head_") else "labels"
        made[key] = torch.randint(3, 41, (3, 5), generator=generator)
    return made


def inputs(name: str, method: str = "") -> dict[str, Tensor]:
    """The batch, images as float64 as the model is."""
    made = batch(name, method)
    return {k: v.double() if v.is_floating_point() else v for k, v in made.items()}


def output_of(model: nn.Module, host: str, method: str) -> Tensor:
    """Logits; those of a span's start and end side by side."""
    output = model(**inputs(host, method))
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits


def configuration(kind: str, options: Any) -> Any:
    """A configuration of ``adapters``, or a union of several."""
    if kind == "ConfigUnion":
        return adapters.ConfigUnion(*(configuration(k, o) for k, o in options))
    return getattr(adapters, kind)(**options)


def save(model: nn.Module, folder: Path, name: str, with_head: bool) -> None:
    """Save the adapter as ``save_adapter`` does, but with what is one tensor by several names.

    A prefix is in the model and again in each layer, which safetensors refuses to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_adapter(str(folder), name, with_head=with_head)
    for old, new in PICKLED.items():
        if (folder / old).exists():
            tensors = torch.load(folder / old, weights_only=True)
            save_file({k: t.clone() for k, t in tensors.items()}, folder / new)
            (folder / old).unlink()


def run(host: str, method: str, folder: Path) -> dict[str, Tensor]:
    """One method in one host, saved to ``folder``: its tensors, their gradients, and the output."""
    if method in HEADS:
        model = flexible(host)
    else:
        model = build(host)
        if host == "t5" and method.startswith("prefix"):
            without_positions(model)
        adapters.init(model)
    bare = set(model.state_dict())
    kind, options = METHODS[method]
    fused = method.startswith("fusion")
    names = ("m", "n") if fused or method == "stack" else ("m",)
    for name in names:
        model.add_adapter(name, config=configuration(kind, options))
    together = (adapters.composition.Fuse if fused else adapters.composition.Stack)(*names)
    if fused:
        model.add_adapter_fusion(together, "static" if "static" in method else "dynamic")
    if method in HEADS:
        add_head(model, method, HEADS[method][host])
    model.set_active_adapters(together)
    model.eval()
    own = {k: p for k, p in model.named_parameters() if k not in bare}
    torch.manual_seed(2)
    with torch.no_grad():
        for tensor in own.values():
            tensor.copy_(torch.randn(tensor.shape).mul(0.3).add(1.0 if method == "ia3" else 0.0))
    if method == "head":
        stir(model.classifier)
    if method not in NOT_SAVED and (host, method[:6]) != ("t5", "prefix"):
        saved = folder / "saved" / method / host
        if fused:
            saved.mkdir(parents=True, exist_ok=True)
            model.save_adapter_fusion(str(saved), together, use_safetensors=True)
        for name in names:
            save(model, saved / name if fused else saved, name, with_head=method.startswith("head"))
    model.double()
    own = {k: p for k, p in model.named_parameters() if k in own}
    for tensor in own.values():
        tensor.requires_grad_(True)
    output = output_of(model, host, method)
    output.square().mean().backward()
    made = {f"{host}/tensor/{k}": p.detach().float() for k, p in own.items()}
    made |= {f"{host}/grad/{k}": p.grad.float() for k, p in own.items()}
    return {**made, f"{host}/output": output.detach()}


def check(fixtures: Path, folder: Path) -> None:
    """Load what modgraft wrote to ``folder/METHOD/HOST`` and compare outputs."""
    for path in sorted(folder.glob("*/*")):
        method, host = path.parent.name, path.name
        if (path / "head_config.json").exists() and method in HEADS:
            model = flexible(host)
        else:
            model = build(host)
            adapters.init(model)
        said: dict[str, list[str]] = {}
        for member in sorted(each for each in path.iterdir() if each.is_dir()):
            model.load_adapter(str(member), use_safetensors=True, with_head=False)
        if (path / "adapter_fusion_config.json").exists():
            name = model.load_adapter_fusion(
                str(path), use_safetensors=True, set_active=True, loading_info=said
            )
            compare(model, fixtures, method, host)
            continue
        name = model.load_adapter(
            str(path), use_safetensors=True, set_active=True, loading_info=said
        )
        lost = [k for k in said.get("missing_keys", []) if f".{name}." in k and ".pool." not in k]
        again = {"cls.predictions.bias"}  # the decoder's of a BERT, which a whole head has twice
        extra = set(said.get("unexpected_keys", [])) - again
        if lost or extra:
            raise SystemExit(f"{path}: missing {lost}, unexpected {extra}")
        compare(model, fixtures, method, host)


def compare(model: nn.Module, fixtures: Path, method: str, host: str) -> None:
    """Print how far a model's output is from the fixture's."""
    with torch.no_grad():
        output = output_of(model.double().eval(), host, method)
    if host in MORE.get(method, ()):
        there = load_file(fixtures / f"{OUTPUTS}.safetensors")[f"{method}/{host}"]
    else:
        there = load_file(fixtures / f"{method}.safetensors")[f"{host}/output"]
    print(f"{host:10} {method:22} differs by up to {(output - there).abs().max():.3g}")


def main(folder: Path) -> None:
    """Write every fixture into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    bare = {}
    for host in HOSTS:
        model = build(host)
        tensors = {f"weight/{k}": p.detach().clone() for k, p in model.named_parameters()}
        tensors |= {f"input/{k}": v for k, v in batch(host).items()}
        with torch.no_grad():
            tensors["output"] = bare[host] = model.double()(**inputs(host)).logits
        save_file(tensors, folder / f"{host}.safetensors")
    outputs = {}
    for method in METHODS:
        tensors = {}
        for host in (*ONLY.get(method, ()), *MORE.get(method, ())):
            made = run(host, method, folder)
            output = made[f"{host}/output"]
            of = bare[host] if output.shape == bare[host].shape else torch.zeros(())
            changed = (output - of).abs().max()
            print(f"{host:10} {method:22} changes the output by up to {changed:.3g}")
            if host in MORE.get(method, ()):
                outputs[f"{method}/{host}"] = made[f"{host}/output"]
            else:
                tensors |= made
        if tensors:
            save_file(tensors, folder / f"{method}.safetensors")
    save_file(outputs, folder / f"{OUTPUTS}.safetensors")
    made = {
        "versions": {m.__name__: m.__version__ for m in (adapters, transformers, torch)},
        "hosts": {k: {"class": s + t, "config": c} for k, (s, t, c) in HOSTS.items()},
        "methods": {k: {"class": c, "options": o} for k, (c, o) in METHODS.items()},
    }
    (folder / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("fixtures", type=Path, help="the folder of fixtures")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="compare what is there")
    options = parser.parse_args()
    if options.check is None:
        main(options.fixtures)
    else:
        check(options.fixtures, options.check)
