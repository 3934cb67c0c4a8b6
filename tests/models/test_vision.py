from __future__ import annotations

import numpy as np
import pytest
import torch

from modgraft.core.errors import ModgraftError
from modgraft.data.digits import CUT, scans
from modgraft.models.vision import (
    DigitPatches,
    distort,
    load_vision,
    positions,
    save_vision,
    train_vision,
)


@pytest.fixture(scope="module")
def net() -> DigitPatches:
    return train_vision(0, steps=120)


def strips(count: int) -> torch.Tensor:
    images, _ = scans()
    picked = images[CUT["val"]][: 3 * count].reshape(count, 3, 8, 8)
    return torch.from_numpy(np.concatenate(list(picked.transpose(1, 0, 2, 3)), axis=2))


def test_a_short_training_already_reads_unseen_digits(net):
    images, labels = (torch.from_numpy(a[CUT["val"]]) for a in scans())
    logits = net.logits(images)  # [300, 4, 10]
    assert (logits.mean(1).argmax(-1) == labels).float().mean() > 0.9
    assert (logits.argmax(-1) == labels[:, None]).float().mean() > 0.9  # every patch by itself


def test_training_is_decided_by_its_seed_and_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    a, b, c = train_vision(1, steps=2), train_vision(1, steps=2), train_vision(2, steps=2)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.head.weight, b.head.weight)
    assert not torch.equal(a.head.weight, c.head.weight)


def test_it_is_frozen_and_in_evaluation_mode(net):
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_patches_are_in_reading_order_over_the_strip(net):
    strip = strips(1)
    before = net.features(strip)
    assert before.shape == (1, 12, 80)
    strip[:, :, 8:16] = 0  # only the middle digit changes
    after = net.features(strip)
    changed = (before - after).abs().amax(-1)[0].reshape(2, 6) > 1e-6
    assert changed.tolist() == [[False, False, True, True, False, False]] * 2
    assert torch.equal(before[..., 64:], after[..., 64:])  # position does not depend on the ink


def test_positions_tell_all_patches_apart(net):
    where = net.features(strips(1))[0, :, 64:]
    assert len({tuple(row.tolist()) for row in where}) == 12
    assert where[:, :3].argmax(-1).tolist() == [0, 0, 1, 1, 2, 2] * 2


def test_features_are_the_same_in_any_batch(net):
    many = strips(7)
    together = net.features(many, batch=3)
    torch.testing.assert_close(together, torch.cat([net.features(s[None]) for s in many]))
    assert net.features(many[:0]).shape == (0, 12, 80)
    assert net.features(many.numpy()).shape == (7, 12, 80)


def test_features_are_of_unit_size_on_the_training_digits(net):
    images, _ = scans()
    rows = net.maps(torch.from_numpy(images[CUT["train"]])).flatten(0, 1)
    spread = ((rows - net.mean) / net.scale).std(0)
    assert float(spread.max()) < 1.01
    assert float(spread.mean()) > 0.5


def test_wrong_shapes_are_named(net):
    for shape in [(1, 7, 24), (1, 8, 20), (8, 24), (1, 8, 0)]:
        with pytest.raises(ModgraftError, match=r"not \[batch, 8, 8 a digit\]"):
            net(torch.zeros(shape))


def test_positions_of_three_digits_are_one_hot_and_others_lie_between():
    digit = torch.tensor([0, 0, 1, 1, 2, 2] * 2)
    one_hot = [torch.eye(3)[digit], torch.eye(12), torch.ones(12, 1)]
    assert torch.equal(positions(3), torch.cat(one_hot, dim=1))
    two, one = positions(2), positions(1)
    assert two[:, :3].tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]] * 2
    assert one[:, :3].tolist() == [[0, 1, 0]] * 4
    assert positions(4)[2, :3].tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    for count in (1, 2, 4):
        rows = positions(count)
        assert rows[:, :3].sum(1).tolist() == pytest.approx([1.0] * 4 * count)
        # a patch lies at its digit's place, in its own quarter of it
        quarter = rows[:, 3:15].reshape(-1, 2, 3, 2).sum(2)
        assert torch.allclose(quarter.sum((1, 2)), torch.ones(4 * count))
        assert len({tuple(row.tolist()) for row in rows}) == 4 * count


def test_a_digit_has_the_features_that_it_has_in_a_strip_of_three(net):
    strip = strips(1)
    for count in (1, 2):
        part = net.features(strip[:, :, : 8 * count])
        whole = net.features(strip).reshape(1, 2, 6, 80)[:, :, : 2 * count]
        torch.testing.assert_close(part[..., :64], whole.reshape(1, -1, 80)[..., :64])


def test_it_is_saved_and_loaded_whole(net, tmp_path):
    save_vision(net, tmp_path / "deep" / "vision.safetensors")
    again = load_vision(tmp_path / "deep" / "vision.safetensors")
    assert torch.equal(net.features(strips(3)), again.features(strips(3)))
    assert not again.training
    with pytest.raises(ModgraftError, match="no such file"):
        load_vision(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ModgraftError, match="not a DigitPatches network"):
        load_vision(tmp_path / "bad.safetensors")


def test_distorted_digits_are_digits_still():
    images, _ = scans()
    digits = torch.from_numpy(images[:64])
    moved = distort(digits, torch.Generator().manual_seed(0))
    assert moved.shape == digits.shape
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert 0.5 < float(moved.mean() / digits.mean()) < 1.5
    assert not torch.equal(moved, digits)
