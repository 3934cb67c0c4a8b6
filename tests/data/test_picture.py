"""A picture is opened as a person sees it, whatever file it is in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modgraft.core.errors import DataError, MissingFileError
from modgraft.data.picture import open_picture

HEIGHT, WIDTH = 12, 20
GREY = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)

# what a viewer does for EXIF orientations 2 to 8, in words of arrays, by the standard's table
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def read(path: Path, **how: str) -> np.ndarray:
    picture = open_picture(path, **how)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_it_is_upright(tmp_path: Path, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(form, {})
    path = tmp_path / f"turned.{form}"
    Image.fromarray(COLOUR).save(path, exif=exif, **how)
    # JPEG loses a little
    stored = np.asarray(Image.open(path).convert("RGB")) if form == "jpg" else COLOUR
    assert np.array_equal(read(path), UPRIGHT[orientation](stored))


def test_deep_greys_are_in_range(tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 257
    for name, stored in {
        "png16.png": deep,
        "tiff16.tiff": deep,
        "tiff32.tiff": deep.astype(np.int32),
        "byte32.tiff": GREY.astype(np.int32),
        "unit.tiff": (GREY / 255).astype(np.float32),
        "byte.tiff": GREY.astype(np.float32),
        "deep.tiff": deep.astype(np.float32),
    }.items():
        path = tmp_path / name
        Image.fromarray(stored).save(path)
        assert np.array_equal(read(path), np.stack([GREY] * 3, -1)), name
    big = tmp_path / "big-endian.tiff"
    Image.frombytes("I;16B", (WIDTH, HEIGHT), deep.astype(">u2").tobytes()).save(big)
    assert np.array_equal(read(big)[..., 0], GREY)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1e6), (0.0, float("nan"))])
def test_numbers_in_no_known_range_are_refused(tmp_path: Path, low: float, high: float) -> None:
    path = tmp_path / "far.tiff"
    Image.fromarray(np.array([[low, high]] * 4, np.float32)).save(path)
    with pytest.raises(DataError, match=r"far.tiff: the greys of this image go from .* 8 or 16 b"):
        open_picture(path)


def shapes() -> tuple[np.ndarray, np.ndarray]:
    """A black square on nothing at all, and how much of it is there."""
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[3:9, 5:15] = 255
    alpha[3:9, 5] = 128
    return np.zeros((HEIGHT, WIDTH, 3), np.uint8), alpha


@pytest.mark.parametrize(("ground", "behind"), [("white", 255), ("black", 0), ("#808080", 128)])
@pytest.mark.parametrize("form", ["png", "webp", "tiff", "la.png"])
def test_what_is_transparent_shows_the_ground(
    tmp_path: Path, form: str, ground: str, behind: int
) -> None:
    ink, alpha = shapes()
    path = tmp_path / f"clear.{form}"
    image = Image.fromarray(np.concatenate([ink, alpha[..., None]], -1))
    image = image.convert("LA") if form == "la.png" else image
    image.save(path, **({"lossless": True, "exact": True} if form == "webp" else {}))
    wanted = np.rint(behind * (1 - alpha / 255.0))
    found = read(path, ground=ground).astype(float)
    assert np.abs(found - wanted[..., None]).max() <= 1


def test_one_colour_that_is_transparent_shows_the_ground(tmp_path: Path) -> None:
    ink, alpha = shapes()
    clear = alpha == 0
    palette = Image.fromarray(np.where(clear, 7, 0).astype(np.uint8))
    palette.putpalette([0, 0, 0] * 256)
    deep = Image.fromarray(np.where(clear, 7, 0).astype(np.uint16))
    for name, image, key in (
        ("palette.png", palette, 7),
        ("palette.gif", palette, 7),
        ("grey.png", Image.fromarray(np.where(clear, 7, 0).astype(np.uint8)), 7),
        ("deep.png", deep, 7),
        ("rgb.png", Image.fromarray(np.where(clear[..., None], 7, ink).astype(np.uint8)), (7,) * 3),
    ):
        image.save(tmp_path / name, transparency=key)
        found = read(tmp_path / name)
        assert np.array_equal(found[..., 0], np.where(clear, 255, 0)), name


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "RGBX"])
def test_other_modes_are_read(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(COLOUR)
    picture = picture.convert(mode)
    path = tmp_path / "other.tiff"
    picture.save(path)
    with Image.open(path) as again:
        assert again.mode == ("RGB" if mode == "RGBX" else mode)
    near = {"1": 255, "P": 60}.get(mode, 4)
    assert np.abs(read(path).astype(int) - COLOUR).max() <= near


def test_the_first_of_several_frames_is_read_and_said(tmp_path: Path) -> None:
    for name in ("film.gif", "film.webp", "film.png", "pages.tiff"):
        frames = [Image.fromarray(np.full((8, 8), grey, np.uint8)) for grey in (10, 200)]
        how = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **how)
        with pytest.warns(UserWarning, match=f"{name} has 2 frames; the first is read"):
            assert np.abs(read(tmp_path / name).astype(int) - 10).max() <= 1


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(COLOUR).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "text.png").write_text("a text")
    for name, words in {"cut.png": "a damaged image", "text.png": "not an image"}.items():
        with pytest.raises(DataError, match=rf"{name}, question '7': {words}.*Fetch or save the f"):
            open_picture(tmp_path / name, id="7")
    with pytest.raises(MissingFileError, match=r"none.png: the image is missing"):
        open_picture(tmp_path / "none.png")
    with pytest.raises(ValueError, match="unknown color"):
        open_picture(good, ground="transparent-ish")
