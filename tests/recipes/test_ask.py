"""Questions to a trained run: what it answers, and how it says that it is beyond it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.ask_items import items, questions
from PIL import Image

import modgraft as mg
from command import modgraft, refused
from modgraft.data.digits import digits_qa
from modgraft.data.records import Record
from modgraft.data.text import find_form
from modgraft.models.strips import save_strip
from modgraft.recipes.mmcot import ask as asking
from modgraft.recipes.mmcot.ask import Asker
from modgraft.recipes.mmcot.contradictions import contradictions
from modgraft.recipes.mmcot.data import load_questions, load_run_tokenizer, load_strips, settings_of
from modgraft.recipes.mmcot.depth import Answered, Depth, answers, read_depth
from modgraft.recipes.mmcot.nets import load_net
from modgraft.recipes.mmcot.recipe import NETS, write_rationales
from modgraft.report.run import read_run


def image_of(run: Path, count: int = 3) -> tuple[Path, tuple[int, ...]]:
    """A strip of the training split with as many digits, as a file, and what the eye reads."""
    strip = next(s for s in load_strips(run, 0).values() if s.shape[1] == 8 * count)
    save_strip(strip, run / "strip.png", zoom=10)
    reader = Asker(run)._reader
    assert reader is not None
    return run / "strip.png", reader.look(strip).digits


def test_asking_about_an_image_of_the_test(run: Path) -> None:
    record = next(r for r in load_questions(run, 0).split("test") if r.image)
    image = run / "seed0" / "data" / "images" / "test" / record.id / "image.png"
    ask = ["mmcot", "ask", image, record.question, *record.choices, "--run", run]
    result = modgraft(*ask, "--hint", record.hint)
    assert result.code in (0, 2), result  # 2: it read no option from what the net wrote
    (made,) = [p for p in read_run(run).predictions["fused"][0] if p.id == record.id]
    lines = dict(line.partition(" ")[::2] for line in result.out.splitlines())
    assert lines["Rationale"].split() == (made.rationale or "").split()
    if made.choice is None:
        assert lines["Answer"].split() == f"none of the options (it wrote: {made.text})".split()
    else:
        assert lines["Answer"].split()[1] == made.choices[made.choice] + ","
    assert "Flag" in lines  # so little training gives no sure answer


def test_probabilities_are_those_of_the_options_alone(run: Path) -> None:
    part, settings = load_questions(run, 0).split("test")[:3], settings_of(run)
    hosts = {key: load_net(run, 0, key) for key in ("stage1", "stage2")}
    tokenizer = load_run_tokenizer(run, 0)
    made = answers(hosts, part, tokenizer, settings)
    for record in part:
        told, logs = made[record.id].rationale, []
        for letter, choice in zip("ABCDE", record.choices, strict=False):
            text = find_form("QCMG-VA").input(record, told)
            batch = dict(tokenizer(text, return_tensors="pt"))
            target = f"{choice} . The answer is ({letter}) ."
            batch["labels"] = tokenizer(target, return_tensors="pt")["input_ids"]
            host = hosts["stage2"]
            side = part.features.get(record.id)
            with torch.no_grad():
                if side is None:
                    with host.using(None):
                        loss = host(**batch).loss
                else:
                    loss = host(**batch, side={"image": mg.Side(side[None])}).loss
            logs.append(-loss * batch["labels"].shape[1])
        expected = torch.stack(logs).softmax(0).tolist()
        assert made[record.id].probabilities == pytest.approx(expected, abs=1e-4)
        assert 0 <= made[record.id].sureness <= 1


def test_asking_without_an_image_asks_the_text_model(run: Path) -> None:
    asker = Asker(run)
    said = asker.ask(None, "What is 3 plus 4?", ["6", "7"])
    record = replace(
        load_questions(run, 0)[0], id="one", question="What is 3 plus 4?", choices=("6", "7"),
        answer=0, hint="", image=None,
    )  # fmt: skip
    host, net = load_net(run, 0, "stage1"), replace(NETS["stage1"], fusion=None)
    part = replace(load_questions(run, 0), records=(record,), features={}, splits=None)
    with host.using(None):
        told = write_rationales(host, net, part, asker.tokenizer, asker.settings)
    assert said.rationale == told["one"]
    again = asker.ask(image_of(run)[0], "What is the left digit?", ["6", "7"])  # active again
    assert again == Asker(run).ask(run / "strip.png", "What is the left digit?", ["6", "7"])


def test_asking_badly(run: Path, tmp_path: Path) -> None:
    png = next((run / "seed0" / "data" / "images" / "test").glob("*/image.png"))
    (tmp_path / "cut.png").write_bytes(png.read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (240, 80), 255).save(tmp_path / "blank.png")

    def ask(*args: str | Path) -> Any:
        return modgraft("mmcot", "ask", *args, "--run", run)

    refused(ask(tmp_path / "none.png", "What?", "1", "2"), "none.png", "the image is missing")
    refused(ask(tmp_path / "cut.png", "What?", "1", "2"), "cut.png", "damaged")
    refused(ask(tmp_path / "text.png", "What?", "1", "2"), "text.png", "not an image")
    refused(ask(tmp_path / "blank.png", "What?", "1", "2"), "blank.png", "the image is blank")
    refused(ask(png, "What?", "1"), "2 to 26 options", "modgraft mmcot ask")
    refused(ask(png, " ", "1", "2"), "needs words")
    refused(ask(png, "What?", "1", "2", "--seed", "5"), "no seed 5", "Take one of 0")
    assert ask(png, "What?").code == 2  # no option at all: the usage is shown
    none = modgraft("mmcot", "ask", png, "What?", "1", "2", "--run", tmp_path / "norun")
    refused(none, "norun", "Train it first")


# flags


WORDS = "What is the left right middle digit plus even many How larger or Which code has ? , :"
ANYTHING = Depth(
    words=(*WORDS.split(" "), "3", "4", "K", "F"), options=("3", "4", "7", "8", "K", "F"),
    fewest=2, most=3, strangeness=1e9, sureness=0.5, probability=0.5,
)  # fmt: skip
SURE = Answered("3 plus 4 is 7, so 7.", "7 . The answer is (A).", 0, 0.9, (0.98, 0.02))


@pytest.mark.parametrize(
    ("question", "options", "said", "flag"),
    [
        ("What is 3 plus 4?", "7 8", SURE, None),
        ("WHAT IS three PLUS Four?", "seven EIGHT", SURE, None),
        ("Add three and FOUR", "7 8", SURE, None),
        ("What is the topmost digit?", "7 8", SURE, "no word there for topmost"),
        ("Is 3 larger than 4?", "7 8", SURE, "none that the run knows: which digit is at"),
        ("What is 3 plus 4?", "7 cat", SURE, "options that training lacks: cat"),
        ("What is 3 plus 4?", "7 seven", SURE, "twice: 7"),
        ("What is 3 plus 4?", "7 3 4 8", SURE, "4 options, where training had 2 to 3"),
        ("What is 3 plus 4?", "7 8", replace(SURE, choice=1, probabilities=(0.02, 0.98)),
         "comes to 7, the option named is 8"),
        ("What is 3 plus 4?", "3 8", SURE, "comes to 7, which is none of the options"),
        ("What is 3 plus 4?", "7 8", replace(SURE, choice=None), "names none of the options"),
        ("What is 3 plus 4?", "7 8", replace(SURE, rationale="3 plus"), "comes to no value"),
        ("What is 3 plus 4?", "8 7", replace(SURE, rationale="3 plus 4 is 8, so 8."),
         "does not hold: 3 plus 4 is 8"),
        ("What is 3 plus 4?", "7 8", replace(SURE, sureness=0.2), "a probability of 0.20"),
        ("What is 3 plus 4?", "7 8", replace(SURE, probabilities=(0.4, 0.6)), "of 0.40"),
        ("What is the left digit?", "3 8", replace(SURE, rationale="left 3. left 3, so 3."),
         "there is no picture"),
    ],
)  # fmt: skip
def test_a_flag_for_each_contradiction(
    run: Path, monkeypatch: pytest.MonkeyPatch, question: str, options: str, said: Answered,
    flag: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(asking, "answers", lambda *_: {"asked": said})
    monkeypatch.setattr(asking, "read_depth", lambda *_: ANYTHING)
    flags = Asker(run).ask(None, question, options.split()).flags
    assert len(flags) == (flag is not None), flags
    assert flag is None or flag in flags[0]


def test_a_flag_where_the_rationale_and_the_eye_differ(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, (left, right) = image_of(run, 2)
    monkeypatch.setattr(asking, "read_depth", lambda *_: ANYTHING)

    def flags(rationale: str) -> tuple[str, ...]:
        said = Answered(rationale, "", 0, 0.9, (0.98, 0.02))
        monkeypatch.setattr(asking, "answers", lambda *_: {"asked": said})
        options = [str(left), str((left + 1) % 10)]
        made = Asker(run).ask(image, "What is the left digit?", options).flags
        return tuple(one for one in made if "training lacks" not in one)

    assert not flags(f"left {left}, right {right}. left {left}, so {left}.")
    other = (right + 1) % 10
    (one,) = flags(f"left {left}, right {other}. left {left}, so {left}.")
    assert one == (
        f"the eye reads left {left}, right {right}, the rationale says left {left}, right {other}"
    )
    assert "the rationale says" in flags(f"left {left}. left {left}, so {left}.")[0]
    assert "uses middle" in flags(f"left {left}, right {right}. middle {left}, so {left}.")[0]
    monkeypatch.setattr(asking, "read_depth", lambda *_: replace(ANYTHING, strangeness=0.0))
    assert "no strip of digits" in flags(f"left {left}, right {right}. left {left}, so {left}.")[0]


def test_strict_refuses_what_is_flagged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "answers", lambda *_: {"asked": SURE})
    monkeypatch.setattr(asking, "read_depth", lambda *_: ANYTHING)

    def ask(question: str, *options: str) -> Any:
        return modgraft("mmcot", "ask", "-", question, *options, "--run", run)

    good = ask("What is 3 plus 4?", "seven", "8", "--strict")
    assert good.code == 0
    assert "Answer (A) seven, 98.0 %; next (B) 8, 2.0 %" in good.out
    assert "Read as What is 3 plus 4? | 7 | 8" in good.out
    assert "Flag" not in good.out
    flagged = ask("What is 3 times 4?", "7", "8")
    assert flagged.code == 0
    assert "Flag the question is none that the run knows" in flagged.out
    strict = ask("What is 3 times 4?", "7", "8", "--strict")
    assert strict.code == 3
    assert "Answer" not in strict.out
    assert "Flag the question is none that the run knows" in strict.out


# what a run can be asked


def test_the_run_writes_down_what_it_can_be_asked(run: Path) -> None:
    depth, train = read_depth(run, 0), load_questions(run, 0, features=False).split("train")
    assert (depth.fewest, depth.most) == (2, 8)
    assert set(depth.options) == {choice for record in train for choice in record.choices}
    assert {"What", "left", "?", "K", "plus"} <= set(depth.words)
    assert "odd" not in depth.words  # rationales have it, but no question
    assert depth.strangeness > 0


def test_a_run_of_before_says_what_it_lacks_and_evaluate_writes_it(run: Path) -> None:
    written, card = run / "seed0" / "ask.json", run / "run.json"
    measured, asked = written.read_text(), json.loads(card.read_text())
    written.unlink()
    said = Asker(run).ask(None, "What is 3 plus 4?", ["6", "7"])
    assert f"modgraft mmcot evaluate --run {run}" in " ".join(said.flags)
    result = modgraft("mmcot", "evaluate", "--run", run, "--rows", "fused")
    assert result.code == 0, result
    assert written.read_text() == measured
    written.write_text("{}")
    refused(modgraft("mmcot", "ask", "-", "What?", "1", "2", "--run", run), "ask.json", "not whole")
    written.write_text(measured)
    old = {**asked, "settings": {k: v for k, v in asked["settings"].items() if k != "varied"}}
    card.write_text(json.dumps(old))
    assert settings_of(run).varied == 0
    card.write_text(json.dumps(asked))


# the judge


def test_the_judge_has_200_questions_and_100_pictures_that_training_never_saw() -> None:
    all_items = list(items())
    assert (len(all_items), len([i for i in all_items if i.group.startswith("pictures")])) == (
        300,
        100,
    )
    assert all(item.answer is None or item.answer < len(item.options) for item in all_items)
    made = digits_qa(12_000, 0, 0, varied=0.25, reworded=960)

    def words(text: str) -> str:
        return " ".join(re.findall(r"\w+|\+", text.lower()))

    trained = {words(raw["question"]) for raw in made.problems.values()}
    judged = [item for item in questions() if item.answer is not None]
    seen = [i.question for i in judged if words(i.question) in trained and not i.question.isupper()]
    assert not seen
    assert len(judged) == 145


def test_a_rationale_of_other_places_or_numbers_and_a_table_with_two_codes() -> None:
    record = Record(
        id="one", question="What is 3 plus 4?", choices=("7", "8"), answer=0, hint="", image=None,
        split="test", **dict.fromkeys(
            ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), ""
        ),
    )  # fmt: skip

    def found(rationale: str, seen: tuple[int, ...] | None = None, **change: str) -> list[str]:
        return list(contradictions(replace(record, **change), rationale, 0, seen))

    assert not found("3 plus 4 is 7, so 7.")
    assert not found("4 plus 3 is 7, so 7.")
    assert "is of 3 and 4, the rationale of others" in found("5 plus 2 is 7, so 7.")[0]
    left = "left 7, right 0. left 7 plus right 0 is 7, so 7."
    assert "the rationale of others" in found(left, (7, 0))[0]
    assert not found(left, (7, 0), question="What is left plus right?")
    (one,) = found("left 7, right 0. left 7, so 7.", (7, 0), question="What is the right digit?")
    assert one == "the question is of right, the rationale uses left 7"
    (one,) = found("row 3 7, so 7.", question="Which code has the digit 3?", hint="3 K, 3 F")[:1]
    assert one == "the table has several codes for 3"
