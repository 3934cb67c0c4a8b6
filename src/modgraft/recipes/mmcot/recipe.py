"""Multimodal chain of thought: think about the picture first, then answer.

Zhang et al. 2023, arXiv:2302.00923. There are two T5s of one shape, each with gated fusion after
its encoder. The first writes a rationale from question, context, options and image (QCM→R); the
second answers from the same and the rationale (QCMR→A). Both are trained on gold rationales, so
they can be trained at the same time. At test, the second reads what the first generated freely,
without teacher forcing. Rationales are passed on by question id. An answer that names none of the
question's options counts as wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5ForConditionalGeneration

import modgraft as mg
from modgraft.data.batches import Collate, QADataset, SortedBatches
from modgraft.data.records import Questions
from modgraft.data.text import find_form, gold_rationale, rationale_of
from modgraft.models.copy_init import copy_init
from modgraft.models.pretrained import from_transformers
from modgraft.models.t5 import T5
from modgraft.models.transformers_t5 import small_t5
from modgraft.training.stream import to_device


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        data: ``"digits"`` for DigitsQA, or a folder in ScienceQA's format.
        features: For a folder: a file of features, or a vision model to extract them with.
        model: A pretrained T5 (folder or hub name); None trains a small one from scratch.
        t5: Whose T5 computes: ``"transformers"``, or ``"modgraft"``, :class:`modgraft.models.t5.T5`
            with the same weights.
        rationale, answer, direct, explain: The text forms of stage 1, of stage 2 and of the two
            one-stage controls.
        train, val, test: The number of DigitsQA's questions in each split.
        varied: The share of DigitsQA's training questions with two to eight options, about strips
            of one to four digits.
        split: The split to test; None takes test, or val if there is no test.
        steps_eye: Training steps of DigitsQA's vision model.
        d_model, d_ff, heads, layers: The small T5's shape.
        steps_rationale, steps_answer: Optimiser steps of a model that writes rationales, and of one
            that only answers.
        batch, lr, warmup, weight_decay, beta2: Of AdamW with linear decay.
        max_input, max_rationale, max_answer: The most tokens of each text.
        decode_batch: The number of questions to decode at a time.
        rank: The rank of the modular variant's LoRA.
        published: Whether lecture and solution have their line breaks as the code released with
            the paper writes them; see `load_scienceqa`.
        skip_bad: Whether to list bad records and continue without them.
    """

    data: str = "digits"
    features: str | None = None
    model: str | None = None
    t5: Literal["transformers", "modgraft"] = "transformers"
    rationale: str = "QCM-E"
    answer: str = "QCMG-VA"
    direct: str = "QCM-VA"
    explain: str = "QCM-EVA"
    train: int = 12_000
    val: int = 480
    test: int = 900
    varied: float = 0.25
    split: str | None = None
    steps_eye: int = 1500
    d_model: int = 128
    d_ff: int = 256
    heads: int = 4
    layers: int = 2
    steps_rationale: int = 3000
    steps_answer: int = 600
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.01
    beta2: float = 0.98
    max_input: int = 512
    max_rationale: int = 48
    max_answer: int = 16
    decode_batch: int = 150
    rank: int = 8
    published: bool = False
    skip_bad: bool = False


SCIENCEQA = Settings(
    rationale="QCM-LE", answer="QCMG-A", direct="QCM-A", explain="QCM-LEA",
    steps_rationale=32_000, steps_answer=32_000, batch=8, lr=5e-5, warmup=0, beta2=0.999,
    max_rationale=512, max_answer=64, decode_batch=16,
)  # fmt: skip
"""The published settings for ScienceQA: 20 epochs of 12,726 questions in batches of 8."""


@dataclass(frozen=True)
class Net:
    """A model to train.

    Attributes:
        key: The name of its folder.
        title: Its name in the report.
        form: The setting that names its text form.
        fusion: The form of fusion; None for a text-only model.
        base: For the modular variant: the text-only model that stays frozen under the modules.
    """

    key: str
    title: str
    form: Literal["rationale", "answer", "direct", "explain"]
    fusion: Literal["paper", "released"] | None = "paper"
    base: str | None = None


NETS = {
    net.key: net
    for net in (
        Net("stage1", "Stage 1, fused", "rationale"),
        Net("stage2", "Stage 2, fused", "answer"),
        Net("stage1-text", "Stage 1, text only", "rationale", fusion=None),
        Net("stage2-text", "Stage 2, text only", "answer", fusion=None),
        Net("direct", "One stage, answer", "direct"),
        Net("explain", "One stage, rationale then answer", "explain"),
        Net("stage1-released", "Stage 1, released fusion", "rationale", "released"),
        Net("stage2-released", "Stage 2, released fusion", "answer", "released"),
        Net(
            "stage1-modular", "Stage 1, modules on frozen text T5", "rationale", base="stage1-text"
        ),
        Net("stage2-modular", "Stage 2, modules on frozen text T5", "answer", base="stage2-text"),
    )
}


@dataclass(frozen=True)
class Row:
    """One row of the result table: which models are tested, with which images and rationales.

    Attributes:
        key, title, group, note: For the table.
        answer_net: The model that answers.
        rationale_net: The model that writes the rationales; ``"gold"`` takes the true ones, and
            None is for a model of one stage.
        shuffled: Whether every question gets another question's image.
        forced: Whether rationales are decoded with teacher forcing, as the released code did,
            which leaks the gold rationale.
    """

    key: str
    title: str
    answer_net: str
    rationale_net: str | None
    group: Literal["main", "control", "ablation"] = "control"
    shuffled: bool = False
    forced: bool = False
    note: str = ""

    @property
    def nets(self) -> tuple[str, ...]:
        """The models that the row needs."""
        return tuple(
            n for n in (self.rationale_net, self.answer_net) if n is not None and n != "gold"
        )


ROWS = {
    row.key: row
    for row in (
        Row("fused", "Two stages, fused", "stage2", "stage1", "main"),
        Row("shuffled", "Images shuffled", "stage2", "stage1", shuffled=True,
            note="the same models, each question with another one's image"),
        Row("text", "Text only", "stage2-text", "stage1-text",
            note="two stages trained and tested without images"),
        Row("gold", "Gold rationales", "stage2", "gold",
            note="stage 2 alone: what a perfect stage 1 would give"),
        Row("forced", "Teacher-forced", "stage2", "stage1", forced=True,
            note="rationales decoded along the gold ones: not a result but its leak"),
        Row("forced-text", "Text only, teacher-forced", "stage2-text", "stage1-text",
            forced=True, note="the leak alone lifts a model that sees nothing"),
        Row("direct", "One stage, QCM→A", "direct", None, "ablation"),
        Row("explain", "One stage, QCM→EA", "explain", None, "ablation"),
        Row("released", "Two stages, released fusion", "stage2-released", "stage1-released",
            "ablation", note="the fusion of the released code"),
        Row("modular", "Two stages, modular", "stage2-modular", "stage1-modular", "ablation",
            note="text T5s frozen; only fusion and LoRA trained"),
    )
}  # fmt: skip

DEMO = ("fused", "shuffled", "text", "gold", "forced")


# -- the model ----------------------------------------------------------------------------------

T5S: dict[str, type[PreTrainedModel]] = {
    "transformers": T5ForConditionalGeneration, "modgraft": T5,
}  # fmt: skip
"""Whose T5 → its class."""


def text_t5(settings: Settings, vocabulary: int, seed: int) -> PreTrainedModel:
    """Return the T5 without modules: a pretrained one, or a small new one."""
    if settings.model is not None:
        t5 = T5ForConditionalGeneration.from_pretrained(settings.model)
    else:
        shape = {k: getattr(settings, k) for k in ("d_model", "d_ff", "heads", "layers")}
        t5 = small_t5(vocabulary, **shape, seed=seed)
        # 4 back in the decoder: from before the letter to the value, in "7 . The answer is (B)"
        copy_init(t5, decoder_offsets=(-1, -4), seed=seed)
    return from_transformers(t5) if settings.t5 == "modgraft" else t5


def build_host(t5: PreTrainedModel, net: Net, dim: int, settings: Settings) -> mg.Host:
    """Make the T5 multimodal: implant fusion, and LoRA for the modular variant."""
    host = mg.Host(t5, freeze=net.base is not None)
    if net.fusion is not None:
        fusion = mg.GatedFusion(source="image", dim=dim, form=net.fusion)
        host.implant("fusion", fusion, at="encoder.output", expect=1)
    if net.base is not None:
        attention = ["query", "key", "value", "output"]
        host.implant("lora", mg.LoRA(rank=settings.rank), at=attention)
    return host


# -- training -----------------------------------------------------------------------------------


def train(
    host: mg.Host, net: Net, questions: Questions, tokenizer: PreTrainedTokenizerBase,
    settings: Settings, seed: int, folder: str,
) -> float:  # fmt: skip
    """Train one model on gold rationales; return the seconds it took."""
    steps = steps_of(net, settings)
    held_out = None
    if (questions.splits or {}).get("val"):
        held_out = batches(net, questions, tokenizer, settings, "val")
    history = host.fit(
        batches(net, questions, tokenizer, settings), evaluate=held_out, steps=steps,
        lr=settings.lr,
        warmup=settings.warmup, weight_decay=settings.weight_decay, betas=(0.9, settings.beta2),
        evaluate_every=max(1, steps // 6), seed=seed, folder=folder, progress=False,
        label=net.title,
    )  # fmt: skip
    return history.seconds


def batches(
    net: Net, questions: Questions, tokenizer: PreTrainedTokenizerBase, settings: Settings,
    split: str = "train",
) -> DataLoader:  # fmt: skip
    """Return a model's batches of a split, with gold rationales; those of ``train`` are shuffled,
    and in a batch of about one length."""
    form = find_form(getattr(settings, net.form))
    part = _visible(questions.split(split), net)
    gold = gold_rationales(part, settings) if form.reads_rationale else None
    collate = Collate(tokenizer, form, settings.max_input, width=questions.width)
    dataset = QADataset(part, gold)
    if split != "train":
        return DataLoader(dataset, settings.batch, collate_fn=collate)
    read = dict.fromkeys(part.ids) if gold is None else gold
    lengths = [len(form.input(record, read[record.id])) for record in part]
    order = SortedBatches(lengths, settings.batch)
    return DataLoader(dataset, batch_sampler=order, collate_fn=collate)


def steps_of(net: Net, settings: Settings) -> int:
    """Return the optimiser steps of a model's training."""
    return settings.steps_answer if net.form in ("answer", "direct") else settings.steps_rationale


def gold_rationales(questions: Questions, settings: Settings) -> dict[str, str]:
    """Return id → the true rationale, in the same form that stage 1 learns to write."""
    form = find_form(settings.rationale)
    return {record.id: gold_rationale(record, form) for record in questions}


def _visible(questions: Questions, net: Net) -> Questions:
    return questions if net.fusion is not None else questions.without_images()


# -- decoding -----------------------------------------------------------------------------------


@torch.no_grad()
def write(
    host: mg.Host, net: Net, questions: Questions, tokenizer: PreTrainedTokenizerBase,
    settings: Settings, rationales: Mapping[str, str] | None = None, forced: bool = False,
) -> dict[str, str]:  # fmt: skip
    """Return id → the text that the model writes, decoded greedily.

    With ``forced``, each token is predicted from the gold tokens before it (teacher forcing). That
    measures a leak, and is never a result.
    """
    host.eval()
    form = find_form(getattr(settings, net.form))
    length = settings.max_answer if net.form in ("answer", "direct") else settings.max_rationale
    part = _visible(questions, net)
    dataset = QADataset(part, rationales if form.reads_rationale else None)
    collate = Collate(
        tokenizer, form, settings.max_input, width=questions.width, targets=forced
    )  # fmt: skip
    order = sorted(range(len(part)), key=lambda i: len(form.input(part[i], dataset[i].rationale)))
    written, device = dict[str, str](), next(host.parameters()).device
    for batch in DataLoader(dataset, settings.decode_batch, sampler=order, collate_fn=collate):  # type: ignore[arg-type]
        ids, batch = batch.pop("ids"), to_device(batch, device)
        if net.fusion is None:
            batch.pop("side", None)
        if forced:
            tokens = host(**batch).logits.argmax(-1)
            tokens = tokens.masked_fill(batch["labels"] == -100, tokenizer.pad_token_id)
        else:
            tokens = host.generate(**batch, max_new_tokens=length, do_sample=False, num_beams=1)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        written |= dict(zip(ids, texts, strict=True))
    return {record.id: written[record.id] for record in questions}


def write_rationales(
    host: mg.Host, net: Net, questions: Questions, tokenizer: PreTrainedTokenizerBase,
    settings: Settings, forced: bool = False,
) -> dict[str, str]:  # fmt: skip
    """Return id → the rationale that a stage-1 model writes, as a stage-2 model reads it."""
    form = find_form(settings.rationale)
    texts = write(host, net, questions, tokenizer, settings, forced=forced)
    return {qid: rationale_of(text, form) for qid, text in texts.items()}


@torch.no_grad()
def score(
    host: mg.Host, net: Net, questions: Questions, tokenizer: PreTrainedTokenizerBase,
    settings: Settings, rationales: Mapping[str, str] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Return id → the log-probability of each token of the record's target, float32 [t]."""
    host.eval()
    form, part, found = find_form(getattr(settings, net.form)), _visible(questions, net), {}
    dataset = QADataset(part, rationales if form.reads_rationale else None)
    collate = Collate(tokenizer, form, settings.max_input, width=questions.width)
    device = next(host.parameters()).device
    for batch in DataLoader(dataset, settings.decode_batch, collate_fn=collate):  # type: ignore[arg-type]
        ids, batch = batch.pop("ids"), to_device(batch, device)
        if net.fusion is None:
            batch.pop("side", None)
        logs, labels = host(**batch).logits.log_softmax(-1), batch["labels"]  # [B, t, v], [B, t]
        chosen = logs.gather(2, labels.clamp_min(0)[..., None])[..., 0].cpu()  # [B, t]
        found |= {q: row[to != -100] for q, row, to in zip(ids, chosen, labels.cpu(), strict=True)}
    return found


def nets_of(rows: Iterable[str]) -> list[Net]:
    """Return the models that these rows need, base models first."""
    needed = {key for row in rows for key in ROWS[row].nets}
    needed |= {base for key in needed if (base := NETS[key].base) is not None}
    return [net for key, net in NETS.items() if key in needed]


def smaller(settings: Settings, share: float) -> Settings:
    """Scale steps and questions down to ``share``, for a quick look."""
    names = ("train", "val", "test", "steps_eye", "steps_rationale", "steps_answer", "warmup")
    scaled = {name: max(1, round(share * getattr(settings, name))) for name in names}
    return replace(settings, **scaled)
