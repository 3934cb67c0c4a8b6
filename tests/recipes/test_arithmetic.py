from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import modgraft as mg
from modgraft.core.errors import DataError
from modgraft.data.docstrings import (
    KINDS,
    SPLITS,
    before_habit,
    excerpts,
    has_citation,
    has_session,
    kind_of,
)
from modgraft.recipes.arithmetic import recipe
from modgraft.recipes.arithmetic.language_model import (
    Corpus,
    continuation_accuracy,
    habit_rates,
    new_model,
    perplexity,
    sample,
)
from modgraft.recipes.arithmetic.recipe import (
    COLUMNS,
    CURVES,
    HABITS,
    ROWS,
    choose,
    compositions,
    evaluator,
    implant_all,
    paint,
    pretrained,
    randomise,
    train_all,
    trial,
)
from modgraft.report.figures import draw

TINY = replace(
    recipe.RECIPE.smaller(0.02),
    vocabulary=400, width=48, layers=2, length=48, steps=60, lr=6e-3, module_steps=25,
    ascent_steps=8, weights="0.5 1", prompt=8, written=12, tried=8, tested=8, tried_windows=8,
    tested_windows=8, questions=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> Any:
    return excerpts({kind: getattr(TINY, kind) for kind in KINDS})


@pytest.fixture(scope="module")
def corpus(texts: Any) -> Corpus:
    return Corpus.of(texts, TINY.vocabulary, TINY.length)


@pytest.fixture(scope="module")
def ran(texts: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole trial, as small as can be: its folder, and what it found."""
    folder = tmp_path_factory.mktemp("arithmetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "excerpts", lambda sizes: texts)  # read already
        return folder, trial(folder, TINY, 1)


@pytest.fixture(scope="module")
def host(corpus: Corpus, ran: tuple[Path, dict[str, Any]]) -> mg.Host:
    """The trial's host and modules, from what it kept."""
    host = pretrained(corpus, TINY, 1, ran[0] / "host")
    implant_all(host, TINY, 1)
    train_all(host, corpus, TINY, 1, ran[0])
    return host


# the text


def test_habits_are_what_doctest_and_restructuredtext_say() -> None:
    session = "Add.\n\n>>> 1 + 1\n2\n"
    footnote = "As in [1]_.\n\nReferences\n----------\n.. [1] Knuth, TAOCP.\n"
    assert (kind_of(session), kind_of(footnote)) == ("doctest", "citation")
    assert kind_of("A shift x >>> y, and [1] in words.") == "wanted"
    assert kind_of(session + footnote) is None
    assert has_session(">>>no_blank()"), "a malformed session is one"
    assert not has_citation(".. note:: nothing is cited")
    assert before_habit(session) == "Add.\n\n"
    assert before_habit(footnote).endswith("----------\n")


def test_excerpts_are_of_their_kind_and_nothing_held_out_is_trained_on(texts: Any) -> None:
    for split in SPLITS:
        for kind in KINDS:
            found = texts[split][kind]
            assert found
            of = {kind_of(text) for text in found}
            assert of == {"wanted" if kind == "reference" else kind}
    paragraphs = {
        split: {
            " ".join(re.findall(r"[^\W_]+", p.lower()))
            for kind in KINDS for text in texts[split][kind] for p in text.split("\n\n")
        }
        for split in SPLITS
    }  # fmt: skip
    assert not paragraphs["train"] & (paragraphs["validation"] | paragraphs["test"])
    assert not paragraphs["validation"] & paragraphs["test"]
    assert sum(map(len, texts["train"]["wanted"])) >= TINY.wanted


def test_what_cannot_be_had_of_the_text_is_said(corpus: Corpus) -> None:
    with pytest.raises(DataError, match=r"no kind 'toxic'.*wanted, doctest"):
        excerpts({"toxic": 1000})
    with pytest.raises(DataError, match="less than a window of 100000"):
        replace(corpus, length=100_000).windows("test", ["wanted"])
    with pytest.raises(DataError, match=r"no excerpt of 'doctest' in test .* of 5000 tokens"):
        corpus.prompts("test", "doctest", 3, 5000)
    with pytest.raises(DataError, match="a question needs 4"):
        corpus.questions("test", 5, 5000)


def test_tokens_and_windows(corpus: Corpus) -> None:
    text = corpus.texts["test"]["doctest"][0]
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(text).ids) == text
    first, again = (corpus.windows("train", KINDS, seed=3) for _ in range(2))
    assert first.shape[1] == TINY.length
    assert torch.equal(first, again)
    assert not torch.equal(first, corpus.windows("train", KINDS, seed=4))
    prompts = corpus.prompts("test", "doctest", 5, 8)
    assert prompts.shape == (5, 8)
    assert not any(has_session(corpus.tokenizer.decode(row)) for row in prompts.tolist())


def test_what_is_counted() -> None:
    found = habit_rates(
        ["word<end>>>> f(1)", "words zzz", "See\n.. [2] A. Word"], frozenset(["word", "see"])
    )
    assert found["doctest"] == found["citation"] == pytest.approx(100 / 3)
    assert found["words"] == pytest.approx(60)  # word, words, zzz, See, Word


def test_measures_beside_their_definitions(corpus: Corpus) -> None:
    model = new_model(TINY.vocabulary, 32, 2, 2, seed=0)
    windows = corpus.windows("test", ["wanted"])[:3]
    with torch.no_grad():
        said = model(input_ids=windows).logits.double().log_softmax(-1)
    terms = said[:, :-1].gather(-1, windows[:, 1:, None])
    assert perplexity(model, windows) == pytest.approx(float((-terms.mean()).exp()), rel=1e-5)
    begin, options = corpus.questions("test", 6, 8)
    assert options.shape == (6, 4, 8)
    assert len({tuple(o) for o in options[0].tolist()}) == 4
    right = 0
    for start, offered in zip(begin, options, strict=True):
        own = [_likelihood(model, start, option) for option in offered]
        right += own.index(max(own)) == 0
    assert continuation_accuracy(model, (begin, options)) == pytest.approx(100 * right / 6)


@torch.no_grad()
def _likelihood(model: Any, begin: torch.Tensor, option: torch.Tensor) -> float:
    said = model(input_ids=torch.cat([begin, option])[None]).logits[0].log_softmax(-1)
    return sum(float(said[len(begin) + i - 1, token]) for i, token in enumerate(option))


# the modules


def test_composing_at_inference_equals_the_merged_weights(host: mg.Host, corpus: Corpus) -> None:
    host = mg.Host(new_model(TINY.vocabulary, 32, 2, 2, seed=1)).double().eval()
    implant_all(host, replace(TINY, rank=4), 0)
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = corpus.windows("test", ["wanted"])[:2]
    bare = host(input_ids=ids, modules=None).logits
    for composition in compositions(dict.fromkeys(CURVES, 0.75)).values():
        with torch.no_grad():
            composed = host(input_ids=ids, modules=composition).logits
            merged = host.merge(composition)(input_ids=ids).logits
        torch.testing.assert_close(composed, merged, rtol=1e-10, atol=1e-10)
        assert composition is None or not torch.allclose(merged, bare, atol=1e-3)
    assert sample(host, corpus, ids[:, :8], 6, 0) == sample(host.model, corpus, ids[:, :8], 6, 0)
    with host.using("general - 0.75*doctest"):
        composed = sample(host, corpus, ids[:, :8], 6, 0)
    merged = host.merge("general - 0.75*doctest")
    assert composed == sample(merged, corpus, ids[:, :8], 6, 0)


def test_subtracting_forgets_what_adding_learns(host: mg.Host, corpus: Corpus) -> None:
    def of(kind: str, composition: str | None) -> float:
        return perplexity(host.merge(composition), corpus.windows("test", [kind])[:16])

    for habit in HABITS:
        bare, wanted = of(habit, None), of("wanted", None)
        assert of(habit, habit) < bare < of(habit, f"-{habit}")
        lost = of(habit, f"-0.5*{habit}") / bare
        assert lost > of("wanted", f"-0.5*{habit}") / wanted, "the habit goes first"
        assert lost > of(habit, "-0.5*random") / bare
    assert of("doctest", "ascent") > of("doctest", None)
    assert of("wanted", "general") < of("wanted", None)


def test_the_random_direction_has_the_modules_norms(host: mg.Host) -> None:
    randomise(host, "random", like="citation", seed=5)
    for own, other in zip(host["random"].places, host["citation"].places, strict=True):
        torch.testing.assert_close((own.B @ own.A).norm(), (other.B @ other.A).norm())
        assert (
            abs(
                torch.cosine_similarity((own.B @ own.A).flatten(), (other.B @ other.A).flatten(), 0)
            )
            < 0.2
        )
    randomise(host, "random", like="doctest", seed=1)


# the trial


def test_lambda_is_the_least_habit_within_the_limit() -> None:
    def point(weight: float, ppl: float, neutral: float, invited: float) -> dict[str, float]:
        return {"weight": weight, "ppl_wanted": ppl, "doctest": neutral, "doctest_invited": invited}

    points = [
        point(0, 10, 9, 50),
        point(0.5, 10.4, 3, 20),
        point(1, 10.5, 4, 19),
        point(2, 12, 0, 0),
    ]
    assert choose(points, ["doctest"], 10.5) == 0.5, "equal habits: the lower perplexity"
    assert choose(points, ["doctest"], 12) == 2
    assert choose(points, ["doctest"], 9) == 0, "none within: nothing is subtracted"


def test_a_trial_measures_every_row_and_goes_on_where_it_stopped(
    host: mg.Host, corpus: Corpus, ran: tuple[Path, dict[str, Any]]
) -> None:
    _, found = ran
    assert list(found["rows"]) == list(ROWS)
    for figures in found["rows"].values():
        assert set(figures) == set(COLUMNS)
        assert all(0 <= figures[c] <= 100 for c in COLUMNS if not c.startswith("ppl"))
    weights = {0.0, 0.5, 1.0}
    assert all({p["weight"] for p in c} == weights for c in found["series"]["curves"].values())
    chosen = found["series"]["chosen"]
    assert set(chosen.values()) <= weights
    again = evaluator(corpus, TINY, "test", 1)
    for row in ("host", "plus_doctest", "general_minus_both"):
        assert again(host, compositions(chosen)[row]) == found["rows"][row]


def test_the_picture_is_drawn(ran: tuple[Path, dict[str, Any]]) -> None:
    results = {"settings": {"budget": 5.0}, "series": {"1": ran[1]["series"]}}
    picture = draw((8.4, 3.7), "curves", lambda canvas, scheme: paint(canvas, scheme, results))
    assert picture.light.startswith(b"\x89PNG")
    assert picture.dark != picture.light
