"""The recipe MAD-X: its data, its modules, a run as small as can be, and its picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

pytest.importorskip("babel", reason="names in many languages are Babel's: make setup")

import modgraft as mg
from modgraft.data.cldr import KINDS
from modgraft.recipes import trials
from modgraft.recipes.madx.data import Corpus, normalised, split_of
from modgraft.recipes.madx.recipe import (
    COLUMNS,
    RECIPE,
    ROWS,
    Experiment,
    Settings,
    train_stacked,
    trial,
)  # fmt: skip
from modgraft.report.figures import LIGHT

TINY = replace(
    RECIPE.smaller(0.005), known="en de", targets="eu hu", width=32, layers=1, vocab=900,
    names=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Experiment(tmp_path_factory.mktemp("corpus"), TINY, 0).corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trial(tmp_path_factory.mktemp("madx"), TINY, 0)


def test_the_task_and_its_test_share_no_thing(corpus: Corpus) -> None:
    asked = corpus.test("en") | corpus.test("eu")
    assert {split_of(thing, 0) for thing in asked} == {"named", "hidden"}
    learned = {tuple(ids) for ids, _ in corpus.task_loader().dataset}  # type: ignore[attr-defined]
    again = learned.intersection(map(tuple, corpus.ids(list(corpus.test("en").values()))))
    assert len(again) <= 3  # currencies that differ in their years alone: a number is read as 0
    assert len(learned) <= 20 * len(KINDS)


def test_a_trial_keeps_its_tokenizer(tmp_path: Path) -> None:
    one, other = (Experiment(tmp_path, TINY, 0).corpus for _ in range(2))
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert one.text == other.text


def test_no_name_asked_for_is_spelled_as_in_english(corpus: Corpus) -> None:
    english = {normalised(name) for name in corpus.names["en"].values()}
    assert not [n for n in corpus.test("hu").values() if normalised(n) in english]
    assert normalised("Malajziako Ringgita É") == "malajziako ringgita e"


def test_no_text_names_what_is_hidden(corpus: Corpus) -> None:
    for code in ("en", "eu"):
        told = {thing for line in corpus.lines[code] for thing in line.things}
        asked = set(corpus.test(code))
        assert not [thing for thing in told if split_of(thing, 0) == "hidden"]
        assert len(asked & told) > 250
        assert len(asked - told) > 250


def test_accuracy_is_the_mean_over_the_kinds(corpus: Corpus) -> None:
    class Says(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> Any:
            answer = torch.zeros(len(ids), len(KINDS))
            answer[:, KINDS.index("unit")] = 1
            return type("Out", (), {"logits": answer})

    score = corpus.score(mg.Host(Says()), None, "eu")
    assert score.all == score.named == score.hidden == pytest.approx(20)


def test_only_the_modules_learn(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, TINY, 0)
    model, corpus = experiment.pretrained, experiment.corpus
    host, composed = train_stacked(experiment)
    theirs, ours = model.state_dict(), host.model.state_dict()
    changed = {key for key in theirs if not torch.equal(theirs[key], ours[key])}
    assert changed == {"head.weight", "head.bias"}
    assert composed("eu") == "eu_words >> eu >> kind"
    batch = next(iter(corpus.task_loader()))
    with torch.no_grad():
        first, *others = (host(**batch, modules=composed(c)).logits for c in ("en", "eu", None))
    assert not [other for other in others if torch.equal(first, other)]
    again, _ = train_stacked(experiment)  # reads what was trained
    for key, own in host.state_dict().items():
        assert torch.equal(own, again.state_dict()[key])


def test_every_row_has_every_column(run: dict[str, Any]) -> None:
    assert list(run["rows"]) == list(ROWS)
    tested = {"en", "unseen", "named", "hidden", "eu", "hu"}
    for row in run["rows"].values():
        assert set(row) == tested <= set(COLUMNS)
        assert all(0 <= figure <= 100 for figure in row.values())
    rows = run["rows"]
    assert rows["stack"]["en"] == rows["stack_source"]["en"]  # the same composition
    assert rows["stack"]["unseen"] == pytest.approx((rows["stack"]["eu"] + rows["stack"]["hu"]) / 2)


def test_the_frame_knows_it_and_it_draws(run: dict[str, Any]) -> None:
    assert trials.find_recipe("madx") is RECIPE
    canvas = Figure()
    RECIPE.paint(canvas, LIGHT, {"series": {"0": run["series"], "1": run["series"]}})
    (axes,) = canvas.axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["Basque", "Hungarian"]
    assert len(axes.patches) == 4 * 2


def test_a_quick_look_is_a_share_of_the_steps() -> None:
    quick = RECIPE.smaller(0.1)
    assert quick.steps_host == round(0.1 * Settings().steps_host)
    assert quick.targets == Settings().targets
