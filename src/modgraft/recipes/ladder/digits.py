"""The ladder's task on DigitsQA: a T5 that knows the texts alone is to answer from pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modgraft.computation.gated_fusion import GatedFusion
from modgraft.core.files import whole
from modgraft.data.digits import digits_qa
from modgraft.data.records import Questions
from modgraft.data.text import extract_answer, find_form
from modgraft.data.tokenizer import train_tokenizer
from modgraft.host.host import Host
from modgraft.log.record.runs import part_of_a_run
from modgraft.models.vision import load_vision, save_vision, train_vision
from modgraft.recipes.ladder.tasks import Task
from modgraft.recipes.mmcot.data import look_at
from modgraft.recipes.mmcot.recipe import Net, Settings, batches, build_host, text_t5, train, write


@dataclass(frozen=True)
class Sizes:
    """How much the task has of everything.

    Attributes:
        train, val, test: questions in each split.
        steps_eye: training steps of the vision model.
        steps_host: training steps of the T5 on the texts, before it is frozen.
    """

    train: int = 12_000
    val: int = 480
    test: int = 900
    steps_eye: int = 1500
    steps_host: int = 600

    def smaller(self, share: float) -> Sizes:
        """Scale everything down."""
        return Sizes(*(max(20, round(share * value)) for value in vars(self).values()))


def digitsqa(home: Path, *, sizes: Sizes | None = None, batch: int = 32, seed: int = 0) -> Task:
    """Make the task of DigitsQA: a question about a strip of digits, answered at once (QCM→A).

    The host is a small T5 that has learned the questions without pictures, and is then frozen: it
    knows how answers are written, and guesses. A gated fusion, which lets the pictures in, trains
    with every rung. An answer is decoded freely, and wrong if it names none of the options.

    Args:
        home: keeps the vision model and the T5's training, which goes on where it was, for each
            seed and sizes in a folder of their own.
        sizes: of data and preparation.
        batch: questions in a batch.
        seed: of questions, vision model, T5 and fusion.
    """
    size = sizes or Sizes()
    settings = Settings(
        train=size.train, val=size.val, test=size.test, steps_answer=size.steps_host, batch=batch,
        warmup=min(50, size.steps_host // 10),
    )  # fmt: skip
    qa = digits_qa(size.train, size.val, size.test, seed=seed)
    strips = {qid: torch.from_numpy(strip).contiguous() for qid, strip in qa.strips.items()}
    home = home / "-".join([f"seed{seed}", *map(str, vars(size).values())])
    eye = home / "eye.safetensors"
    if not eye.is_file():
        with whole(eye) as part:
            save_vision(train_vision(seed, steps=size.steps_eye), part)
    features = look_at(strips, load_vision(eye))
    questions = Questions.from_json(qa.problems, splits=qa.splits, features=features)
    form = find_form(settings.direct)
    texts = [text for r in questions.split("train") for text in (form.input(r), form.target(r))]
    tokenizer = train_tokenizer(texts)

    blind, net = Net("text", "Text only", "direct", fusion=None), Net("ladder", "Ladder", "direct")
    t5 = text_t5(settings, len(tokenizer), seed)
    with part_of_a_run():
        train(
            build_host(t5, blind, 0, settings), blind, questions.without_images(), tokenizer,
            settings, seed, str(home / "text"),
        )  # fmt: skip
    host = Host(t5)
    torch.manual_seed(seed)
    fusion = GatedFusion(source="image", dim=questions.width or 1)
    host.implant("fusion", fusion, at="encoder.output", expect=1)

    def right(split: str) -> Callable[[Host], Tensor]:
        part = questions.split(split)

        def evaluate(host: Host) -> Tensor:
            said = write(host, net, part, tokenizer, settings)
            found = [extract_answer(said[r.id], r.choices) == r.answer for r in part]
            return torch.tensor(found, dtype=torch.float64)

        return evaluate

    return Task(
        "DigitsQA, a T5 of texts that is shown pictures",
        host, batches(net, questions, tokenizer, settings), right("val"), right("test"),
        ("fusion",), {"warmup": 0.05, "betas": (0.9, settings.beta2)},
    )  # fmt: skip
