"""Strips in pictures: read in any polarity, found with margins, told from what is none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from modgraft.core.errors import ModgraftError
from modgraft.data.digits import CUT, scans
from modgraft.models.strips import Reader, save_strip
from modgraft.models.vision import train_vision


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(train_vision(0, steps=150))


def strips(count: int, digits: int = 3) -> torch.Tensor:
    images, _ = scans()
    picked = images[CUT["val"]][: digits * count].reshape(count, digits, 8, 8)
    return torch.from_numpy(np.concatenate(list(picked.transpose(1, 0, 2, 3)), axis=2))


def found(reader: Reader, path: Path) -> torch.Tensor:
    return reader.find(path, math.inf).ink


@pytest.mark.parametrize("zoom", [1, 7])
@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("name", ["strip.png", "strip.bmp"])
def test_a_strip_survives_a_file_in_either_polarity(reader, tmp_path, zoom, invert, name) -> None:
    strip = strips(2)[1]
    save_strip(1 - strip if invert else strip, tmp_path / name, zoom=zoom)
    torch.testing.assert_close(found(reader, tmp_path / name), strip, atol=0.005, rtol=0)


def test_colour_transparency_and_other_modes_are_read(reader, tmp_path):
    strip = strips(1)[0]
    ink = np.rint(255 * strip.numpy()).astype(np.uint8)
    clear = np.zeros((8, 24, 4), np.uint8)
    clear[..., 3] = ink  # black ink on nothing at all
    Image.fromarray(clear).save(tmp_path / "clear.png")
    Image.fromarray(255 - ink).convert("RGB").save(tmp_path / "colour.jpg", quality=100)
    Image.fromarray(255 - ink).convert("P").save(tmp_path / "palette.gif")
    for name, tolerance in (("clear.png", 0.005), ("colour.jpg", 0.1), ("palette.gif", 0.1)):
        torch.testing.assert_close(found(reader, tmp_path / name), strip, atol=tolerance, rtol=0)


def test_files_that_cannot_be_read_are_named(reader, tmp_path):
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
            reader.find(tmp_path / name, math.inf)


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_a_strip_is_found_whole_and_within_margins(reader, tmp_path: Path, digits: int) -> None:
    path, right = tmp_path / "strip.png", 0
    for number, strip in enumerate(strips(10, digits)):
        save_strip(strip, path, zoom=10)
        whole = reader.find(path, limit=float("inf"))
        torch.testing.assert_close(whole.ink, strip, atol=0.005, rtol=0)
        assert whole.digits == reader.look(strip).digits
        margin = (10 + 3 * number, 25, 40 - 2 * number, 15)
        ImageOps.expand(Image.open(path), margin, fill=255).save(path)
        found = reader.find(path, limit=float("inf"))
        right += found.digits == whole.digits
    assert right >= 8


def test_what_is_no_strip_is_stranger_than_strips(reader) -> None:
    own = [reader.look(strip).strangeness for strip in strips(60)]
    limit = float(np.quantile(own, 0.98))
    rng = torch.Generator().manual_seed(0)
    others = {
        "noise": torch.rand(40, 8, 24, generator=rng),
        "on their side": strips(40).reshape(40, 8, 3, 8).transpose(1, 3).reshape(40, 8, 24),
        "white on black": 1 - strips(40),
        "half a digit aside": strips(40).roll(4, dims=2),
    }
    for name, those in others.items():
        strange = [reader.look(strip).strangeness > limit for strip in those]
        assert np.mean(strange) > 0.9, name


@pytest.mark.parametrize("size", [(40, 240), (900, 60), (5, 200)])
def test_a_picture_of_another_shape_is_as_strange_as_can_be(reader, tmp_path, size) -> None:
    grey = np.random.default_rng(0).integers(0, 255, size[::-1], dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "odd.png")
    assert reader.find(tmp_path / "odd.png", limit=1e9).strangeness == float("inf")


def test_the_strangest_digit_decides(reader) -> None:
    strip = strips(1)[0]
    each = [reader.look(part).strangeness for part in strip.split(8, dim=1)]
    assert reader.look(strip).strangeness == pytest.approx(max(each), rel=1e-4)
