"""The bag of word pieces with two heads, and its tokenizer."""

from __future__ import annotations

import torch

import modgraft as mg
from modgraft.models.bag import Bag, train_wordpiece


def test_a_bag_has_no_order_and_sees_nothing_special() -> None:
    bag, ids = Bag(40, 16, 2, 3), torch.tensor([[2, 7, 8, 3, 0], [2, 9, 4, 9, 3]])
    out = bag(ids, kinds=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3)
    assert out.loss.isfinite()
    torch.testing.assert_close(bag(torch.tensor([[8, 7]])).logits, out.logits[:1])
    torch.testing.assert_close(bag(torch.tensor([[9, 9]])).logits, out.logits[1:])
    assert bag(torch.tensor([[2, 3]])).logits.isfinite().all()  # nothing at all is seen


def test_the_loss_is_of_the_masked_pieces() -> None:
    bag, ids = Bag(40, 16, 1, 3), torch.tensor([[2, 7, 4, 4, 3], [2, 4, 9, 5, 3]])
    labels = torch.tensor([[-100, -100, 11, 12, -100], [-100, 6, -100, -100, -100]])
    out = bag(ids, labels=labels)
    assert out.logits.shape == (2, 40)
    said = out.logits.log_softmax(-1)
    torch.testing.assert_close(out.loss, -(said[0, 11] + said[0, 12] + said[1, 6]) / 3)


def test_a_language_module_in_its_table_and_a_task_module_behind_it() -> None:
    host = mg.Host(Bag(40, 16, 2, 3)).eval()
    host.implant("fi", mg.SparseDelta(density=0.3), at="table", expect=1, active=False)
    host.implant("kind", mg.SparseDelta(density=0.3), at="blocks.*.up", expect=2, active=False)
    with torch.no_grad():
        for parameter in host.implants.parameters():
            parameter.normal_(0, 0.3)
        ids = torch.tensor([[7, 8, 9]])
        both = host(ids, modules="fi + kind").logits
        torch.testing.assert_close(host.merge("fi + kind")(ids).logits, both)
        for less in ("fi", "kind", None):
            assert not torch.allclose(host(ids, modules=less).logits, both)


def test_the_tokenizer_knows_no_case_accents_or_numbers() -> None:
    made = train_wordpiece(["Zürich 1234 zurich", "1 2 3 4"] * 5, vocab_size=60)
    assert made.encode("ZÜRICH 41,5").tokens[:3] == ["[CLS]", "zurich", "0"]
    assert made.encode("[MASK]").ids[1:-1] == [4]
