"""Runs of the recipe: data, nets and rows as jobs on disk, resumable, reported.

A run folder holds ``run.json`` (what was asked for), ``results.json``, the report, and for each
seed ``data/`` in ScienceQA's own layout, one folder a net, and one folder of predictions a row.
Whatever the data was, everything after it was prepared reads the same files.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5ForConditionalGeneration

import modgraft as mg
from modgraft.data.digits import digits_qa
from modgraft.data.extract import encode_images, extract_features, open_image
from modgraft.data.extract import load_vision as load_any_vision
from modgraft.data.rationale import facts
from modgraft.data.records import Questions, Record
from modgraft.data.scienceqa import load_scienceqa
from modgraft.data.text import FORMS, find_form, rationale_of
from modgraft.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from modgraft.errors import CheckpointError, DataError, MissingFileError
from modgraft.files import read_json, write_json
from modgraft.metrics import Prediction, evaluate_predictions, write_predictions
from modgraft.models.vision import (
    load_vision,
    read_strip,
    save_strip,
    save_vision,
    train_vision,
)
from modgraft.recipes.mmcot import (
    NETS,
    ROWS,
    Net,
    Row,
    Settings,
    gold_rationales,
    nets_of,
    rationales_written,
    surgery,
    text_t5,
    train,
    write,
)
from modgraft.recipes.workers import Job, side_by_side
from modgraft.report.page import write as write_report

GATES = 6
"""How many questions the report looks into."""


def run(
    folder: Path,
    settings: Settings,
    rows: Sequence[str],
    seeds: Sequence[int],
    *,
    jobs: int = 2,
    evaluate_only: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train what is not trained yet, evaluate every row, write ``results.json`` and the report.

    The same command goes on where an interrupted one stopped. More rows or seeds may be added to a
    run; other settings are refused.

    Returns:
        The results, as in ``results.json``.

    Raises:
        CheckpointError: the folder holds a run of other settings.
        ModgraftError: a job failed; what is done is kept.
    """
    for row in rows:
        if row not in ROWS:
            raise DataError(f"no row {row!r}", remedy=f"Rows: {', '.join(ROWS)}")
    began = time.monotonic()
    asked = _note(folder, settings, rows, seeds)
    todo = [job for seed in seeds for job in _jobs(folder, settings, rows, seed, evaluate_only)]
    side_by_side(todo, jobs, console)
    results = _gather(folder, asked, settings, time.monotonic() - began)
    write_json(folder / "results.json", results)
    write_report(folder)
    return results


def _note(
    folder: Path, settings: Settings, rows: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Write ``run.json``: what this folder was asked for, all commands together."""
    path, asked = folder / "run.json", {"rows": list(rows), "seeds": list(seeds)}
    if path.is_file():
        before = read_json(path, what="the run's settings", remedy="Take another folder with --run")
        now = asdict(settings)
        other = [k for k, v in now.items() if before["settings"].get(k) != v]
        if other:
            differs = ", ".join(f"{k} {before['settings'].get(k)!r}, now {now[k]!r}" for k in other)
            raise CheckpointError(
                f"{folder} holds a run of other settings ({differs}); take another folder with "
                f"--run NAME, or delete this one with --fresh"
            )
        asked["rows"] = [r for r in ROWS if r in {*before["rows"], *rows}]
        asked["seeds"] = sorted({*before["seeds"], *seeds})
    write_json(path, {"settings": asdict(settings), **asked, "modgraft": mg.__version__})
    return asked


def settings_of(folder: Path) -> Settings:
    """The settings of the run in ``folder``.

    Raises:
        MissingFileError: there is none.
    """
    remedy = f"Train it first: modgraft mmcot train --run {folder}"
    return Settings(
        **read_json(folder / "run.json", what="a run's settings", remedy=remedy)["settings"]
    )


def _jobs(
    folder: Path, settings: Settings, rows: Sequence[str], seed: int, evaluate_only: bool
) -> list[Job]:
    home, tag = folder / f"seed{seed}", f"seed {seed}: "
    made = [
        Job(f"{seed}/text", f"{tag}questions", prepare_text, (folder, seed), home / "data"),
        Job(
            f"{seed}/eye", f"{tag}image features", prepare_images, (folder, seed), home / "eye",
            after=(f"{seed}/text",),
        ),
    ]  # fmt: skip
    nets = nets_of(rows)
    for net in nets:
        answers = net.reads in ("answer", "direct")
        ready = [f"{seed}/eye" if net.fusion else f"{seed}/text"]
        ready += [f"{seed}/{net.base}"] if net.base else []
        made.append(
            Job(
                f"{seed}/{net.key}", f"{tag}{net.title}", train_net, (folder, seed, net.key),
                home / net.key, settings.steps_answer if answers else settings.steps_rationale,
                tuple(ready),
            )
        )  # fmt: skip
    if evaluate_only:
        for net in nets:
            if not (home / net.key / "net.json").is_file():
                raise MissingFileError(
                    "the net is not trained", file=home / net.key, remedy="modgraft mmcot train"
                )
        made = []
    for row in rows:
        after = () if evaluate_only else tuple(f"{seed}/{n}" for n in ROWS[row].nets)
        title = f"{tag}test, {ROWS[row].title}"
        work = (folder, seed, row, evaluate_only)
        made.append(Job(f"{seed}/row/{row}", title, evaluate_row, work, home / row, after=after))
    return made


# -- the jobs -----------------------------------------------------------------------------------


def prepare_text(folder: Path, seed: int) -> None:
    """Questions in ScienceQA's format and a tokenizer, into ``seed<k>/data``."""
    settings, data = settings_of(folder), folder / f"seed{seed}" / "data"
    if (data / "tokenizer.json").is_file() or (data / "tokenizer").is_dir():
        return
    if settings.data == "digits":
        qa = digits_qa(settings.train, settings.val, settings.test, seed=seed)
        write_json(data / "problems.json", qa.problems)
        write_json(data / "pid_splits.json", qa.splits)
        whole = {qid: torch.from_numpy(s).contiguous() for qid, s in qa.strips.items()}
        save_file(whole, data / "strips.safetensors")
    questions = load_questions(folder, seed, features=False)
    if settings.model is not None:
        AutoTokenizer.from_pretrained(settings.model).save_pretrained(data / "tokenizer")
        return
    save_tokenizer(train_tokenizer(_texts(questions.split("train"), settings)), data)


def _texts(questions: Questions, settings: Settings) -> list[str]:
    forms = [find_form(getattr(settings, n)) for n in ("rationale", "answer", "direct", "explain")]
    gold = gold_rationales(questions, settings)
    return [
        text
        for record in questions
        for form in forms
        for text in (
            form.input(record, gold[record.id] if form.reads_rationale else None),
            form.target(record),
        )
    ]


def prepare_images(folder: Path, seed: int) -> None:
    """Image features of every question, into ``seed<k>/data/features.safetensors``."""
    settings, data = settings_of(folder), folder / f"seed{seed}" / "data"
    path = data / "features.safetensors"
    if settings.features is not None and Path(settings.features).is_file():
        return
    if settings.data == "digits" and path.is_file():
        return  # other data's features lie in a cache that knows itself how far it is
    questions = load_questions(folder, seed, features=False)
    if settings.data == "digits":
        eye = train_vision(seed)
        save_vision(eye, data / "vision.safetensors")
        strips = _strips(data)
        ids = list(strips)
        features = eye.features(torch.stack([strips[i] for i in ids]))
        for record in questions.split("test"):
            if record.id in strips:
                image = data / "images" / "test" / record.id / "image.png"
                image.parent.mkdir(parents=True, exist_ok=True)
                save_strip(strips[record.id], image)
        # rows before the array that the reader waits for: a killed job leaves no half of a pair
        write_json(path.with_suffix(".json"), {qid: i for i, qid in enumerate(ids)})
        part = path.with_suffix(".part")
        save_file({"features": features}, part)
        part.replace(path)
    elif settings.features is None:
        raise DataError(
            "there are no image features", file=settings.data,
            remedy="Pass --features FILE (.npy or .safetensors), or a vision model to make them",
        )  # fmt: skip
    else:
        model, processor = load_any_vision(settings.features)
        extract_features(questions, model, processor, cache=path)


def _strips(data: Path) -> dict[str, Tensor]:
    return load_file(data / "strips.safetensors")


def load_questions(folder: Path, seed: int, *, features: bool = True) -> Questions:
    """The questions of a run, with their image features."""
    settings, data = settings_of(folder), folder / f"seed{seed}" / "data"
    digits = settings.data == "digits"
    given = Path(settings.features) if settings.features else None
    found = given if given is not None and given.is_file() else data / "features.safetensors"
    source = data if digits else Path(settings.data)
    captions = not digits and (source / "captions.json").is_file()
    return load_scienceqa(
        source, captions=captions, features=found if features else None, skip_bad=settings.skip_bad
    )


def load_run_tokenizer(folder: Path, seed: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a run."""
    data = folder / f"seed{seed}" / "data"
    if (data / "tokenizer").is_dir():
        return AutoTokenizer.from_pretrained(data / "tokenizer")
    return load_tokenizer(data)


def train_net(folder: Path, seed: int, key: str) -> None:
    """Train one net and save it: the T5 as transformers does, each module as modgraft does."""
    settings, net, home = settings_of(folder), NETS[key], folder / f"seed{seed}"
    if (home / key / "net.json").is_file():
        return
    questions = load_questions(folder, seed, features=net.fusion is not None)
    tokenizer = load_run_tokenizer(folder, seed)
    torch.manual_seed(seed)
    if net.base is not None:
        t5 = load_net(folder, seed, net.base).model
    else:
        t5 = text_t5(settings, len(tokenizer), seed)
    host = surgery(t5, net, questions.width or 1, settings)  # type: ignore[arg-type]
    trained = sum(p.numel() for p in host.parameters() if p.requires_grad)
    seconds = train(host, net, questions, tokenizer, settings, seed, str(home / key))
    if net.base is None:
        host.model.save_pretrained(home / key / "model")  # type: ignore[operator]
    for name in host.implants:
        host.save(name, home / key / name)
    shutil.rmtree(home / key / "checkpoints", ignore_errors=True)
    size = sum(p.numel() for p in host.parameters())
    card = {"modules": list(host.implants), "parameters": size, "trained": trained}
    write_json(home / key / "net.json", {**card, "seconds": seconds})


def load_net(folder: Path, seed: int, key: str) -> mg.Host:
    """A trained net, in evaluation mode.

    Raises:
        MissingFileError: it is not trained.
        CheckpointError: its modules belong to another model.
    """
    home = folder / f"seed{seed}"
    card = _card(folder, seed, key)
    model = home / (NETS[key].base or key) / "model"
    host = mg.Host(T5ForConditionalGeneration.from_pretrained(model, local_files_only=True))
    for name in card["modules"]:
        host.load(home / key / name)
    return host.eval()


def _card(folder: Path, seed: int, key: str) -> dict[str, Any]:
    path = folder / f"seed{seed}" / key / "net.json"
    return read_json(path, what="a trained net", remedy="Train it: modgraft mmcot train")


def evaluate_row(folder: Path, seed: int, key: str, again: bool = False) -> None:
    """Test one row; predictions and figures go into its folder."""
    settings, row, home = settings_of(folder), ROWS[key], folder / f"seed{seed}"
    if (home / key / "figures.json").is_file() and not again:
        return
    questions = load_questions(folder, seed).split("test")
    predictions = predict(folder, seed, row, questions, settings)
    reader = facts if settings.data == "digits" else None
    cards = [_card(folder, seed, n) for n in dict.fromkeys(row.nets)]
    figures = evaluate_predictions(
        predictions, questions, facts=reader,
        parameters=sum(c["parameters"] for c in cards), trained=sum(c["trained"] for c in cards),
        seconds=sum(c["seconds"] for c in cards),
    )  # fmt: skip
    write_predictions(home / key / "predictions.jsonl", predictions)
    if key == "fused":
        write_json(home / "gates.json", _gates(folder, seed, questions, settings, predictions))
    write_json(home / key / "figures.json", figures)


def predict(
    folder: Path, seed: int, row: Row, questions: Questions, settings: Settings
) -> list[Prediction]:
    """What the row's nets make of these questions."""
    tokenizer = load_run_tokenizer(folder, seed)
    shown = questions.shuffle_images(seed) if row.shuffled else questions
    answering, gold = NETS[row.answers], gold_rationales(questions, settings)
    thoughts: dict[str, str] | None = gold if row.thinks == "gold" else None
    if row.thinks not in (None, "gold"):
        thinking = NETS[row.thinks]
        host = load_net(folder, seed, thinking.key)
        thoughts = rationales_written(host, thinking, shown, tokenizer, settings, row.forced)
    host = load_net(folder, seed, answering.key)
    texts = write(host, answering, shown, tokenizer, settings, thoughts)
    form = find_form(getattr(settings, answering.reads))
    if answering.reads == "explain":
        thoughts = {qid: rationale_of(text, form) for qid, text in texts.items()}
        gold = {r.id: rationale_of(form.target(r), form) for r in questions}
    return [
        Prediction.of(
            record, texts[record.id],
            rationale=None if thoughts is None else thoughts[record.id],
            gold_rationale=None if thoughts is None else gold[record.id],
            facts=facts if settings.data == "digits" else None,
        )
        for record in questions
    ]  # fmt: skip


@torch.no_grad()
def _gates(
    folder: Path, seed: int, questions: Questions, settings: Settings,
    predictions: Sequence[Prediction],
) -> list[dict[str, Any]]:  # fmt: skip
    """What stage 1's fusion looked at, for a few questions, the families in turn."""
    if settings.data != "digits":
        return []  # a real image is no small grid of greys; its page comes with its own figure
    host, tokenizer = load_net(folder, seed, "stage1"), load_run_tokenizer(folder, seed)
    strips, made, shown = (
        _strips(folder / f"seed{seed}" / "data"),
        [],
        {p.id: p for p in predictions},
    )
    form = find_form(settings.rationale)
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


def _gather(
    folder: Path, asked: dict[str, Any], settings: Settings, seconds: float
) -> dict[str, Any]:
    rows, images = [], {}
    for key in asked["rows"]:
        row = ROWS[key]
        found = {}
        for seed in asked["seeds"]:
            path = folder / f"seed{seed}" / key / "figures.json"
            if path.is_file():
                found[str(seed)] = json.loads(path.read_text(encoding="utf-8"))
        about = {"key": key, "title": row.title, "group": row.group, "note": row.note}
        rows.append({**about, "leak": row.forced, "seeds": found})
    if settings.data == "digits":
        for seed in asked["seeds"]:
            strips = _strips(folder / f"seed{seed}" / "data")
            tests = {k: v for k, v in strips.items() if k.startswith("test")}
            images |= {k: np.round(v.numpy(), 3).tolist() for k, v in tests.items()}
    write_json(folder / "images.json", images)
    return {
        "name": folder.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "seeds": asked["seeds"],
        "wall_seconds": round(seconds, 1),
        "rows": rows,
    }


# -- one question -------------------------------------------------------------------------------


def ask(
    folder: Path, image: Path | None, question: str, choices: Sequence[str], hint: str = "",
    seed: int | None = None,
) -> tuple[str, str, int | None]:  # fmt: skip
    """Ask a trained run one question.

    Args:
        folder: the run.
        image: an image file; None asks without one.
        question: the question.
        choices: at least two options.
        hint: text context.
        seed: which of the run's seeds; None: the first.

    Returns:
        The rationale, the answer as written, and the index of the option it names, if any.
    """
    settings = settings_of(folder)
    if seed is None:
        card = read_json(folder / "run.json", what="a run", remedy="modgraft mmcot train")
        seed = int(card["seeds"][0])
    blank = dict.fromkeys(
        ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), ""
    )
    record = Record(
        id="asked", question=question, choices=tuple(choices), answer=0, hint=hint,
        image=image.name if image else None, split="test", **blank,
    )  # fmt: skip
    features = {} if image is None else {"asked": _look(folder, seed, image, settings)}
    questions = Questions((record,), features)
    tokenizer, told = load_run_tokenizer(folder, seed), ""
    thoughts = _told(folder, seed, "stage1", questions, tokenizer, settings, None)
    told = rationale_of(thoughts["asked"], FORMS[settings.rationale])
    answers = _told(folder, seed, "stage2", questions, tokenizer, settings, {"asked": told})
    made = Prediction.of(record, answers["asked"])
    return told, answers["asked"], made.choice


def _told(
    folder: Path, seed: int, key: str, questions: Questions, tokenizer: PreTrainedTokenizerBase,
    settings: Settings, rationales: dict[str, str] | None,
) -> dict[str, str]:  # fmt: skip
    host, net = load_net(folder, seed, key), NETS[key]
    if not questions.features:  # nothing to see: exactly the text model
        host.use(None)
        net = Net(net.key, net.title, net.reads, fusion=None)
    return write(host, net, questions, tokenizer, settings, rationales)


def _look(folder: Path, seed: int, image: Path, settings: Settings) -> Tensor:
    if settings.data == "digits":
        eye = load_vision(folder / f"seed{seed}" / "data" / "vision.safetensors")
        return eye.features(read_strip(image)[None])[0]
    if settings.features is None or Path(settings.features).is_file():
        raise DataError(
            "this run's features came from a file, so a new image cannot be looked at", file=image,
            remedy="Train with --features VISION_MODEL, the folder or hub name of one",
        )  # fmt: skip
    model, processor = load_any_vision(settings.features)
    return encode_images([open_image(image)], model, processor)[0]
