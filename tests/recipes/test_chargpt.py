"""The bigram and the character GPT: counting, the naive page, a tiny run, and what it writes."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modgraft.core.errors import ModgraftError
from modgraft.data.corpus import read_corpus, standard_library
from modgraft.data.shards import tokens_of
from modgraft.recipes import trials
from modgraft.recipes.bigram.recipe import RECIPE as BIGRAM
from modgraft.recipes.bigram.recipe import Bigram, optimum
from modgraft.recipes.chargpt.counting import Counts
from modgraft.recipes.chargpt.naive import NaiveGPT, TorchGPT
from modgraft.recipes.chargpt.recipe import RECIPE, SHAPES, fast_gpt
from modgraft.recipes.chargpt.sampling import writer, written
from modgraft.recipes.language import Text, mean_loss, parameters

TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles.\n" for i in range(300))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "chargpt"
    few = dict.fromkeys(RECIPE.scaled, 40)
    settings = replace(RECIPE.settings, corpus=str(corpus), width=32, layers=1, length=32, **few)
    trials.run(RECIPE, folder, settings, [3], jobs=1, note=False)
    return folder


# -- counting --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=5, max_size=60), st.integers(1, 4))
def test_counts_are_the_equation_and_add_up_to_one(tokens, order):
    tokens, weight = np.array(tokens), 2.5
    counts = Counts(tokens, 4, order, weight)

    def p(context: tuple[int, ...], x: int, n: int) -> float:
        if n == 0:
            return 0.25
        c = context[len(context) - n + 1 :]
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        own, of = grams.count((*c, x)), sum(g[:-1] == c for g in grams)
        return (own + weight * p(context, x, n - 1)) / (of + weight)

    read = np.array([3, 0, 1, 1, 2, 0, 3])
    want = 0.0
    for t, x in enumerate(read.tolist()):
        n = min(order, t + 1)
        before = tuple(read[t - n + 1 : t].tolist())
        assert math.isclose(sum(p(before, y, n) for y in range(4)), 1, rel_tol=1e-9)
        want -= math.log(p(before, x, n))
    assert math.isclose(counts.loss(read), want / len(read), rel_tol=1e-9)


def test_counts_that_have_no_code_are_refused():
    with pytest.raises(ValueError, match="9-grams of 200 tokens"):
        Counts(np.arange(20), 200, 9, 1.0)


# -- the naive page --------------------------------------------------------------------------------


def test_the_naive_gpt_is_the_model_of_torchs_own_layers():
    torch.manual_seed(0)
    naive, own = NaiveGPT(11, 16, 24, 3, 2).eval(), TorchGPT(11, 16, 24, 3, 2).eval()
    with torch.no_grad():
        own.tokens.weight.copy_(naive.tokens.weight)
        own.places.weight.copy_(naive.places.weight)
        own.blocks.norm.load_state_dict(naive.norm.state_dict())
        for theirs, ours in zip(own.blocks.layers, naive.blocks, strict=True):
            theirs.self_attn.in_proj_weight.copy_(ours.attention.qkv.weight)
            theirs.self_attn.in_proj_bias.copy_(ours.attention.qkv.bias)
            theirs.self_attn.out_proj.load_state_dict(ours.attention.output.state_dict())
            theirs.norm1.load_state_dict(ours.attention_norm.state_dict())
            theirs.norm2.load_state_dict(ours.mlp_norm.state_dict())
            theirs.linear1.load_state_dict(ours.up.state_dict())
            theirs.linear2.load_state_dict(ours.down.state_dict())
    ids = torch.randint(11, (3, 13))
    torch.testing.assert_close(naive(ids).logits, own(ids).logits, atol=1e-5, rtol=1e-5)


def test_each_dropout_is_where_the_page_says():
    torch.manual_seed(0)
    model = NaiveGPT(11, 16, 24, 3, 1, dropout=0.5)
    ids = torch.randint(11, (2, 9))
    kept = [model.dropout.p, model.blocks[0].dropout.p, model.blocks[0].attention.dropout]
    assert kept == [0.5] * 3
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


# -- data ------------------------------------------------------------------------------------------


def test_the_default_corpus_is_the_interpreters_own_library():
    text = standard_library(200_000)
    assert len(text) == 200_000
    assert text.isascii()
    assert "def " in text
    assert read_corpus(None) == read_corpus(None)


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "text is empty"), (b" \n", "text is empty"), (b"ab\n\xff", "line 2, byte 3")],
)
def test_a_corpus_that_is_none(tmp_path, data, said):
    file = tmp_path / "text.txt"
    file.write_bytes(data)
    with pytest.raises(ModgraftError, match=said):
        read_corpus(file)
    with pytest.raises(ModgraftError, match="no such text"):
        read_corpus(tmp_path / "other.txt")


def test_bits_a_byte_are_those_of_the_text(corpus):
    characters, pairs = Text.read(str(corpus), 0), Text.read(str(corpus), 300)
    assert characters.bytes_a_token == 1
    assert pairs.bytes_a_token > 2
    assert pairs.tokenizer.decode(pairs.test.tolist()) in TEXT


# -- bigram ----------------------------------------------------------------------------------------


def test_the_bigram_learns_its_analytic_optimum(tmp_path, corpus):
    settings = replace(BIGRAM.settings, corpus=str(corpus), steps=300, batch=32)
    rows = BIGRAM.trial(tmp_path, settings, 0)["rows"]
    best = rows["optimum"]["training"]
    text = Text.read(str(corpus), 0)
    assert math.isclose(best, optimum(text.training, text.vocabulary))
    assert best - 1e-3 < rows["bigram"]["training"] < best + 0.02
    assert rows["uniform"]["test"] > rows["bigram"]["test"]


def test_the_optimum_is_what_the_shares_of_pairs_lose():
    tokens = np.array([0, 1, 0, 2, 0, 1, 1])
    model = Bigram(3)
    with torch.no_grad():
        model.table.weight.copy_(torch.log(torch.tensor([[0, 2, 1], [1, 1, 0], [1, 0, 0]]) + 1e-12))
    with torch.no_grad():
        read, follows = (torch.from_numpy(t[None]) for t in (tokens[:-1], tokens[1:]))
        loss = float(model(read, follows).loss)
    assert math.isclose(loss, optimum(tokens, 3), rel_tol=1e-5)


# -- a run -----------------------------------------------------------------------------------------


def test_a_run_counts_and_trains_every_row(run):
    rows = trials.read_results(run)["rows"]
    assert list(rows) == list(RECIPE.rows)
    found = {key: row["3"] for key, row in rows.items()}
    assert found["ngram"]["loss"] < found["bigram"]["loss"] < found["uniform"]["loss"]
    for key in ("naive", *SHAPES):
        assert found[key]["loss"] < found["uniform"]["loss"], key
        assert found[key]["bits"] == pytest.approx(found[key]["loss"] / math.log(2))
        assert found[key]["share"] > 0
    assert (run / "plot.png").stat().st_size > 10_000
    assert "Naive GPT" in (run / "table.md").read_text()


def test_the_small_model_has_no_more_parameters_than_the_naive_one():
    text = Text.read("", 0)
    naive = NaiveGPT(text.vocabulary, 64, 128, 4, 4)
    for key in ("small_short", "small_long"):
        assert parameters(fast_gpt(text, RECIPE.settings, SHAPES[key])) <= parameters(naive)


def test_the_saved_model_has_the_loss_of_the_table(run):
    model, tokenizer = writer(run)
    test = TEXT[int(0.9 * len(TEXT)) :]
    loss = mean_loss(model, tokens_of(tokenizer, test), 32)
    want = trials.read_results(run)["rows"]["fast_long"]["3"]["loss"]
    assert loss == pytest.approx(want, rel=1e-5)


# -- writing ---------------------------------------------------------------------------------------


def test_greedy_writing_is_the_models_generate(run):
    model, tokenizer = writer(run)
    ids = torch.from_numpy(tokens_of(tokenizer, "10 bottles"))[None]
    want = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    got = "".join(written(model, tokenizer, "10 bottles", tokens=20, temperature=0))
    assert got == tokenizer.decode(want.tolist())


def test_writing_goes_on_beyond_the_positions_and_follows_its_seed(run):
    model, tokenizer = writer(run)

    def text(**how):
        return "".join(written(model, tokenizer, "1", tokens=100, **how))

    assert len(text()) == 100
    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(top_k=1) == text(temperature=0) == text(top_p=1e-6)
    assert len("".join(written(model, tokenizer, TEXT[:500], tokens=3))) == 3


def test_each_new_token_is_that_of_the_tokens_in_sight(run):
    model, tokenizer = writer(run)
    text = list(tokens_of(tokenizer, "10 bottles of beer"))
    begin, start, room = len(text), 0, model.config.max_position_embeddings
    for _ in range(60):
        if len(text) - start > room:
            start = len(text) - room // 2
        ids = torch.tensor([text[start:]])
        text.append(int(model(ids, use_cache=False).logits[0, -1].argmax()))
    got = "".join(written(model, tokenizer, "10 bottles of beer", tokens=60, temperature=0))
    assert got == tokenizer.decode(text[begin:])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"tokens": 0}, "tokens=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(run, how, said):
    with pytest.raises(ModgraftError, match=said):
        next(written(*writer(run), "1", **how))


def test_texts_that_cannot_be_begun_with(run, tmp_path):
    with pytest.raises(ModgraftError, match="needs a text"):
        next(written(*writer(run), ""))
    with pytest.raises(ModgraftError, match=r"line 1: the character 'ß' is none of"):
        next(written(*writer(run), "aß"))
    with pytest.raises(ModgraftError, match="modgraft recipe chargpt --run"):
        writer(tmp_path)


def test_the_command_writes_as_the_function_does(run):
    command = [sys.executable, "-m", "modgraft", "recipe", "chargpt", "--run", str(run), "--sample",
               "10 ", "--tokens", "30", "--seeds", "4", "--top-p", "0.9"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    want = "".join(written(*writer(run), "10 ", tokens=30, top_p=0.9, seed=4))
    assert done.stdout == f"10 {want}\n"
    other = [*command[:4], "madx", *command[5:]]
    done = subprocess.run(other, capture_output=True, text=True)
    assert done.returncode == 1
    assert "write no text; chargpt's do" in done.stderr
