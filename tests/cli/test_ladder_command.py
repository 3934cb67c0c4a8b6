"""`modgraft ladder` on texts of one's own, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import modgraft as mg
from command import files, modgraft, refused
from modgraft.cli.ladder import number
from modgraft.models.bag import train_wordpiece

GIVEN = ("reviews.csv", "--model", "encoder", "--steps", "9", "--rungs", "nothing,lora_1,full")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small encoder and a table of texts."""
    folder = tmp_path_factory.mktemp("ladder")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 30}
    config = BertConfig(num_attention_heads=2, max_position_embeddings=32, **size)
    BertForSequenceClassification(config).save_pretrained(folder / "encoder")
    words = PreTrainedTokenizerFast(
        tokenizer_object=train_wordpiece(["good bad"], 30), pad_token="[PAD]", unk_token="[UNK]"
    )
    words.save_pretrained(folder / "encoder")
    rows = [f"{i} {word},{word}\n" for i in range(30) for word in ("good", "bad")]
    (folder / "reviews.csv").write_text("text,label\n" + "".join(rows), "utf-8")
    return folder


def test_it_says_which_to_take_and_keeps_it(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    first = modgraft("ladder", *GIVEN)
    assert first.code == 0, first
    assert "3 rungs within the budget, 9 candidates" in first.err
    out = " ".join(first.out.split())
    assert "Take " in out
    assert "On the test examples, looked at once: " in out
    assert "Picture: runs/ladder/plot.png" in out
    folder = made / "runs" / "ladder"
    assert "return(ladder) -> Take " in (folder / "note.md").read_text("utf-8")
    before = files(folder / "fits")
    again = modgraft("ladder", *GIVEN)
    assert again.out == first.out
    assert files(folder / "fits") == before
    report = modgraft("report", folder)
    assert "| rung | parameters |" in report.out
    if found := re.search(r"Module: (\S+)", first.out):
        host = mg.Host(BertForSequenceClassification.from_pretrained("encoder"))
        host.load(found[1])
    other = modgraft("ladder", *GIVEN, "--seed", "1")
    refused(other, "runs/ladder holds another run, no such ladder", "seed: 0, now 1", "--fresh")


def test_a_budget_that_is_too_small(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    result = modgraft("ladder", *GIVEN, "--parameters", "20", "--run", "runs/small")
    said = result.err.splitlines()[-1]
    assert result.code == 1
    assert said.startswith("error: a budget of --parameters 20 is too small for any rung: Nothing")
    assert re.search(r"Give --parameters \d+ or more", said)


def test_what_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    refused(modgraft("ladder", "nowhere.csv"), "nowhere.csv: there is no such file")
    refused(modgraft("ladder", *GIVEN, "--memory", "much"), "--memory much: write a number as")
    refused(modgraft("ladder", *GIVEN, "--by", "seconds"), "it must be one of parameters")
    refused(modgraft("ladder", "reviews.csv", "--model", "nothing-here"), "no pretrained model")
    refused(modgraft("ladder", *GIVEN, "--rungs", "lora"), "no rung is named 'lora'")


def test_numbers() -> None:
    for text, value in {
        "5000": 5000, "100k": 100_000, "1.5M": 1_500_000, "2G": 2 * 10**9, "2GiB": 2 * 2**30,
        "512 MB": 512_000_000, "1Ki": 1024,
    }.items():  # fmt: skip
        assert number(text, "--memory") == value
    assert number(None, "--memory") is None
