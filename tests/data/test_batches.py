from __future__ import annotations

import logging
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from modgraft.core.errors import DataError
from modgraft.core.side import Side
from modgraft.data.batches import IGNORE, Collate, Example, QADataset
from modgraft.data.records import Questions
from modgraft.data.text import FORMS
from questions import record

TEXTS = [
    "Question: Context: Options: Answer: Solution: The answer is (A) (B) . N/A w0 w1 w2 w3 w4 "
    "Which one floats? Tom puts three things in water. A bowl of water. (C) a stone cork nail"
]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; the end is put by `Collate`, as this one puts none."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<pad>", "</s>", "<unk>"]
    words.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def collate(batch: list[Example], *arguments: Any, **options: Any) -> dict[str, Any]:
    return Collate(*arguments, **options)(batch)


def example(n: int = 3, features: torch.Tensor | None = None, **changes: Any) -> Example:
    hint = " ".join(f"w{i % 5}" for i in range(n))
    return Example(record("11", **({"hint": hint, "caption": ""} | changes)), features, None)


def test_a_batch_by_hand() -> None:
    one, two = example(1, torch.ones(2, 4), id="x"), example(3, None, id="y")
    batch = collate([one, two], tokenizer(), "QCM-A", max_input=64, max_target=8)
    assert list(batch) == ["input_ids", "attention_mask", "labels", "side", "ids"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.dtype == mask.dtype == batch["labels"].dtype == torch.int64
    words = FORMS["QCM-A"].input(one.record).split()
    assert tokenizer().convert_ids_to_tokens(ids[0].tolist()) == [*words, "</s>", "<pad>", "<pad>"]
    assert mask.tolist() == [[1] * (len(words) + 1) + [0, 0], [1] * (len(words) + 3)]
    assert (batch["labels"][0] == batch["labels"][1]).all()
    assert batch["labels"][0, -1] == tokenizer().eos_token_id
    side = batch["side"]["image"]
    assert isinstance(side, Side)
    assert side.mask is not None
    assert side.tensor.tolist() == [[[1.0] * 4] * 2, [[0.0] * 4] * 2]
    assert side.mask.tolist() == [[True, True], [False, False]]
    assert batch["ids"] == ["x", "y"]


def test_labels_are_padded_with_what_the_loss_leaves_out() -> None:
    batch = [example(solution="a"), example(solution="a a a")]
    labels = collate(batch, tokenizer(), "QCM-EA", max_target=20)["labels"]
    assert labels[0, -2:].tolist() == [IGNORE, IGNORE]
    assert (labels[1] != IGNORE).all()
    wide = collate(batch, tokenizer(), "QCM-EA", max_target=20, pad_labels_to=24)["labels"]
    assert wide.shape == (2, 24)
    assert torch.equal(wide[:, : labels.shape[1]], labels)
    assert (wide[:, labels.shape[1] :] == IGNORE).all()
    with pytest.raises(DataError, match="pad_labels_to=4 is less than max_target=512"):
        Collate(tokenizer(), "QCM-A", pad_labels_to=4)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.data())
def test_padding_never_changes_what_is_not_padding(lengths: list[int], data: st.DataObject) -> None:
    patches = [data.draw(st.integers(0, 3)) for _ in lengths]
    examples = [
        example(n, torch.randn(m, 4) if m else None, solution="a " * n)
        for n, m in zip(lengths, patches, strict=True)
    ]
    together = collate(examples, tokenizer(), "QCM-E", width=4)
    for i, (one, m) in enumerate(zip(examples, patches, strict=True)):
        alone = collate([one], tokenizer(), "QCM-E", width=4)
        n, t = alone["input_ids"].shape[1], alone["labels"].shape[1]
        assert torch.equal(together["input_ids"][i, :n], alone["input_ids"][0])
        assert (together["input_ids"][i, n:] == tokenizer().pad_token_id).all()
        assert together["attention_mask"][i].tolist() == [1] * n + [0] * (
            len(together["input_ids"][i]) - n
        )
        assert torch.equal(together["labels"][i, :t], alone["labels"][0])
        assert (together["labels"][i, t:] == IGNORE).all()
        side = together["side"]["image"]
        assert side.mask[i].sum() == m
        if one.features is not None:
            assert torch.equal(side.tensor[i][side.mask[i]], one.features)
        assert not side.tensor[i][~side.mask[i]].any()


def test_a_batch_without_any_image() -> None:
    side = collate([example(), example()], tokenizer(), "QCM-A", width=4)["side"]["image"]
    assert side.tensor.shape == (2, 1, 4)
    assert not side.mask.any()
    assert "side" not in collate([example()], tokenizer(), "QCM-A")


def test_features_of_another_width() -> None:
    batch = [example(features=torch.ones(2, 4)), example(features=torch.ones(2, 5), id="y")]
    with pytest.raises(
        DataError, match=r"question 'y': features of shape \[2, 5\], expected .* 4\]"
    ):
        collate(batch, tokenizer(), "QCM-A")
    with pytest.raises(DataError, match=r"question '11': .* expected \[patches, 3\]"):
        collate(batch[:1], tokenizer(), "QCM-A", width=3)


def text_of(batch: dict[str, Any]) -> str:
    return tokenizer().decode(batch["input_ids"][0], skip_special_tokens=True)


def test_a_long_context_is_cut_and_the_cue_stays(caplog: pytest.LogCaptureFixture) -> None:
    whole = collate([example(4)], tokenizer(), "QCM-A")
    collator = Collate(tokenizer(), "QCM-A", max_input=whole["input_ids"].shape[1])
    with caplog.at_level(logging.WARNING):
        cut = collator([example(40, id="long")])
        assert collator([example(4, id="fits")])["input_ids"].equal(whole["input_ids"])
        collator([example(41, id="longer")])
    assert torch.equal(cut["input_ids"], whole["input_ids"])  # the first four words are left
    assert collator.cut == {"input": {"long", "longer"}, "target": set()}
    (said,) = caplog.messages  # once, not at every cut
    assert said.startswith("question 'long': input of ")


def test_the_rationale_is_cut_next_from_its_start_then_the_question() -> None:
    short = example(0, hint="", question="w0 w1 w2")
    least = len(collate([short._replace(rationale="")], tokenizer(), "QCMG-A")["input_ids"][0])
    # "N/A", the context of none, is cut too: so there is room for two words of the rationale
    cut = collate(
        [short._replace(rationale="w3 w3 w4 w2")], tokenizer(), "QCMG-A", max_input=least + 1
    )
    assert text_of(cut).startswith("Question: w0 w1 w2 Context: Options:")
    assert text_of(cut).endswith("Solution: w4 w2 Answer:")
    cut = collate([short._replace(rationale="w3")], tokenizer(), "QCMG-A", max_input=least - 3)
    assert text_of(cut).startswith("Question: w0 Context: Options: (A)")
    assert text_of(cut).endswith("Solution: Answer:")


def test_options_are_never_cut() -> None:
    with pytest.raises(DataError, match=r"question '11': its options alone .* max_input=6 .*Raise"):
        collate([example()], tokenizer(), "QCM-A", max_input=6)


def test_a_long_target_loses_its_end_and_is_counted() -> None:
    collator = Collate(tokenizer(), "QCM-E", max_target=3)
    labels = collator([example(solution="a cork is light")])["labels"]
    assert tokenizer().convert_ids_to_tokens(labels[0].tolist())[:2] == ["Solution:", "a"]
    assert labels.shape == (1, 3)
    assert labels[0, -1] != tokenizer().eos_token_id
    assert collator.cut["target"] == {"11"}


def test_options_of_collate() -> None:
    batch = collate([example()], tokenizer(), FORMS["QCM-A"], targets=False, with_ids=False)
    assert list(batch) == ["input_ids", "attention_mask"]
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(DataError, match="no pad token"):
        Collate(bare, "QCM-A")
    assert pickle.loads(pickle.dumps(Collate(tokenizer(), "QCM-A"))).max_input == 512


def questions() -> Questions:
    records = tuple(record("11", id=i) for i in "abc")
    return Questions(records, {"a": torch.ones(2, 4), "c": torch.zeros(1, 4)})


def test_data_set_hands_rationales_over_by_id() -> None:
    data = QADataset(questions(), {"c": "third", "a": "first", "b": "second", "z": "nobody's"})
    assert [(e.record.id, e.rationale) for e in map(data.__getitem__, range(len(data)))] == [
        ("a", "first"),
        ("b", "second"),
        ("c", "third"),
    ]
    assert data[1].features is None
    assert torch.equal(data[0].features, torch.ones(2, 4))
    assert QADataset(questions())[0].rationale is None
    with pytest.raises(
        DataError, match=r"question 'b': there is no rationale for it \(nor 1 other"
    ):
        QADataset(questions(), {"a": "first"})


def test_through_a_loader() -> None:
    loader = DataLoader(
        QADataset(questions()), batch_size=2, collate_fn=Collate(tokenizer(), "QCM-A", width=4)
    )
    one, two = loader
    assert one["ids"] + two["ids"] == ["a", "b", "c"]
    assert two["side"]["image"].mask.tolist() == [[True]]
