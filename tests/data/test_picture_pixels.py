"""What `open_picture` reads of many kinds of files, against pixels that libvips reads of them.

libvips shares no code with Pillow but, for some formats, the C library that unpacks the bytes. What
it does otherwise than a viewer stands at `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from written_png import write_png

from modgraft.data.picture import open_picture

HEIGHT, WIDTH = 12, 20
GREY = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
ALPHA = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
CLEAR = np.concatenate([COLOUR, ALPHA[..., None]], -1)
DEEP = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
DEEP_COLOUR = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1], DEEP.max() - DEEP], -1)
FEW = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) // 7

vips = pytest.importorskip("pyvips", reason="pyvips is not installed (extra dev)")

Write = Callable[[Path], object]


class Kind(NamedTuple):
    """A kind of file: how to write one, the number that is white in it, how far pixels may be.

    A colour of 16 bits is cut to 8 by Pillow and not rounded; on a ground that may make 2.
    """

    write: Write
    white: float = 255
    near: float = 1.0


def pillow(array: np.ndarray, mode: str = "", **how: Any) -> Write:
    def write(path: Path) -> None:
        image = Image.fromarray(array)
        (image.convert(mode) if mode else image).save(path, **how)

    return write


def turned(orientation: int, **how: Any) -> Write:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return pillow(COLOUR, exif=exif, **how)


def frames(**how: Any) -> Write:
    return pillow(COLOUR, save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))], **how)


def png(bits: int, colour_type: int, values: np.ndarray, key: tuple[int, ...] = ()) -> Write:
    return lambda path: write_png(path, bits, colour_type, values, key)


def by_vips(array: np.ndarray, interpretation: str = "", **how: Any) -> Write:
    def write(path: Path) -> None:
        image = vips.Image.new_from_array(array)
        (image.copy(interpretation=interpretation) if interpretation else image).write_to_file(
            str(path), **how
        )

    return write


LOSSLESS = {"lossless": True, "exact": True}
JPEG = {"quality": 95, "subsampling": 0}
KINDS: dict[str, Kind] = {
    # PNG: greys, colours and palettes of every depth, with every kind of transparency
    "grey1.png": Kind(png(1, 0, FEW % 2)),
    "grey2.png": Kind(png(2, 0, FEW % 4)),
    "grey4.png": Kind(png(4, 0, FEW % 16)),
    "grey8.png": Kind(pillow(GREY)),
    "grey16.png": Kind(png(16, 0, DEEP), 65535),
    "grey1-white-key.png": Kind(png(1, 0, FEW % 2, (1,))),
    "grey2-key.png": Kind(png(2, 0, FEW % 4, (1,))),
    "grey4-key.png": Kind(png(4, 0, FEW % 16, (9,))),
    "grey8-key.png": Kind(pillow(GREY, transparency=int(GREY[3, 4]))),
    "grey16-key.png": Kind(png(16, 0, DEEP, (int(DEEP[3, 4]),)), 65535),
    "grey8-alpha.png": Kind(pillow(CLEAR, "LA")),
    "grey16-alpha.png": Kind(png(16, 4, DEEP_COLOUR[..., :2]), 65535, near=2),
    "rgb8.png": Kind(pillow(COLOUR)),
    "rgb16.png": Kind(png(16, 2, DEEP_COLOUR[..., :3]), 65535),
    "rgb8-key.png": Kind(pillow(COLOUR, transparency=tuple(map(int, COLOUR[3, 4])))),
    "rgb16-key.png": Kind(
        png(16, 2, DEEP_COLOUR[..., :3], tuple(map(int, DEEP_COLOUR[3, 4, :3]))), 65535
    ),
    "rgba8.png": Kind(pillow(CLEAR)),
    "rgba16.png": Kind(png(16, 6, DEEP_COLOUR), 65535, near=2),
    "palette8.png": Kind(pillow(COLOUR, "P")),
    "palette4.png": Kind(pillow(COLOUR, "P", bits=4)),
    "palette-key.png": Kind(pillow(COLOUR, "P", transparency=5)),
    "palette-alpha.png": Kind(pillow(COLOUR, "P", transparency=bytes(range(0, 256, 2)))),
    "optimised.png": Kind(pillow(COLOUR, optimize=True)),
    # JPEG
    "grey.jpg": Kind(pillow(GREY, **JPEG)),
    "rgb.jpg": Kind(pillow(COLOUR, **JPEG)),
    "small-chroma.jpg": Kind(pillow(COLOUR, quality=90, subsampling=2), near=2),
    "progressive.jpg": Kind(pillow(COLOUR, progressive=True, **JPEG)),
    "cmyk.jpg": Kind(pillow(COLOUR, "CMYK", **JPEG), near=2),  # Adobe's: all four are inverted
    # WebP
    "lossy.webp": Kind(pillow(COLOUR, quality=90), near=2),
    "lossless.webp": Kind(pillow(COLOUR, **LOSSLESS)),
    "alpha.webp": Kind(pillow(CLEAR, **LOSSLESS)),
    "lossy-alpha.webp": Kind(pillow(CLEAR, quality=90, exact=True), near=2),
    # TIFF: integers and floating point, compressions, layouts
    "bits.tiff": Kind(pillow(GREY, "1")),
    "fax.tiff": Kind(pillow(GREY, "1", compression="group4")),
    "grey8.tiff": Kind(pillow(GREY)),
    "white-is-0.tiff": Kind(by_vips(GREY, miniswhite=True)),
    "grey16.tiff": Kind(pillow(DEEP), 65535),
    "white-is-0-16.tiff": Kind(by_vips(DEEP, "grey16", miniswhite=True), 65535),
    "grey32.tiff": Kind(pillow(DEEP.astype(np.int32)), 65535),
    "byte32.tiff": Kind(pillow(GREY.astype(np.int32))),
    "unit-float.tiff": Kind(pillow(np.float32(GREY / 255.0)), 1),
    "byte-float.tiff": Kind(pillow(np.float32(GREY))),
    "deep-float.tiff": Kind(pillow(np.float32(DEEP)), 65535),
    "rgb8.tiff": Kind(pillow(COLOUR)),
    "rgb16.tiff": Kind(by_vips(DEEP_COLOUR[..., :3], "rgb16"), 65535),
    "lzw.tiff": Kind(pillow(COLOUR, compression="tiff_lzw")),
    "deflate.tiff": Kind(by_vips(COLOUR, compression="deflate", predictor="horizontal")),
    "jpeg.tiff": Kind(by_vips(COLOUR, compression="jpeg", Q=95), near=2),
    "tiles.tiff": Kind(by_vips(COLOUR, tile=True, tile_width=16, tile_height=16)),
    "big.tiff": Kind(by_vips(COLOUR, bigtiff=True)),
    "rgba.tiff": Kind(pillow(CLEAR)),
    "premultiplied.tiff": Kind(by_vips(CLEAR, premultiply=True), near=2),
    "palette.tiff": Kind(pillow(COLOUR, "P")),
    "cmyk.tiff": Kind(pillow(COLOUR, "CMYK"), near=2),
    # GIF
    "palette.gif": Kind(pillow(COLOUR, "P")),
    "key.gif": Kind(pillow(COLOUR, "P", transparency=5)),
    # what a camera has noted
    **{f"turned{n}.jpg": Kind(turned(n, **JPEG)) for n in range(1, 9)},
    **{f"turned{n}.png": Kind(turned(n)) for n in (3, 6)},
    **{f"turned{n}.webp": Kind(turned(n, **LOSSLESS)) for n in (5, 8)},
    **{f"turned{n}.tiff": Kind(turned(n)) for n in (2, 7)},
}


def reference(path: Path, white: float) -> np.ndarray:
    """Read a picture with libvips: RGB in 0..255 `[h, w, 3]`, on white.

    What libvips gives is the file's numbers; to RGB and on the ground they are brought here, by the
    definitions: libvips itself would convert CMYK by a printer's profile.
    """
    image = vips.Image.new_from_file(str(path)).autorot()
    pixels = image.numpy().reshape(image.height, image.width, -1) / white
    clear = pixels[..., -1:] if image.hasalpha() else np.ones_like(pixels[..., :1])
    colour = pixels[..., :-1] if image.hasalpha() else pixels
    if image.interpretation == "cmyk":
        colour = (1 - colour[..., :3]) * (1 - colour[..., 3:])
    return 255 * (colour * clear + 1 - clear) * np.ones(3)


def test_there_are_many_kinds() -> None:
    assert len(KINDS) >= 60


@pytest.mark.parametrize("name", KINDS)
def test_pixels_are_those_of_libvips(tmp_path: Path, name: str) -> None:
    kind, path = KINDS[name], tmp_path / name
    kind.write(path)
    found = np.asarray(open_picture(path), dtype=float)
    assert np.ptp(found) > 50, "a picture of one colour shows nothing"
    np.testing.assert_allclose(found, reference(path, kind.white), rtol=0, atol=kind.near)
