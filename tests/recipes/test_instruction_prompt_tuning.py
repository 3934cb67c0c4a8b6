"""Tasks that are read off examples: what a text of them holds, and a tiny run."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from modgraft.recipes import trials
from modgraft.recipes.instruction_prompt_tuning.recipe import RECIPE, Texts, collate
from modgraft.recipes.instruction_prompt_tuning.tasks import (
    THINGS,
    VALUES,
    VOCABULARY,
    Task,
    row,
    similar,
    unlike,
)

TASK = Task(1, (7, 6, 5, 4, 3, 2, 1, 0))


def test_a_text_asks_for_the_labels_of_what_is_asked():
    text = row(TASK, [(0, 2)], [(3, 4), (5, 6)])
    labels = 2 * VALUES
    assert text["input_ids"].tolist() == [0, 8 + 2, labels + 5, 3, 8 + 4, labels + 3, 5, 8 + 6]
    assert text["targets"].tolist() == [-100] * 4 + [labels + 3, -100, -100, labels + 1]


def test_examples_are_like_what_is_asked_or_not():
    rng = random.Random(0)
    known = rng.sample(THINGS, 40)
    for thing in THINGS:
        alike, others = similar(thing, known, 4, rng), unlike(thing, known, 4, rng)
        assert thing not in alike
        assert all((x[0] == thing[0]) != (x[1] == thing[1]) for x in alike)
        assert len(others) == 4
        assert not any(x[0] == thing[0] or x[1] == thing[1] for x in others)
        assert {*alike, *others} <= {*known}


def test_texts_are_those_of_their_seed_and_tasks_differ():
    texts, again = Texts(5, 6, 0), Texts(5, 6, 0)
    assert all(torch.equal(texts[i]["input_ids"], again[i]["input_ids"]) for i in range(5))
    assert not torch.equal(texts[0]["input_ids"], Texts(5, 6, 1)[0]["input_ids"])
    batch = collate([texts[0], row(TASK, [], [(1, 1)])])
    assert batch["input_ids"].shape == batch["targets"].shape == (2, 17)
    assert int((batch["targets"][1] != -100).sum()) == 1
    assert int(batch["input_ids"].max()) < VOCABULARY


@pytest.mark.parametrize("attribute", [0, 1])
def test_a_label_is_that_of_one_attribute(attribute):
    task = Task(attribute, tuple(range(VALUES)))
    assert {thing[attribute] == task.label(thing) for thing in THINGS} == {True}


def test_a_tiny_run(tmp_path):
    settings = replace(RECIPE.settings, width=16, layers=1, host_steps=8, steps=3)
    found = trials.run(RECIPE, tmp_path / "run", settings, [0], jobs=1, note=False)["rows"]
    assert found.keys() == RECIPE.rows.keys()
    assert all(0 <= row["0"]["accuracy"] <= 100 for row in found.values())
