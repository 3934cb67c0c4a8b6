"""Ask a trained run of the recipe one question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modgraft.core.errors import DataError
from modgraft.core.files import read_json
from modgraft.data.extract import encode_images
from modgraft.data.extract import load_vision as load_any_vision
from modgraft.data.picture import open_picture
from modgraft.data.records import LETTERS, Questions, Record
from modgraft.data.text import FORMS, extract_answer, rationale_of
from modgraft.models.vision import load_vision, read_strip
from modgraft.recipes.mmcot.data import is_file, load_run_tokenizer, settings_of
from modgraft.recipes.mmcot.nets import load_net, read_card
from modgraft.recipes.mmcot.recipe import NETS, Net, Settings, write


def ask(
    folder: Path, image: Path | None, question: str, choices: Sequence[str], hint: str = "",
    seed: int | None = None,
) -> tuple[str, str, int | None]:  # fmt: skip
    """Ask a trained run one question.

    Args:
        folder: The run's folder.
        image: An image file; None asks without fusion, that is, the T5 alone.
        question: The question.
        choices: The options, two or more.
        hint: Text context.
        seed: One of the run's seeds; None takes the first.

    Returns:
        The rationale, the answer as written, and the index of the option that it names, if any.

    Raises:
        DataError: The question is empty, there are too few or too many options, the image cannot
            be read, or the run has no such seed.
        MissingFileError: The run or its fused models do not exist.
    """
    if not question.strip() or not 2 <= len(choices) <= len(LETTERS):
        raise DataError(
            f"a question needs words and 2 to {len(LETTERS)} options; here are {len(choices)}",
            remedy='For example: modgraft mmcot ask strip.png "What is the left digit?" 3 5 8',
        )
    settings, seed = settings_of(folder), _seed(folder, seed)
    for key in ("stage1", "stage2"):
        read_card(folder, seed, key)
    blank = dict.fromkeys(
        ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), ""
    )
    record = Record(
        id="asked", question=question, choices=tuple(choices), answer=0, hint=hint,
        image=image.name if image else None, split="test", **blank,
    )  # fmt: skip
    features = {} if image is None else {"asked": _image_features(folder, seed, image, settings)}
    questions = Questions((record,), features)
    tokenizer = load_run_tokenizer(folder, seed)
    rationales = _write_one(folder, seed, "stage1", questions, tokenizer, settings, None)
    told = rationale_of(rationales["asked"], FORMS[settings.rationale])
    answers = _write_one(folder, seed, "stage2", questions, tokenizer, settings, {"asked": told})
    return told, answers["asked"], extract_answer(answers["asked"], record.choices)


def _seed(folder: Path, seed: int | None) -> int:
    seeds = read_json(folder / "run.json", what="a run", remedy="modgraft mmcot train")["seeds"]
    if seed is not None and seed not in seeds:
        remedy = f"Take one of {', '.join(map(str, seeds))}"
        raise DataError(f"the run has no seed {seed}", file=folder, remedy=remedy)
    return seeds[0] if seed is None else seed


def _write_one(
    folder: Path, seed: int, key: str, questions: Questions, tokenizer: PreTrainedTokenizerBase,
    settings: Settings, rationales: dict[str, str] | None,
) -> dict[str, str]:  # fmt: skip
    host, net = load_net(folder, seed, key), NETS[key]
    if not questions.features:  # without an image, the modules stay inactive
        host.use(None)
        net = Net(net.key, net.title, net.form, fusion=None)
    return write(host, net, questions, tokenizer, settings, rationales)


def _image_features(folder: Path, seed: int, image: Path, settings: Settings) -> Tensor:
    """Return the features of an image file, float32 [m, d]."""
    if settings.data == "digits":
        eye = load_vision(folder / f"seed{seed}" / "data" / "vision.safetensors")
        return eye.features(read_strip(image)[None])[0]
    picture = open_picture(image)
    if settings.features is None or is_file(settings.features):
        raise DataError(
            "this run's features came from a file, so a new image cannot be looked at", file=image,
            remedy="Train with --features VISION_MODEL, the folder or hub name of one",
        )  # fmt: skip
    model, processor = load_any_vision(settings.features)
    return encode_images([picture], model, processor)[0]
