"""How deep a run on DigitsQA can be asked: what it was trained on, and how sure it is when right.

The thresholds are measured on the run's validation split, and on questions about the same scans in
wordings that neither training nor the judge (`benchmarks/ask.py`) has.
`modgraft mmcot ask` flags what lies beyond.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import modgraft as mg
from modgraft.core.errors import CheckpointError
from modgraft.core.files import read_json, write_json
from modgraft.data.digit_questions import restated
from modgraft.data.digits import CUT, POSITIONS, digits_qa, scans
from modgraft.data.records import Questions, Record
from modgraft.data.text import extract_answer
from modgraft.models.strips import Reader
from modgraft.models.vision import DigitPatches, load_vision
from modgraft.recipes.mmcot.contradictions import contradictions
from modgraft.recipes.mmcot.data import (
    load_questions,
    load_run_tokenizer,
    look_at,
    settings_of,
)
from modgraft.recipes.mmcot.nets import load_net
from modgraft.recipes.mmcot.recipe import NETS, Settings, score, write, write_rationales

WORDS = re.compile(r"\w+|[^\w\s]")
"""The words and signs of a text."""

DOUBTFUL = 0.005
"""The share of the validation split's questions whose answer is flagged."""

STRANGE, HAND = 0.02, 30
"""The share of new hands whose strangest digit is flagged, and how many scans are taken for one."""

UNSURE = 0.01, 0.03
"""The least and the largest share of them whose rationale is flagged."""

WRONG = 0.01
"""The share of reworded questions that may be wrong without any flag."""


@dataclass(frozen=True)
class Depth:
    """What a run was trained on, and its thresholds.

    Attributes:
        words: The words and signs of the training questions and their contexts.
        options: The values that were options.
        most: The most options that a training question had, and the fewest.
        strangeness: The strangest digit, in the measure of `Reader`, that is still one.
        sureness: The least probability of a rationale's least sure token.
        probability: The least probability of the answer among the options.
    """

    words: tuple[str, ...]
    options: tuple[str, ...]
    fewest: int
    most: int
    strangeness: float
    sureness: float
    probability: float


def depth_file(folder: Path, seed: int) -> Path:
    """Return the file that `measure_depth` writes."""
    return folder / f"seed{seed}" / "ask.json"


def read_depth(folder: Path, seed: int) -> Depth:
    """Read what `measure_depth` has written.

    Raises:
        MissingFileError: The run is of a version that did not measure it, or is not done.
        CheckpointError: The file is not whole.
    """
    file, remedy = depth_file(folder, seed), f"Write it: modgraft mmcot evaluate --run {folder}"
    read = read_json(file, what="what the run can be asked", remedy=remedy)
    if set(read) != {field.name for field in fields(Depth)}:
        raise CheckpointError(f"{file} is not whole; {remedy[0].lower()}{remedy[1:]}")
    values: dict[str, Any] = {name: tuple(read[name]) for name in ("words", "options")}
    return Depth(**{**read, **values})


def measure_depth(folder: Path, seed: int) -> None:
    """Measure a trained run's depth, and write it into the seed's folder."""
    settings, tokenizer = settings_of(folder), load_run_tokenizer(folder, seed)
    eye = load_vision(folder / f"seed{seed}" / "data" / "vision.safetensors")
    questions = load_questions(folder, seed)
    train, val = questions.split("train"), questions.split("val")
    hosts = {key: load_net(folder, seed, key) for key in ("stage1", "stage2")}
    own = answers(hosts, val, tokenizer, settings)
    counts = [len(record.choices) for record in train]
    reworded, seen = _reworded(settings, seed, eye, range(min(counts), max(counts) + 1))
    made = answers(hosts, reworded, tokenizer, settings)
    wrong = []  # without a flag
    for record in reworded:
        said, digits = made[record.id], seen.get(record.id)
        flags = contradictions(record, said.rationale, said.choice, digits)
        if said.choice is not None and said.choice != record.answer and not any(flags):
            wrong.append(said.sureness)
    texts = [f"{record.question} {record.hint}" for record in train]
    sure = [one.sureness for one in own.values()]
    depth = Depth(
        words=tuple(sorted({word for text in texts for word in WORDS.findall(text)})),
        options=tuple(sorted({choice for record in train for choice in record.choices})),
        fewest=min(counts), most=max(counts),
        strangeness=_strangeness(Reader(eye)),
        sureness=_threshold(wrong, round(WRONG * len(reworded)), sure),
        # where hardly any is in doubt, the quantile is 1, and no doubt by itself
        probability=float(min(np.quantile([o.probability for o in own.values()], DOUBTFUL), 0.9)),
    )  # fmt: skip
    write_json(depth_file(folder, seed), asdict(depth))


def _reworded(
    settings: Settings, seed: int, eye: DigitPatches, counts: range
) -> tuple[Questions, dict[str, tuple[int, ...]]]:
    """Draw reworded questions of the forms that training had, as `ask` reads them.

    Returns:
        The questions, and id → the digits that the eye reads.
    """
    drawn, problems = digits_qa(0, 0, 0, seed=seed, reworded=2 * settings.val), {}
    for qid, problem in drawn.problems.items():
        digits = len(drawn.digits.get(qid, POSITIONS))
        if len(problem["choices"]) in counts and (digits == 3 or settings.varied):
            question = restated(problem["question"], problem["hint"], digits)
            if question is not None:  # else `ask` flags it
                problems[qid] = problem | {"question": question}
    strips = {qid: torch.from_numpy(drawn.strips[qid]) for qid in problems if qid in drawn.strips}
    reader = Reader(eye)
    seen = {qid: reader.look(strip).digits for qid, strip in strips.items()}
    return Questions.from_json(problems, features=look_at(strips, eye)), seen


def _strangeness(reader: Reader) -> float:
    """Return the strangeness that the strangest digit of a new hand exceeds in a share `STRANGE`.

    Neighbouring scans share a hand. The strangest of each such block of the validation scans
    follow, as maxima do, a Gumbel distribution, which is fitted by its moments.
    """
    scans_, _ = scans()
    strange = reader.strangeness(torch.from_numpy(scans_[CUT["val"]]))
    most = strange.reshape(-1, HAND).amax(1).double()
    scale = float(most.std()) * math.sqrt(6) / math.pi
    return float(most.mean()) - scale * (np.euler_gamma + math.log(-math.log(1 - STRANGE)))


def _threshold(wrong: Sequence[float], spared: int, val: Sequence[float]) -> float:
    """Return the sureness above which `spared` wrong answers lie, within the shares of `UNSURE`."""
    enough = np.nextafter(sorted(wrong)[-spared - 1], 1) if len(wrong) > spared else 0.0
    return float(np.clip(enough, *np.quantile(val, UNSURE)))


@dataclass(frozen=True)
class Answered:
    """What the two stages make of a question.

    Attributes:
        rationale: What stage 1 wrote, as stage 2 read it.
        text: What stage 2 wrote.
        choice: The option that it names, if any.
        sureness: The probability of the rationale's least sure token.
        probabilities: Of the options, under stage 2.
    """

    rationale: str
    text: str
    choice: int | None
    sureness: float
    probabilities: tuple[float, ...]

    @property
    def probability(self) -> float:
        """The probability of the option named; 0 if none is."""
        return 0.0 if self.choice is None else self.probabilities[self.choice]


def answers(
    hosts: Mapping[str, mg.Host], questions: Questions, tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
) -> dict[str, Answered]:  # fmt: skip
    """Answer questions with both stages, and score what they write; id → answer.

    Args:
        hosts: The two stages, `stage1` and `stage2`.
        questions: The questions; if none has an image, the modules stay inactive.
        tokenizer: The run's.
        settings: The run's.
    """
    first, second = NETS["stage1"], NETS["stage2"]
    with ExitStack() as stack:
        if not questions.features:
            first, second = replace(first, fusion=None), replace(second, fusion=None)
            for host in hosts.values():
                stack.enter_context(host.using(None))
        told = write_rationales(hosts["stage1"], first, questions, tokenizer, settings)
        texts = write(hosts["stage2"], second, questions, tokenizer, settings, told)
        own = _each(questions, lambda r: [replace(r, solution=told[r.id], lecture="")])
        sure = score(hosts["stage1"], first, own, tokenizer, settings)
        named = _each(questions, lambda r: [replace(r, answer=i) for i in range(len(r.choices))])
        read = {record.id: told[record.id.rpartition(" ")[0]] for record in named}
        chances = score(hosts["stage2"], second, named, tokenizer, settings, read)
    return {
        record.id: Answered(
            told[record.id],
            texts[record.id],
            extract_answer(texts[record.id], record.choices),
            float(sure[f"{record.id} 0"].min().exp()),
            _shares([chances[f"{record.id} {i}"] for i in range(len(record.choices))]),
        )
        for record in questions
    }


def _shares(tokens: list[Tensor]) -> tuple[float, ...]:
    """Return the probability of each text, of these, from its tokens' log-probabilities."""
    return tuple(torch.stack([logs.sum() for logs in tokens]).softmax(0).tolist())


def _each(questions: Questions, made_of: Callable[[Record], list[Record]]) -> Questions:
    """Return what is made of each question, as "<id> 0", "<id> 1", …, with its features."""
    made = {f"{r.id} {i}": (r.id, one) for r in questions for i, one in enumerate(made_of(r))}
    features = {name: questions.features[qid] for name, (qid, _) in made.items()
                if qid in questions.features}  # fmt: skip
    return Questions(tuple(replace(one, id=name) for name, (_, one) in made.items()), features)
