"""LinearMap puts tokens before the text: labels, positions, cache and beams stay right."""

from __future__ import annotations

import pytest
import torch

import modgraft as mg
from contract.hosts import BATCH, FEATURES, HOSTS, HostCase, side
from contract.written_out import linear_map_by_hand

TEXT = [case for case in HOSTS.values() if case.text]
pytestmark = pytest.mark.parametrize("case", TEXT, ids=[c.name for c in TEXT])


def mapped(case: HostCase, tokens_each: int = 2) -> mg.Host:
    host = mg.Host(case.model()).eval()
    host.implant("eye", mg.LinearMap(dim=FEATURES, tokens_each=tokens_each))
    return host


@torch.no_grad()
def test_tokens_stand_before_the_text(case: HostCase) -> None:
    host = mapped(case)
    out = host(**case.batch(), side={"image": side()}).logits
    expected = linear_map_by_hand(host, case, at=1 if case.name == "bert" else 0)
    seen = case.seen()
    torch.testing.assert_close(out[seen], expected[seen])
    length = case.batch()["labels" if case.name == "t5" else "input_ids"].shape[1]
    assert out.shape[1] == length  # the output has no positions for the tokens


@torch.no_grad()
def test_an_absent_image_changes_nothing_that_is_seen(case: HostCase) -> None:
    host = mapped(case)
    out = host(**case.batch(), side={"image": side()}).logits
    bare = host(**case.batch(), modules=None).logits
    mask = case.batch()["attention_mask"][1].bool()
    rows = slice(None) if case.name == "t5" else mask
    torch.testing.assert_close(out[1][rows], bare[1][rows], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out[0], bare[0])


def test_labels_of_the_tokens_are_left_out_of_the_loss(case: HostCase) -> None:
    host = mapped(case)
    batch = case.batch()
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, 3:] = -100
    out = host(**batch, side={"image": side()})
    shift = case.name in ("gpt2", "llama")
    logits, labels = out.logits, batch["labels"]
    if shift:
        # the first text token is predicted from the last soft token, which the loss does see
        with torch.no_grad():
            assert torch.isfinite(out.loss)
    else:
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
        torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in host["eye"].parameters())


@torch.no_grad()
def test_generation_with_cache_and_beams(case: HostCase) -> None:
    if not case.generates:
        pytest.skip(f"{case.name} does not generate")
    host = mapped(case)
    batch = case.batch()
    batch.pop("labels", None)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5}
    for beams in (1, 3):
        out = host.generate(**batch, side={"image": side()}, num_beams=beams, **settings)
        for i in range(BATCH):
            one = {k: v[i : i + 1] for k, v in batch.items()}
            given = mg.Side(side().tensor[i : i + 1], side().mask[i : i + 1])
            alone = host.generate(**one, side={"image": given}, num_beams=beams, **settings)
            assert torch.equal(alone[0], out[i])
    bare = host.generate(**batch, modules=None, **settings)
    start = 0 if case.name == "t5" else batch["input_ids"].shape[1]
    assert torch.equal(out[1][-5:], bare[1][start:][-5:]) or beams == 3
    direct = host.model.generate  # the model itself, in the composition in force, is as loud
    with pytest.raises(mg.ModgraftError, match="needs the side input"):
        direct(**batch, **settings)


def test_refusals(case: HostCase) -> None:
    host = mapped(case)
    with pytest.raises(mg.ModgraftError, match="cannot be added or scaled"):
        host.use("0.5*eye")
    with pytest.raises(mg.ModgraftError, match="needs the side input"):
        host(**case.batch())
    with pytest.raises(mg.ModgraftError, match="at the host's input"):
        host.implant("again", mg.LinearMap(dim=FEATURES), at="query")
    host.implant("twice", mg.LinearMap(dim=FEATURES))
    host.use("twice >> eye")
    host(**case.batch(), side={"image": side()})
    host.remove("eye")
    host.remove("twice")
    assert type(host.model) is type(case.model())
