"""Prepare and load the data of a run: questions, tokenizer and image features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from modgraft.core.config import mismatch
from modgraft.core.errors import CheckpointError, DataError, ModgraftError
from modgraft.core.files import read_json, whole, write_json
from modgraft.data.batches import Collate
from modgraft.data.digits import digits_qa
from modgraft.data.extract import extract_features
from modgraft.data.extract import load_vision as load_any_vision
from modgraft.data.records import Questions, Skipped, Skips
from modgraft.data.scienceqa import load_scienceqa
from modgraft.data.text import find_form
from modgraft.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from modgraft.models.strips import save_strip
from modgraft.models.vision import DigitPatches, save_vision, train_vision
from modgraft.recipes.mmcot.recipe import T5S, Net, Settings, gold_rationales, nets_of, steps_of

FORMS_READ = ("rationale", "answer", "direct", "explain")
"""The settings that name text forms."""

_MAY_BE_ZERO = ("val", "warmup", "lr", "weight_decay", "beta2")
"""The settings whose numbers need not be at least 1."""


def settings_of(folder: Path) -> Settings:
    """Read the settings of the run in ``folder``.

    Raises:
        MissingFileError: There is no run.
        CheckpointError: Another version of modgraft wrote them.
    """
    remedy = f"Train it first: modgraft mmcot train --run {folder}"
    asked = read_json(folder / "run.json", what="a run's settings", remedy=remedy)
    try:
        # a run of before DigitsQA could be varied is one of its own words alone
        return Settings(**{"varied": 0.0} | asked["settings"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'run.json'}: not this version's settings ({error}); train the run anew "
            f"with --fresh, or with the version that wrote it ({asked.get('modgraft', 'unknown')})"
        ) from error


def check(settings: Settings, rows: Sequence[str]) -> None:
    """Check the data and the settings, before anything is written.

    Raises:
        DataError: The data cannot be read, a split has no questions, or rows need image features
            and there are none.
        UnknownNameError: A text form does not exist.
        ModgraftError: A setting has the wrong type, or a value that means nothing.
    """
    _check_settings(settings, rows)
    if settings.data == "digits":
        if settings.features is not None:
            raise DataError("digits come with an eye of their own", remedy="Leave --features out")
        if settings.published:
            raise DataError("digits have no published form", remedy="Leave published=True out")
        return
    if not Path(settings.data).is_dir():
        remedy = "Give --data digits, or the folder with problems.json and pid_splits.json"
        raise DataError("there is no such folder", file=settings.data, remedy=remedy)
    questions = _load(settings, None)
    if not (questions.splits or {}).get("train"):
        raise DataError("no split is named train, or it is empty", file=_splits_file(settings))
    tested_split(questions, settings)
    seeing = [row for row in rows if any(net.fusion for net in nets_of([row]))]
    if seeing and settings.features is None:
        raise DataError(
            f"there are no image features, which these rows need: {', '.join(seeing)}",
            file=settings.data,
            remedy="Pass --features FILE (.npy or .safetensors) or a vision model to make them, or "
            "take --rows text",
        )
    if seeing and not any(r.image for r in questions.split("train")):
        reason = f"no question for training has an image, which these rows need: {seeing}"
        raise DataError(reason, file=settings.data, remedy="Take --rows text")
    if is_file(settings.features) and not Path(str(settings.features)).is_file():
        remedy = "Correct --features"
        raise DataError("there is no such file of features", file=settings.features, remedy=remedy)


def _check_settings(settings: Settings, rows: Sequence[str]) -> None:
    """Check each setting's type and value."""
    s = settings
    found = mismatch(vars(s), get_type_hints(Settings))
    if found is not None:
        raise ModgraftError(f"{found[0]}: {found[1]}")
    for name in FORMS_READ:
        find_form(getattr(s, name))
    counts = [k for k, v in vars(s).items() if type(v) is int and k not in _MAY_BE_ZERO]
    checks = {name: (getattr(s, name) >= 1, "at least 1") for name in counts} | {
        "val": (s.val >= 0, "0 or more"),
        "lr": (s.lr > 0, "positive"),
        "weight_decay": (s.weight_decay >= 0, "0 or more"),
        "beta2": (0 <= s.beta2 < 1, "from 0 to below 1"),
        "varied": (0 <= s.varied <= 1, "from 0 to 1"),
        "t5": (s.t5 in T5S, " or ".join(T5S)),
    }
    steps = min((steps_of(net, s) for net in nets_of(rows)), default=s.steps_answer)
    checks["warmup"] = (0 <= s.warmup < steps, f"from 0 to below the {steps} steps of a training")
    if s.model is None:  # the small T5; copy_init gives its first two heads to neighbours
        checks["heads"] = (
            s.heads >= 2 and s.d_model % s.heads == 0,
            f"2 or more, and a divisor of d_model={s.d_model}",
        )
    for name, (good, wanted) in checks.items():
        if not good:
            raise ModgraftError(f"{name}={getattr(s, name)!r}: it must be {wanted}")


def is_file(features: str | None) -> bool:
    """Return whether the setting names a file of features, and not a vision model."""
    return features is not None and Path(features).suffix in (".npy", ".safetensors")


def needs_features(settings: Settings, nets: Iterable[Net]) -> bool:
    """Return whether the training of these models must wait for the image features.

    Text-only models of DigitsQA need not wait. With other data they do: images may be bad, and
    that should come out before hours of training.
    """
    if settings.data == "digits":
        return any(net.fusion for net in nets)
    return settings.features is not None


def tested_split(questions: Questions, settings: Settings) -> str:
    """Return the split to test: that of the settings, or else test, or else val.

    Raises:
        DataError: There is no such split, or it has no questions.
    """
    splits = questions.splits or {}
    named = (settings.split,) if settings.split else ("test", "val")
    found = next((name for name in named if splits.get(name)), None)
    if found is None:
        has = ", ".join(f"{name} ({len(ids)})" for name, ids in splits.items())
        raise DataError(
            f"no question is in a split {' or '.join(named)}",
            file=_splits_file(settings), remedy=f"Choose with --split; there are: {has}",
        )  # fmt: skip
    return found


def notes(questions: Questions, settings: Settings) -> list[str]:
    """Return sentences about the data that a reader of the results should know."""
    said, splits = [], questions.splits or {}
    tested = tested_split(questions, settings)
    if settings.split is None and tested != "test":
        said.append(f"There is no test split: the results are those of the split {tested}.")
    if tested == "val":
        said.append(
            "Losses during training were measured on the questions of the results; nothing was "
            "chosen by them."
        )
    if not splits.get("val"):
        said.append("There is no val split: no loss was measured beside training.")
    if settings.data != "digits" and not (Path(settings.data) / "captions.json").is_file():
        said.append("There is no captions.json: the questions go without captions.")
    return said


def _splits_file(settings: Settings) -> Path:
    return Path(settings.data) / "pid_splits.json"


# -- jobs ---------------------------------------------------------------------------------------


def text_done_file(folder: Path, seed: int, settings: Settings) -> Path:
    """Return the file that `prepare_text` writes last."""
    name = "tokenizer.json" if settings.model is None else "tokenizer"
    return folder / f"seed{seed}" / "data" / name


def prepare_text(folder: Path, seed: int) -> None:
    """Write questions in ScienceQA's format and a tokenizer into ``seed<k>/data``."""
    settings, data = settings_of(folder), folder / f"seed{seed}" / "data"
    if settings.data == "digits":
        qa = digits_qa(
            settings.train, settings.val, settings.test, seed=seed, varied=settings.varied
        )
        write_json(data / "problems.json", qa.problems)
        write_json(data / "pid_splits.json", qa.splits)
        strips = {qid: torch.from_numpy(s).contiguous() for qid, s in qa.strips.items()}
        save_file(strips, data / "strips.safetensors")
    questions = load_questions(folder, seed, features=False)
    part = data / "tokenizer.part"
    part.mkdir(parents=True, exist_ok=True)
    if settings.model is not None:
        tokenizer = _pretrained_tokenizer(settings.model)
        _write_skipped(data, _without_long(questions, tokenizer, settings))
        tokenizer.save_pretrained(part)
        part.replace(data / "tokenizer")
        return
    tokenizer = train_tokenizer(_texts(questions.split("train"), settings))
    _write_skipped(data, _without_long(questions, tokenizer, settings))
    save_tokenizer(tokenizer, part).replace(data / "tokenizer.json")
    part.rmdir()


def _without_long(
    questions: Questions, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Questions:
    """Leave out the questions whose options alone are too long, or raise the first one's error."""
    skips = Skips(settings.skip_bad)
    for name in FORMS_READ:
        left = [record for record in questions if record.id not in skips.ids]
        Collate(tokenizer, getattr(settings, name), settings.max_input).check(left, skips)
    return questions.without(skips)


def _pretrained_tokenizer(model: str) -> PreTrainedTokenizerBase:
    local = Path(model).is_dir()
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=local)
    except (OSError, ValueError, ImportError) as error:
        remedy = "Give --model a folder made by save_pretrained (T5 and tokenizer), or a Hub name"
        reason = f"no T5 with a tokenizer there ({str(error).strip().splitlines()[0]})"
        raise DataError(reason, file=model, remedy=remedy) from error
    if config.model_type != "t5":
        remedy = "Give --model a T5, such as t5-base or google/flan-t5-base"
        raise DataError(f"the model is a {config.model_type}, not a T5", file=model, remedy=remedy)
    if len(tokenizer) > config.vocab_size:
        reason = f"its tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}"
        raise DataError(reason, file=model, remedy="Give the model its own tokenizer")
    return tokenizer


def _texts(questions: Questions, settings: Settings) -> list[str]:
    forms = [find_form(getattr(settings, name)) for name in FORMS_READ]
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


def images_done_file(folder: Path, seed: int, settings: Settings) -> Path:
    """Return the file that `prepare_images` writes last."""
    name = "features.safetensors" if settings.data == "digits" else "images.json"
    return folder / f"seed{seed}" / "data" / name


def prepare_images(folder: Path, seed: int) -> None:
    """Make the image features: DigitsQA's in ``seed<k>/data``, others in the run's folder."""
    settings = settings_of(folder)
    if settings.data == "digits":
        _prepare_digit_images(folder, seed, settings)
        return
    if settings.features is None:  # a text-only run
        return
    if is_file(settings.features):
        questions = load_questions(folder, seed)
    else:
        model, processor = load_any_vision(settings.features)
        cache = folder / "features.safetensors"
        questions = load_questions(folder, seed, features=False)
        questions = extract_features(
            questions, model, processor, cache=cache, skip_bad=settings.skip_bad
        )
    _write_skipped(folder / f"seed{seed}" / "data", questions)
    seen = {"images": len(questions.features), "width": questions.width}
    write_json(images_done_file(folder, seed, settings), seen)


def _prepare_digit_images(folder: Path, seed: int, settings: Settings) -> None:
    data = folder / f"seed{seed}" / "data"
    eye = train_vision(seed, steps=settings.steps_eye)
    save_vision(eye, data / "vision.safetensors")
    strips = load_strips(folder, seed)
    questions = load_questions(folder, seed, features=False)
    for record in questions.split(tested_split(questions, settings)):
        if record.id in strips:
            image = questions.image_path(record)
            image.parent.mkdir(parents=True, exist_ok=True)
            save_strip(strips[record.id], image)
    # The features come last: they mark the job as done.
    with whole(data / "features.safetensors") as part:
        save_file(look_at(strips, eye), part)


def look_at(strips: Mapping[str, Tensor], eye: DigitPatches) -> dict[str, Tensor]:
    """Return id → the features of its strip, float32 [4n, 80], looked at by width."""
    seen = dict[str, Tensor]()
    for width in {strip.shape[1] for strip in strips.values()}:
        ids = [qid for qid, strip in strips.items() if strip.shape[1] == width]
        seen |= zip(ids, eye.features(torch.stack([strips[qid] for qid in ids])), strict=True)
    return {qid: seen[qid].contiguous() for qid in strips}


def _write_skipped(data: Path, questions: Questions) -> None:
    if questions.skipped:
        write_json(data / "skipped.json", {"skipped": [asdict(s) for s in questions.skipped]})


# -- reading the data --------------------------------------------------------------------------


def load_questions(folder: Path, seed: int, *, features: bool = True) -> Questions:
    """Load the questions of a run, with their image features unless ``features`` is False.

    Under ``skip_bad``, what the preparation left out stays out, so that all models and rows share
    the same questions.
    """
    settings, data = settings_of(folder), folder / f"seed{seed}" / "data"
    if settings.data == "digits":
        file = data / "features.safetensors" if features else None
        questions = load_scienceqa(data, captions=False, features=file)
    elif features and settings.features is not None:
        given = is_file(settings.features)
        file = Path(settings.features) if given else folder / "features.safetensors"
        questions = _load(settings, file)
    else:
        questions = _load(settings, None)
    skips = Skips(settings.skip_bad)
    if settings.skip_bad:
        known = {entry.id for entry in questions.skipped}
        before = [Skipped(**entry) for entry in load_skipped(folder, seed)]
        skips.entries = [entry for entry in before if entry.id not in known]
    return questions.without(skips)


def _load(settings: Settings, features: Path | None) -> Questions:
    source = Path(settings.data)
    captions = (source / "captions.json").is_file()
    return load_scienceqa(
        source, captions=captions, features=features, published=settings.published,
        skip_bad=settings.skip_bad,
    )  # fmt: skip


def load_skipped(folder: Path, seed: int) -> list[dict[str, str]]:
    """Read which questions were left out under ``skip_bad``: id, file, reason."""
    path = folder / f"seed{seed}" / "data" / "skipped.json"
    if not path.is_file():
        return []
    return read_json(path, what="skipped questions", remedy="Train with --fresh")["skipped"]


def load_strips(folder: Path, seed: int) -> dict[str, Tensor]:
    """Load DigitsQA's images: id → float32 [8, 8 a digit] in 0..1."""
    return load_file(folder / f"seed{seed}" / "data" / "strips.safetensors")


def load_run_tokenizer(folder: Path, seed: int) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a run."""
    data = folder / f"seed{seed}" / "data"
    if (data / "tokenizer").is_dir():
        return AutoTokenizer.from_pretrained(data / "tokenizer", local_files_only=True)
    return load_tokenizer(data)
