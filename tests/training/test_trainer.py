"""transformers' Trainer, Seq2SeqTrainer and pipelines, and accelerate, with a host for a model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modgraft as mg
from contract.hosts import HOSTS
from training.tiny import t5

GIVEN: dict[str, Any] = {
    "remove_unused_columns": False, "label_names": ["labels"], "max_steps": 6, "save_steps": 2,
    "per_device_train_batch_size": 4, "learning_rate": 3e-2, "report_to": [], "use_cpu": True,
    "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip


def host(name: str, seed: int = 0) -> mg.Host:
    torch.manual_seed(seed)
    made = mg.Host(t5() if name == "t5" else HOSTS[name].model())
    made.implant("a", mg.LoRA(rank=2, dropout=0.2), at=["query", "value"])
    with torch.no_grad():
        for p in made["a"].parameters():
            p.normal_(0, 0.1)
    return made


def rows(count: int = 12) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 40, (count, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(made: nn.Module, folder: Path, kind: Any = tf.Trainer, **given: Any) -> Any:
    settings = tf.Seq2SeqTrainingArguments if kind is tf.Seq2SeqTrainer else tf.TrainingArguments
    given = GIVEN | given
    return kind(
        made, settings(str(folder), **given), train_dataset=rows(), eval_dataset=rows(4),
        processing_class=given.get("processing_class"),
    )  # fmt: skip


def same(a: mg.Host, b: mg.Host) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama"])
def test_the_best_modules_are_saved_and_loaded(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = host(name)
    theta = {k: v.clone() for k, v in made.model.state_dict().items()}
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(made, tmp_path, **best, metric_for_best_model="loss", greater_is_better=True)
    run.train()  # the best is the worst here: not the last one
    checkpoint = Path(run.state.best_model_checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    assert checkpoint.name != "checkpoint-6"
    assert {k for k in stored if k != "host_fingerprint"} == {
        k for k in made.state_dict() if k.startswith("implants.")
    }
    assert all(torch.equal(made.state_dict()[k], v) for k, v in stored.items() if "." in k)
    assert all(torch.equal(v, theta[k]) for k, v in made.model.state_dict().items())
    assert "missing keys" not in caplog.text
    learns = sum(p.numel() * 4 for p in made["a"].parameters())
    assert (checkpoint / "model.safetensors").stat().st_size < learns + 4000


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    given = {"lr_scheduler_type": "constant"}
    trainer(whole := host(name), tmp_path / "whole", **given).train()
    trainer(host(name), tmp_path / "parts", max_steps=4, **given).train()
    run = trainer(resumed := host(name, seed=3), tmp_path / "parts", **given)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6
    assert same(whole, resumed)


def test_a_checkpoint_of_another_host_is_refused(tmp_path: Path) -> None:
    trainer(host("gpt2"), tmp_path, max_steps=2).train()
    other = mg.Host(HOSTS["gpt2"].model(seed=4))
    other.implant("a", mg.LoRA(rank=2, dropout=0.2), at=["query", "value"])
    with pytest.raises(mg.ModgraftError, match=r"saved in another host \(weights differ"):
        trainer(other, tmp_path).train(resume_from_checkpoint=True)


def test_a_head_that_trains_is_saved_too(tmp_path: Path) -> None:
    made = host("bert")
    made.model.cls.predictions.transform.requires_grad_(True)
    trainer(made, tmp_path).train()
    stored = load_file(tmp_path / "checkpoint-6/model.safetensors")
    head = {k for k in stored if k.startswith("model.")}
    assert (
        head == {f"model.{k}" for k, p in made.model.named_parameters() if p.requires_grad} != set()
    )
    fresh = host("bert", seed=1)
    trainer(fresh, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-6"))
    assert same(fresh, made)


def test_seq2seq_checkpointing_and_noise(tmp_path: Path) -> None:
    seen = []

    def measure(predicted: Any) -> dict[str, float]:
        seen.append(predicted.predictions.shape)
        return {"width": float(predicted.predictions.shape[1])}

    made = host("t5")
    given = GIVEN | {
        "activation_checkpointing": True, "neftune_noise_alpha": 5.0, "predict_with_generate": True,
        "generation_max_length": 5, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3,
        "generation_config": tf.GenerationConfig(num_beams=2, decoder_start_token_id=0,
                                                 pad_token_id=0, max_length=6),
    }  # fmt: skip
    run = tf.Seq2SeqTrainer(
        made, tf.Seq2SeqTrainingArguments(str(tmp_path), **given), train_dataset=rows(),
        eval_dataset=rows(4), compute_metrics=measure,
    )  # fmt: skip
    before = {k: v.clone() for k, v in made["a"].tensors().items()}
    run.train()
    assert seen
    assert any("eval_width" in line for line in run.state.log_history)
    assert all(not torch.equal(t, before[k]) for k, t in made["a"].tensors().items())
    assert made.generation_config is made.model.generation_config
    assert made.generation_config.num_beams == 2
    assert made.model.encoder.gradient_checkpointing


def test_label_smoothing_shifts_the_labels_of_a_causal_model(tmp_path: Path) -> None:
    """The Trainer knows by the model's class whether its labels are shifted."""
    made = host("llama").eval()
    smooth = {"label_smoothing_factor": 0.1}
    batch = {k: torch.stack([r[k] for r in rows(4)]) for k in ("input_ids", "labels")}
    run, plain = (trainer(m, tmp_path, **smooth) for m in (made, made.merge()))
    found, wanted = (r.compute_loss(r.model, dict(batch)) for r in (run, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Scored(nn.Module):
    """A host in another model, which has a head beside it, as a value model of RL has."""

    def __init__(self, made: mg.Host) -> None:
        super().__init__()
        self.host, self.head = made, nn.Linear(16, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.host(ids, output_hidden_states=True).hidden_states[-1])


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "torch"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_accelerate_saves_and_loads_what_learns(
    name: str, safe: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator, made, folder = Accelerator(cpu=True), host(name), tmp_path / "state"
    optimizer = torch.optim.AdamW(made["a"].parameters(), 1e-2)
    made, optimizer = accelerator.prepare(made, optimizer)
    made(**{k: torch.stack([r[k] for r in rows(4)]) for k in rows(1)[0]}).loss.backward()
    optimizer.step()
    accelerator.save_state(str(folder), safe_serialization=safe)
    assert "shared tensor" not in caplog.text
    frozen = sum(p.nbytes for p in made.model.parameters())
    whole = folder / ("model.safetensors" if safe else "pytorch_model.bin")
    assert whole.stat().st_size < frozen / 2
    before = {k: v.clone() for k, v in made.state_dict().items()}
    with torch.no_grad():
        for p in made["a"].parameters():
            p.zero_()
    accelerator.load_state(str(folder))
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert not accelerator._save_model_state_pre_hook
    assert not accelerator._load_model_state_pre_hook
    made.implant("b", mg.LoRA(rank=2), at="query")
    with pytest.raises(RuntimeError, match=r"implants\.b"):
        accelerator.load_state(str(folder))
    made.remove("b")
    with torch.no_grad():
        next(made.model.parameters()).add_(1.0)
    with pytest.raises(mg.ModgraftError, match="saved in another host"):
        accelerator.load_state(str(folder))


def test_accelerate_saves_a_host_in_another_model_and_one_that_trains(tmp_path: Path) -> None:
    accelerator, inner = Accelerator(cpu=True), host("gpt2")
    inner.model.get_submodule("transformer.ln_f").requires_grad_(True)
    plain, made = nn.Linear(3, 3), Scored(inner)
    plain, made = accelerator.prepare(plain, made)
    accelerator.save_state(str(tmp_path / "state"))
    stored = load_file(tmp_path / "state/model_1.safetensors")
    assert {k for k in stored if "implants" not in k} == {
        "head.weight", "head.bias", "host.host_fingerprint", "host.model.transformer.ln_f.weight",
        "host.model.transformer.ln_f.bias",
    }  # fmt: skip
    before = [p.detach().clone() for p in (*plain.parameters(), *made.parameters())]
    with torch.no_grad():
        for p in (*plain.parameters(), *made.parameters()):
            if p.requires_grad:
                p.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    found = [*plain.parameters(), *made.parameters()]
    assert all(map(torch.equal, found, before))


def test_accelerate_loads_a_state_with_all_weights(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    made = accelerator.prepare(host("gpt2"))
    state = {k: v.clone() for k, v in made.state_dict().items()}
    accelerator.save_state(str(tmp_path))
    tied = "model.lm_head.weight"
    save_file({k: v for k, v in state.items() if k != tied}, tmp_path / "model.safetensors")
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items())


def test_pipelines_take_a_host() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(41)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    made = host("gpt2").eval()
    write = tf.pipeline("text-generation", model=made, tokenizer=tokenizer)
    (found,) = write("w5 w6 w7", max_new_tokens=3, do_sample=False, return_tensors=True)
    ids = made.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert found["generated_token_ids"] == ids[0].tolist()
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, num_labels=3,
    )  # fmt: skip
    judge = mg.Host(tf.BertForSequenceClassification(config)).eval()
    judge.implant("a", mg.LoRA(rank=2), at="query")
    classify = tf.pipeline("text-classification", model=judge, tokenizer=tokenizer, top_k=None)
    (scores,) = classify(["w5"])
    wanted = judge(**tokenizer("w5", return_tensors="pt")).logits.softmax(-1)[0].tolist()
    assert {s["label"]: s["score"] for s in scores} == pytest.approx(
        {f"LABEL_{i}": p for i, p in enumerate(wanted)}
    )


# -- what a host answers for its model ------------------------------------------------------------


def test_a_host_answers_for_its_model() -> None:
    made = host("gpt2")
    assert type(made) is mg.Host
    assert isinstance(made, mg.Host)
    assert isinstance(made, tf.GPT2LMHeadModel)
    assert not isinstance(made, tf.BertForMaskedLM)
    assert (made.device, made.dtype) == (made.model.device, torch.float32)
    assert made.get_input_embeddings() is made.model.get_input_embeddings()
    assert {"fit", "implant", "get_input_embeddings"} <= set(dir(made))
    with pytest.raises(AttributeError, match="neither a host nor its GPT2LMHeadModel has 'implnt'"):
        made.implnt
    with pytest.raises(AttributeError, match=r"host\.model\.push_to_hub\(…\) uploads the bare"):
        made.push_to_hub("me/mine")
    plain = mg.Host(nn.Sequential(nn.Linear(2, 2)))
    assert not hasattr(plain, "device")
    assert len(list(plain.model.children())) == 1
    twin = copy.deepcopy(plain)
    assert type(twin) is mg.Host
    assert type(pickle.loads(pickle.dumps(plain))) is mg.Host
    with pytest.raises(mg.ModgraftError, match="is a Host already"):
        mg.Host(made)


def test_save_pretrained_and_back(tmp_path: Path) -> None:
    made, other = host("gpt2"), host("gpt2", seed=1)
    made.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()
    made.save_pretrained(tmp_path / "a")
    stored = load_file(tmp_path / "a/model.safetensors")
    found = other.load_state_dict(stored, strict=False)
    assert set(found.missing_keys) == set(other._keys_to_ignore_on_save)
    assert not found.unexpected_keys
    assert same(made, other)
