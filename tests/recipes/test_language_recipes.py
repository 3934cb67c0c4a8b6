"""Code books, optimisers and students: what they compute by themselves, and tiny runs of each."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modgraft.core.errors import ModgraftError
from modgraft.models.gpt import GPT, GPTConfig
from modgraft.recipes import trials
from modgraft.recipes.code_book.recipe import BOOKS, entropy, gpt, width_of
from modgraft.recipes.code_book.recipe import RECIPE as CODE_BOOK
from modgraft.recipes.language import Text, mean_loss, parameters
from modgraft.recipes.optimizers.recipe import RECIPE as OPTIMIZERS
from modgraft.recipes.optimizers.recipe import search
from modgraft.recipes.students.pruning import importance, narrowed
from modgraft.recipes.students.recipe import RECIPE as STUDENTS
from modgraft.recipes.students.recipe import Distilled

LINES = [f"{i} bottles of beer, {i * i % 97} of them green, on the wall.\n" for i in range(700)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("".join(LINES))
    return str(file)


def small(**settings) -> GPT:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    given = {"vocab_size": 20, "positions": "rotary", "bias": False, **shape, **settings}
    return GPT(GPTConfig(**given)).eval()


def batches(count: int = 3, words: int = 20) -> list[dict[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(0)
    rows = torch.randint(words, (count, 4, 9), generator=made)
    return [{"input_ids": ids[:, :-1], "targets": ids[:, 1:]} for ids in rows]


# -- a text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", [0, 256, 300])
def test_every_tokenizer_is_tested_on_the_same_bytes(corpus, pairs):
    text = Text.read(corpus, pairs)
    whole = "".join(LINES)
    assert text.tokenizer.decode(text.test.tolist()) == whole[int(0.9 * len(whole)) :]
    assert text.bytes_a_token * len(text.test) == pytest.approx(len(whole) - int(0.9 * len(whole)))


def test_a_test_part_without_a_window_is_refused():
    with pytest.raises(ModgraftError, match="5 tokens to test on are no window of 64"):
        mean_loss(small(), np.arange(5), 64)


# -- code books ------------------------------------------------------------------------------------


def test_entropy_is_that_of_the_shares():
    want = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    assert entropy(np.array([3, 3, 1, 7])) == pytest.approx(want)


@pytest.mark.parametrize("size", [100_000, 800_000])
def test_models_of_all_code_books_are_of_one_size(corpus, size):
    text, settings = Text.read(corpus, 300), replace(CODE_BOOK.settings, size=size)
    assert parameters(gpt(text, settings)) == pytest.approx(size, rel=0.1)
    assert width_of(4096, settings) < width_of(65, settings)
    assert all(width_of(v, settings) % 8 == 0 for v in (65, 256, 4096))


def test_a_tiny_run_of_code_books(corpus, tmp_path):
    settings = replace(CODE_BOOK.settings, corpus=corpus, size=10_000, layers=1, passes=0.1)
    found = trials.run(CODE_BOOK, tmp_path / "run", settings, [0], jobs=1, note=False)["rows"]
    sizes = [found[key]["0"]["characters"] for key in BOOKS]
    assert sizes[:2] == [1, 1]
    assert sizes == sorted(sizes)
    for key in BOOKS:
        row = found[key]["0"]
        assert row["timed_seconds"] == pytest.approx(found["characters"]["0"]["seconds"], rel=1.0)
        assert 0 < row["bits"] < 16


# -- optimisers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [2.0**-12, 2.0**-8, 2.0**-3])
def test_a_search_ends_at_the_best_rate_wherever_it_begins(best):
    tried = search(lambda rate: abs(math.log2(rate / best)), 2.0**-8)
    assert min(tried, key=tried.__getitem__) == best
    assert {best / 2, best, 2 * best} <= tried.keys()


def test_a_search_without_an_end_is_refused():
    with pytest.raises(ModgraftError, match="no learning rate from"):
        search(lambda rate: rate, 1.0)


def test_a_tiny_run_of_optimizers(corpus, tmp_path):
    settings = replace(OPTIMIZERS.settings, corpus=corpus, width=16, layers=1, search_steps=12,
                       steps=12)  # fmt: skip
    found = trials.run(OPTIMIZERS, tmp_path / "run", settings, [0], jobs=1, note=False)
    assert found["rows"]["adamw"]["0"]["loss"] == found["rows"]["adamw"]["0"]["timed_loss"]
    assert found["rows"].keys() == {"adamw", "lion", "muon"}


# -- students --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [False, True])
def test_what_does_nothing_is_pruned_and_the_rest_computes_the_same(activation, bias):
    model = small(activation=activation, bias=bias)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.output.weight[:, 4:8] = 0  # the second head of four, 4 wide
            block.feedforward.down.weight[:, 10:] = 0
    cut = narrowed(model, 3, 10, batches())
    assert cut.blocks[0].attention.query.out_features == 12
    assert cut.blocks[0].feedforward.up.out_features == 10
    ids = batches()[0]["input_ids"]
    torch.testing.assert_close(cut(input_ids=ids).logits, model(input_ids=ids).logits)


def test_importance_is_the_change_of_the_loss_to_first_order():
    model, (batch,) = small().double(), batches(1)
    heads, neurons = importance(model, [batch])

    def loss() -> float:
        logits = model(input_ids=batch["input_ids"]).logits  # in float64, which .loss is not
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).item()

    before, step = loss(), 1e-5
    for i, block in enumerate(model.blocks):
        for head in range(4):
            with torch.no_grad():
                own = block.attention.output.weight[:, 4 * head : 4 * head + 4]
                own.mul_(1 - step)
                change = (before - loss()) / step
                own.div_(1 - step)
            assert abs(change) == pytest.approx(heads[i][head].item(), rel=1e-2, abs=1e-6)
    assert [len(each) for each in neurons] == [64, 64]


@pytest.mark.parametrize(
    ("settings", "heads", "inner", "words"),
    [
        ({}, 0, 4, "4 heads and 64 neurons"),
        ({}, 2, 65, "4 heads and 64 neurons"),
        ({"num_key_value_heads": 2}, 2, 4, "share keys"),
    ],
)
def test_what_cannot_be_pruned_is_refused(settings, heads, inner, words):
    with pytest.raises(ModgraftError, match=words):
        narrowed(small(**settings), heads, inner, batches())
    with pytest.raises(ModgraftError, match="no batch"):
        narrowed(small(), 1, 1, [])


def test_distillation_is_its_equation():
    student, teacher, (batch,) = small(), small(hidden_size=32), batches(1)
    found = Distilled(student, teacher, 2.0)(**batch).loss
    p = (teacher(input_ids=batch["input_ids"]).logits.double() / 2).softmax(-1)
    q = (student(input_ids=batch["input_ids"]).logits.double() / 2).softmax(-1)
    apart = (p * (p.log() - q.log())).sum(-1).mean()
    hard = F.cross_entropy(student(**batch).logits.flatten(0, 1), batch["targets"].flatten())
    torch.testing.assert_close(found.double(), 0.5 * hard.double() + 2 * apart, rtol=1e-5, atol=0)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_tiny_run_of_students(corpus, tmp_path: Path):
    settings = replace(STUDENTS.settings, corpus=corpus, width=16, layers=1, large_width=32,
                       large_layers=1, kept_neurons=16, steps=12, expert_width=4)  # fmt: skip
    found = trials.run(STUDENTS, tmp_path / "run", settings, [0], jobs=1, note=False)["rows"]
    assert found.keys() == STUDENTS.rows.keys()
    assert found["pruned"]["0"]["parameters"] < found["large"]["0"]["parameters"]
    assert found["experts"]["0"]["parameters"] > found["small"]["0"]["parameters"]
    again = trials.run(STUDENTS, tmp_path / "run", settings, [0], jobs=1, note=False)["rows"]
    assert again == found
