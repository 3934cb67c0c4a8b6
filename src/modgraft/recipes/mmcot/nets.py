"""Train, save, load and test the models of a run of the recipe."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

import modgraft as mg
from modgraft.core.errors import CheckpointError
from modgraft.core.files import read_json, write_json
from modgraft.data.digits import facts
from modgraft.data.records import Questions
from modgraft.data.text import find_form, gold_rationale, rationale_of
from modgraft.recipes.mmcot.data import (
    load_questions,
    load_run_tokenizer,
    load_strips,
    settings_of,
)
from modgraft.recipes.mmcot.metrics import grade_answer
from modgraft.recipes.mmcot.recipe import (
    NETS,
    T5S,
    Row,
    Settings,
    build_host,
    gold_rationales,
    text_t5,
    train,
    write,
    write_rationales,
)
from modgraft.report.run import Prediction
from modgraft.store.fingerprint import differences, fingerprint

GATES = 6
"""The number of questions whose gates the report shows."""
NO_GATES = (
    "Attention is drawn over DigitsQA's strips alone: where the patches of other features lie in "
    "their picture is not known."
)


def train_net(folder: Path, seed: int, key: str) -> None:
    """Train one model; save the T5 with transformers, and each module with modgraft."""
    settings, net, home = settings_of(folder), NETS[key], folder / f"seed{seed}"
    questions = load_questions(folder, seed, features=net.fusion is not None)
    if net.fusion is None:
        questions = questions.without_images()
    tokenizer = load_run_tokenizer(folder, seed)
    torch.manual_seed(seed)
    if net.base is not None:
        t5 = load_net(folder, seed, net.base).model
    else:
        with _reading(settings.model, "give --model a whole T5, or fetch it again"):
            t5 = text_t5(settings, len(tokenizer), seed)
    host = build_host(t5, net, questions.width or 1, settings)  # type: ignore[arg-type]
    trained = sum(p.numel() for p in host.parameters() if p.requires_grad)
    seconds = train(host, net, questions, tokenizer, settings, seed, str(home / key))
    if net.base is None:
        host.model.save_pretrained(home / key / "model")  # type: ignore[operator]
    for name in host.implants:
        host.save(name, home / key / name)
    size = sum(p.numel() for p in host.parameters())
    card = {"modules": list(host.implants), "parameters": size, "trained": trained}
    card["fusion"] = host["fusion"].size if "fusion" in host else 0
    card |= {"seconds": seconds, "host": fingerprint(host.model)}
    write_json(home / key / "net.json", card)
    shutil.rmtree(home / key / "checkpoints", ignore_errors=True)


def load_net(folder: Path, seed: int, key: str) -> mg.Host:
    """Load a trained model, in evaluation mode, on the CPU.

    Raises:
        MissingFileError: It is not trained.
        CheckpointError: Its T5 or its modules are damaged, or belong to another model.
    """
    home = folder / f"seed{seed}"
    card, model = read_card(folder, seed, key), home / (NETS[key].base or key) / "model"
    again = f"delete {home / key} and train again: modgraft mmcot train --run {folder}"
    with _reading(model, again):
        t5 = T5S[settings_of(folder).t5].from_pretrained(model, local_files_only=True)
    if differences(t5, card.get("host") or fingerprint(t5)):
        raise CheckpointError(
            f"{model} holds another T5 than the one that was trained for {home / key}; put that "
            f"one back, or {again}"
        )
    host = mg.Host(t5)
    for name in card["modules"]:
        host.load(home / key / name)
    return host.eval()


@contextmanager
def _reading(model: Path | str | None, remedy: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{model} cannot be read ({why}); {remedy}") from error


def read_card(folder: Path, seed: int, key: str) -> dict[str, Any]:
    """Read ``net.json`` of a trained model: modules, parameters, trained, fusion, seconds, host.

    Raises:
        MissingFileError: It is not trained.
        DataError: It is damaged.
    """
    path = folder / f"seed{seed}" / key / "net.json"
    remedy = f"Train it: modgraft mmcot train --run {folder}, with a row that needs it"
    keys = ("modules", "parameters", "trained", "fusion", "seconds")
    return read_json(path, what=f"the trained net {NETS[key].title!r}", remedy=remedy, keys=keys)


def predict(
    folder: Path, seed: int, row: Row, questions: Questions, settings: Settings
) -> list[Prediction]:
    """Answer these questions with the models of a row, and grade the answers."""
    tokenizer = load_run_tokenizer(folder, seed)
    shown = questions.shuffle_images(seed) if row.shuffled else questions
    answering, gold = NETS[row.answer_net], gold_rationales(questions, settings)
    rationales: dict[str, str] | None = gold if row.rationale_net == "gold" else None
    if row.rationale_net not in (None, "gold"):
        thinking = NETS[row.rationale_net]
        host = _on_device(load_net(folder, seed, thinking.key))
        rationales = write_rationales(host, thinking, shown, tokenizer, settings, row.forced)
    host = _on_device(load_net(folder, seed, answering.key))
    texts = write(host, answering, shown, tokenizer, settings, rationales)
    form = find_form(getattr(settings, answering.form))
    if answering.form == "explain":
        rationales = {qid: rationale_of(text, form) for qid, text in texts.items()}
        gold = {r.id: gold_rationale(r, form) for r in questions}
    return [
        grade_answer(
            record, texts[record.id],
            rationale=None if rationales is None else rationales[record.id],
            gold_rationale=None if rationales is None else gold[record.id],
            facts=facts if settings.data == "digits" else None,
        )
        for record in questions
    ]  # fmt: skip


def _on_device(host: mg.Host) -> mg.Host:
    return host.to("cuda") if torch.cuda.is_available() else host


@torch.no_grad()
def gates(
    folder: Path, seed: int, questions: Questions, settings: Settings,
    predictions: Sequence[Prediction],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return attention and gates of stage 1's fusion for a few questions."""
    if settings.data != "digits":
        return []  # the page says why: NO_GATES
    host, tokenizer = load_net(folder, seed, "stage1"), load_run_tokenizer(folder, seed)
    strips, shown = load_strips(folder, seed), {p.id: p for p in predictions}
    form, made = find_form(settings.rationale), []
    for record in [r for r in questions if r.id in questions.features][:GATES]:
        batch = tokenizer(form.input(record), return_tensors="pt")
        with host.using(None):
            h = host.model.encoder(**batch).last_hidden_state  # type: ignore[operator, union-attr]
        maps = host["fusion"].places[0].maps(h, mg.Side(questions.features[record.id][None]))  # type: ignore[operator]
        made.append(
            {
                "id": record.id,
                "question": record.question,
                "choices": list(record.choices),
                "image": np.round(strips[record.id].numpy(), 4).tolist(),
                "tokens": tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist()),
                "attention": maps.attention[0].tolist(),
                "gate": maps.gate[0].mean(-1).tolist(),
                "rationale": shown[record.id].rationale,
                "text": shown[record.id].text,
                "correct": shown[record.id].correct,
            }
        )
    return made
