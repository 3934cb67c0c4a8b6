"""Opens a picture as a person sees it: upright, in range, on a ground, in three colours of 8 bits.

Whatever else converts a file loses something without a word: the rotation that a camera notes
beside the pixels, all but 256 of the 65,536 greys of a scan, what is transparent.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from modgraft.core.errors import DataError, MissingFileError

_DEEP = ("I", "F")
"""The first letters of the modes in which a grey has more than 8 bits."""


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

    Args:
        path: The file.
        ground: What is behind a transparent picture: a colour as in HTML.
        id: The question that it belongs to, for errors.
        otherwise: What else the user can do where the file cannot be read: "or …".

    Raises:
        MissingFileError: There is no such file.
        DataError: It is damaged, no picture, or its numbers are in no range that is known.
        ValueError: ``ground`` is no colour.
    """
    path = Path(path)
    there, again = (
        ", ".join(filter(None, (do, otherwise)))
        for do in ("Put it there", "Fetch or save the file again")
    )
    behind = ImageColor.getrgb(ground)
    if not path.is_file():
        raise MissingFileError("the image is missing", id=id, file=path, remedy=there)
    try:
        with Image.open(path) as image:
            image.load()
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            picture = _in_range(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        reason = "not an image, or a damaged one; PNG, JPEG, WebP, GIF, TIFF and BMP are read"
        raise DataError(reason, id=id, file=path, remedy=again) from error
    except _OutOfRangeError as error:
        save = "Save it with 8 or 16 bits a channel"
        raise DataError(str(error), id=id, file=path, remedy=save) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"a damaged image ({error})", id=id, file=path, remedy=again) from error
    if frames > 1:
        warnings.warn(f"{path} has {frames} frames; the first is read", stacklevel=2)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    ground_of = Image.new("RGBA", picture.size, (*behind[:3], 255))
    return Image.alpha_composite(ground_of, picture.convert("RGBA")).convert("RGB")


class _OutOfRangeError(Exception):
    """Numbers of which nothing tells what black and white are."""


def _in_range(image: Image.Image) -> Image.Image:
    """Return an image with greys of 8 bits in place of more."""
    if not image.mode.startswith(_DEEP):
        return image
    grey = np.asarray(image, dtype=np.float64)
    low, high = float(grey.min()), float(grey.max())
    if not np.isfinite([low, high]).all() or low < 0 or high > 65535:
        raise _OutOfRangeError(f"the greys of this image go from {low:g} to {high:g}")
    if image.mode.startswith("I;16") or high > 255:
        white = 65535
    elif image.mode == "F" and high <= 1:
        white = 1
    else:
        white = 255
    scaled = Image.fromarray(np.rint(grey * (255 / white)).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the one grey that is transparent
        scaled = scaled.convert("LA")
        scaled.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    return scaled
