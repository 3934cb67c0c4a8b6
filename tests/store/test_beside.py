"""A part of the host that trained with a module, such as a head, is saved and loaded with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import modgraft as mg
from common import forge, kept

CONFIG: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
HEAD = {":classifier.weight", ":classifier.bias"}


def fresh(head: int = 1, labels: int = 4) -> mg.Host:
    """Make a pretrained encoder with a head that is drawn anew in every process."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**CONFIG, num_labels=labels))
    torch.manual_seed(head)
    with torch.no_grad():
        model.classifier.weight.normal_(0, 0.5)
    return mg.Host(model).eval()


def batch(shift: int = 0) -> dict[str, Tensor]:
    """Texts whose class is their first word."""
    ids = torch.randint(4, 40, (64, 6), generator=torch.Generator().manual_seed(3))
    labels = (ids[:, 1] + shift) % 4
    return {"input_ids": ids, "labels": labels}


def accuracy(host: mg.Host, **given: Any) -> float:
    with torch.no_grad():
        found = host(input_ids=batch()["input_ids"]).logits.argmax(-1)
    return (found == batch(**given)["labels"]).float().mean().item()


def trained(name: str = "qa", **given: Any) -> mg.Host:
    host = fresh()
    host.implant(name, mg.LoRA(rank=4), at=["query", "value", "up", "down"])
    host.fit([batch(**given)], train=[name, "host.classifier"], steps=90, lr=3e-2, progress=False)
    return host


def test_a_head_is_saved_and_loaded_with_its_module(tmp_path: Path) -> None:
    host = trained()
    right = accuracy(host)
    assert right > 0.7  # chance is a quarter
    host.save("qa", tmp_path / "qa")
    assert kept(tmp_path / "qa").keys() > HEAD
    for strict in (True, False):  # the same host, but for the head
        other = fresh(head=2)
        before = {k: v.clone() for k, v in other.model.state_dict().items()}
        other.load(tmp_path / "qa", strict=strict)
        assert accuracy(other) == right
        other.save("qa", tmp_path / "again")  # it still belongs to the module
        assert kept(tmp_path / "again").keys() > HEAD
        other.load(tmp_path / "qa", name="twice")
        other.remove("qa")
        assert accuracy(other) == right
        other.remove("twice")
        assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())


def test_a_part_that_requires_a_gradient_is_saved_too(tmp_path: Path) -> None:
    """In a loop of one's own nobody names what trains."""
    host = fresh()
    host.implant("qa", mg.LoRA(rank=2), at="query")
    host.save("qa", tmp_path / "alone")
    assert HEAD.isdisjoint(kept(tmp_path / "alone"))
    host.model.classifier.requires_grad_(True)
    host.save("qa", tmp_path / "qa")
    assert kept(tmp_path / "qa").keys() > HEAD
    host.model.requires_grad_(True)  # another host, and not a part of one
    host.save("qa", tmp_path / "whole")
    assert HEAD.isdisjoint(kept(tmp_path / "whole"))


def test_two_heads_for_one_place_are_refused(tmp_path: Path) -> None:
    trained("qa").save("qa", tmp_path / "qa")
    trained("nli", shift=1).save("nli", tmp_path / "nli")
    host = fresh(head=2)
    host.load(tmp_path / "qa")
    right = accuracy(host)
    with pytest.raises(mg.ModgraftError, match=r"host's classifier\.bias, and so was 'qa' here"):
        host.load(tmp_path / "nli")
    assert "nli" not in host
    assert accuracy(host) == right
    host.remove("qa")
    host.load(tmp_path / "nli")
    assert accuracy(host, shift=1) > 0.6


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    trained().save("qa", tmp_path / "qa")
    host = fresh(labels=3)
    with pytest.raises(mg.ModgraftError, match=r"another host \(shape, .*num_labels"):
        host.load(tmp_path / "qa", strict=False)
    forge(tmp_path / "qa", {k: t for k, t in kept(tmp_path / "qa").items() if k not in HEAD})
    with pytest.raises(mg.ModgraftError, match="is not there in the folder"):
        fresh().load(tmp_path / "qa")
    assert not list(host.implants)


def test_a_head_that_was_trained_alone_before_belongs_to_what_learns_on_it(tmp_path: Path) -> None:
    host = fresh()
    host.fit([batch()], train="host.classifier", steps=3, lr=3e-2, progress=False)
    host.implant("qa", mg.LoRA(rank=2), at="query")
    host.implant("none", mg.LoRA(rank=2), at="query", active=False)
    host.fit([batch()], train="qa", steps=3, lr=3e-2, progress=False)
    host.save("qa", tmp_path / "qa")
    other = fresh(head=2)
    other.load(tmp_path / "qa")
    with torch.no_grad():
        assert torch.equal(other(**batch()).logits, host(**batch()).logits)
    host.save("none", tmp_path / "none")
    assert HEAD.isdisjoint(kept(tmp_path / "none"))


def test_another_host_is_told_by_name_and_by_how_much(tmp_path: Path) -> None:
    host = fresh()
    host.implant("qa", mg.LoRA(rank=2), at="query")
    host.save("qa", tmp_path / "qa")  # and not its head, which was made elsewhere
    other = fresh(head=2)
    other.model.bert.embeddings.LayerNorm.weight.data.mul_(1.25)
    with pytest.raises(mg.ModgraftError, match="another host"):
        other.load(tmp_path / "qa")
    with pytest.warns(UserWarning, match="qa is loaded into another host") as said:
        other.load(tmp_path / "qa", strict=False)
    text = str(said[0].message)
    found = re.findall(r"([\w.]+) by ([\d.]+) %", text)
    assert [name for name, _ in found] == [
        "classifier.weight", "bert.embeddings.LayerNorm.weight",
    ]  # fmt: skip
    assert 90 < float(found[0][1]) <= 200
    assert float(found[1][1]) == pytest.approx(20, abs=0.1)
    assert "train=['qa', 'host.classifier']" in text
    other.save("qa", tmp_path / "again")
    with pytest.warns(UserWarning, match="another host"):  # and of what is saved here
        fresh(head=3).load(tmp_path / "again", strict=False)


@pytest.mark.parametrize(("form", "whose"), [("peft", "PEFT"), ("adapterhub", "adapters")])
def test_a_head_that_another_tools_folder_lacks_is_named(
    tmp_path: Path, form: str, whose: str
) -> None:
    """Neither tool keeps anything that tells one head from another."""
    host = fresh()
    host.implant("qa", mg.LoRA(rank=4), at=["query", "value"])
    with pytest.warns(
        UserWarning, match=r"classifier.bias, classifier.weight .* 'host.classifier'"
    ):
        host.save("qa", tmp_path / "qa", format=form)
    with pytest.warns(UserWarning, match=r"does not hold classifier.bias, class") as said:
        fresh(head=2).load(tmp_path / "qa")
    assert [each.filename for each in said] == [__file__]
    whole = trained()  # with its head, nothing is lacking
    whole.save("qa", tmp_path / whose, format=form)
    fresh(head=2).load(tmp_path / whose)


def test_the_names_of_classes_are_kept_with_a_head(tmp_path: Path) -> None:
    host = trained()
    names = dict(enumerate("abcd"))
    host.model.config.id2label = names  # type: ignore[union-attr]
    host.save("qa", tmp_path)
    for here, said in ((None, "are not named"), (dict(enumerate("dcba")), r"\['d', 'c', 'b', 'a'")):
        other = fresh()
        if here is not None:
            other.model.config.id2label = here  # type: ignore[union-attr]
        with pytest.warns(UserWarning, match=rf"\['a', 'b', 'c', 'd'\], and .*{said}") as told:
            other.load(tmp_path)
        assert [each.filename for each in told] == [__file__]
    same = fresh()
    same.model.config.id2label = names  # type: ignore[union-attr]
    same.load(tmp_path)
