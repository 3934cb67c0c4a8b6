"""Opens a picture as a person sees it: upright, in range, on a ground, in three colours of 8 bits.

Whatever else converts a file loses something without a word: the rotation that a camera notes
beside the pixels, all but 256 of the 65,536 greys of a scan, what is transparent.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from modgraft.core.errors import DataError, MissingFileError, warn
from modgraft.core.files import is_file


def open_picture(
    path: str | Path, *, ground: str = "white", id: str | None = None, otherwise: str = ""
) -> Image.Image:
    """Read a picture as RGB of 8 bits.

    - It is upright: the orientation that a camera has noted (EXIF, in JPEG, PNG, WebP, TIFF) is
      applied, and its mirrorings.
    - Grey of 16 bits, and of 32 bits or floating point with numbers in the range of 8 or 16 bits
      or from 0 to 1, is brought to 8 bits, and not cut off there.
    - What is transparent shows the ground.
    - Of several frames or pages it is the first, with a warning.
    - A colour profile (ICC) and a gamma are not applied: the file's numbers are taken for sRGB, as
      is usual for vision models. CMYK becomes R = (1 − C)(1 − K), and so on.

    Args:
        path: The file.
        ground: What is behind a transparent picture: a colour as in HTML.
        id: The question that it belongs to, for errors.
        otherwise: What else the user can do where the file cannot be read: "or …".

    Raises:
        MissingFileError: There is no such file.
        DataError: It is damaged, no picture, too large, or its colours are of a kind or in a range
            that is not known.
        ValueError: ``ground`` is no colour.
    """
    path, behind = Path(path), _colour(ground)

    def refused(reason: str, remedy: str, kind: type[DataError] = DataError) -> DataError:
        remedy = ", ".join(filter(None, (remedy, otherwise)))
        return kind(reason, id=id, file=path, remedy=remedy)

    if not is_file(path):
        is_folder = os.path.isdir(path)  # noqa: PTH112, it never raises
        reason = "the image is missing" + (": a folder has its name" if is_folder else "")
        raise refused(reason, "Put it there", MissingFileError)
    try:
        # by its path, Pillow maps a plain TIFF into memory, and turns its pixels but not its sides
        with path.open("rb") as file, Image.open(file) as image:
            greys = _greys_of(image)
            image.load()
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            picture = _on_ground(_in_range(ImageOps.exif_transpose(image), greys), behind)
        with path.open("rb") as file, Image.open(file) as image:
            if image.format == "PNG":
                image.verify()  # by its checksums, which Pillow does not compare when it decodes
    except UnidentifiedImageError as error:
        reason = (
            "not an image, a damaged one, or one of a kind that is not read; PNG, JPEG, WebP, GIF, "
            "TIFF, BMP and PPM are"
        )
        raise refused(reason, "Fetch or save the file again") from error
    except _UnknownColoursError as error:
        raise refused(
            str(error), "Save it in RGB or grey, with 8 or 16 bits a channel, unsigned"
        ) from error
    except Image.DecompressionBombError as error:
        raise refused(f"too large an image ({error})", "Save it with fewer pixels") from error
    except Exception as error:  # of a damaged file, decoders raise what they happen to meet
        raise refused(f"a damaged image ({error})", "Fetch or save the file again") from error
    if frames > 1:
        warn(f"{path} has {frames} frames; the first is read")
    return picture


def _colour(ground: str) -> tuple[int, ...]:
    if not isinstance(ground, str):
        raise ValueError(f"ground={ground!r:.40}: a colour is a text, as 'white' or '#ffffff'")
    return ImageColor.getrgb(ground)


class _UnknownColoursError(Exception):
    """Numbers of which nothing tells what black and white are, or no way to RGB."""


class _Greys(NamedTuple):
    """What a file says of its greys, and Pillow does not apply.

    `white` is the number that is white, None if the format does not fix it; `inverted` is whether
    0 is white instead; `clear` is the one grey that is transparent, in the numbers of the pixels.
    """

    white: int | None
    inverted: bool
    clear: int | None


_DEEP = ("I", "F")
"""The first letters of the modes in which a grey has more than 8 bits."""
_STEP = {"L;2": 85, "L;4": 17}
"""How a file's greys are stored → the step between them when Pillow has spread them to 8 bits."""


def _greys_of(image: Image.Image) -> _Greys:
    """Read what the file says of its greys, before its pixels are loaded."""
    file: Any = image  # its type does not know what a file adds
    tags = getattr(file, "tag_v2", {})
    if tags.get(_SAMPLES, (1,))[0] == _SIGNED and tags.get(_BITS, (1,))[0] <= 16:
        raise _UnknownColoursError(
            "its numbers may be negative (signed ones of 8 or 16 bits), and nothing tells which "
            "of them are black and white"
        )
    if tags.get(_PLANES, 1) == 2 and max(tags.get(_BITS, (1,))) > 8:  # which Pillow mixes up
        raise _UnknownColoursError("its channels of more than 8 bits lie one after another")
    how = file.tile[0].args if file.tile else ""
    stored = how[0] if isinstance(how, tuple) else how
    clear = image.info.get("transparency")
    if stored == "RGB;16B" and isinstance(clear, tuple):  # the pixels are its upper 8 bits
        image.info["transparency"] = tuple(part >> 8 for part in clear)
    is_grey = image.mode in ("1", "L") or image.mode.startswith(_DEEP)
    if not is_grey:
        return _Greys(None, False, None)
    is_pgm = image.format == "PPM" and image.mode == "I"
    white = 4095 if stored == "I;12" else None
    if white is None and (is_pgm or image.mode.startswith("I;16")):
        white = 65535
    inverted = image.mode.startswith(_DEEP) and tags.get(_PHOTOMETRIC) == 0
    return _Greys(white, inverted, clear * _STEP.get(stored, 1) if isinstance(clear, int) else None)


_PHOTOMETRIC = 262
"""The tag of a TIFF that says with 0 that 0 is white."""
_SAMPLES, _SIGNED, _BITS, _PLANES = 339, 2, 258, 284
"""The tags of a TIFF for what its numbers are (with the word for signed ones), for their bits, and
for whether its channels lie one after another."""


def _in_range(image: Image.Image, greys: _Greys) -> Image.Image:
    """Return an image with greys of 8 bits in place of more, and with one clear grey as alpha."""
    is_deep = image.mode.startswith(_DEEP)
    if not is_deep and greys.clear is None:
        return image
    grey = np.asarray(image if is_deep else image.convert("L"), dtype=np.float64)
    white = (greys.white or _white_of(grey, image.mode)) if is_deep else 255
    shown = white - grey if greys.inverted else grey
    scaled = Image.fromarray(np.rint(shown * (255 / white)).astype(np.uint8))
    if greys.clear is not None:
        scaled = scaled.convert("LA")
        scaled.putalpha(Image.fromarray(np.where(grey == greys.clear, 0, 255).astype(np.uint8)))
    return scaled


def _white_of(grey: np.ndarray, mode: str) -> int:
    """Return which of 1, 255 and 65535 is white, as far as numbers of 32 bits can tell."""
    low, high = float(grey.min()), float(grey.max())
    white = 1 if mode == "F" and high <= 1 else 255 if high <= 255 else 65535
    # 0.0 to 3.7 is no dark picture of 8 bits, but light that was measured or computed
    unsure = white > 1 and high <= white / 2 and not np.array_equal(grey, np.rint(grey))
    if not np.isfinite([low, high]).all() or low < 0 or high > white or unsure:
        raise _UnknownColoursError(
            f"the greys of this image go from {low:g} to {high:g}, and nothing tells which is white"
        )
    return white


def _on_ground(image: Image.Image, behind: tuple[int, ...]) -> Image.Image:
    """Return an image as RGB, on a ground where it is transparent."""
    if image.mode == "LAB":
        raise _UnknownColoursError("its colours are of the kind LAB, which is not read")
    if image.mode == "La":  # greys that are multiplied by their alpha: there is one way out
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (*behind[:3], 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
