from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from modgraft.core.errors import ModgraftError
from modgraft.data.digits import CUT, scans
from modgraft.models.vision import (
    DigitPatches,
    distort,
    load_vision,
    read_strip,
    save_strip,
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
    with pytest.raises(ModgraftError, match=r"\[1, 8, 8\], not \[batch, 8, 24\]"):
        net(torch.zeros(1, 8, 8))


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


@pytest.mark.parametrize("zoom", [1, 7])
@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("name", ["strip.png", "strip.bmp"])
def test_a_strip_survives_a_file_in_either_polarity(tmp_path, zoom, invert, name):
    strip = strips(2)[1]
    save_strip(1 - strip if invert else strip, tmp_path / name, zoom=zoom)
    torch.testing.assert_close(read_strip(tmp_path / name), strip, atol=0.005, rtol=0)


def test_colour_transparency_and_other_modes_are_read(tmp_path):
    strip = strips(1)[0]
    ink = np.rint(255 * strip.numpy()).astype(np.uint8)
    clear = np.zeros((8, 24, 4), np.uint8)
    clear[..., 3] = ink  # black ink on nothing at all
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(255 - ink).convert("RGB").save(tmp_path / "colour.jpg", quality=100)
    Image.fromarray(255 - ink).convert("P").save(tmp_path / "palette.gif")
    for name, tolerance in (("clear.png", 0.005), ("colour.jpg", 0.1), ("palette.gif", 0.1)):
        torch.testing.assert_close(read_strip(tmp_path / name), strip, atol=tolerance, rtol=0)


def test_files_that_cannot_be_read_are_named(tmp_path):
    good = tmp_path / "good.png"
    save_strip(strips(1)[0], good, zoom=20)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:120])
    (tmp_path / "text.png").write_text("a text")
    (tmp_path / "empty.png").touch()
    Image.new("L", (24, 8), 200).save(tmp_path / "blank.png")
    for name, message in {
        "none.png": "the image is missing",
        "cut.png": "a damaged image",
        "text.png": "not an image",
        "empty.png": "not an image",
        "blank.png": "blank",
        "": "the image is missing",
    }.items():
        with pytest.raises(ModgraftError, match=message):
            read_strip(tmp_path / name)
