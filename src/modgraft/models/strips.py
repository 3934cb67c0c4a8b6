"""Pictures of strips of digits: written, found in an image file, and told from other pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modgraft.core.errors import DataError
from modgraft.data.digit_wordings import PLACES
from modgraft.data.digits import CUT, scans
from modgraft.data.picture import open_picture
from modgraft.models.vision import DigitPatches, distort, tiles

LEAST_CONTRAST = 0.02
"""The range of greys, of 0..1, below which a picture is blank."""


def save_strip(strip: np.ndarray | Tensor, path: str | Path, *, zoom: int = 1) -> None:
    """Save a strip [8, 8n] in 0..1, where 1 is ink, as an image file, black on white, enlarged."""
    grey = np.rint(255 * (1 - np.asarray(strip))).clip(0, 255).astype(np.uint8)
    Image.fromarray(np.kron(grey, np.ones((zoom, zoom), np.uint8))).save(path)


def _grey(path: str | Path) -> Image.Image:
    return open_picture(path).convert("L").convert("F")


def _as_strip(grey: Image.Image, count: int, path: str | Path) -> Tensor:
    """Return a picture as a strip [8, 8 count]: averaged, stretched to 0..1, where 1 is ink.

    The less frequent of dark and light is taken for ink.

    Raises:
        DataError: The picture is blank.
    """
    small = grey.resize((8 * count, 8), Image.Resampling.BOX)
    strip = torch.from_numpy(np.array(small) / 255.0)
    low, high = float(strip.min()), float(strip.max())
    if math.isclose(low, high, abs_tol=LEAST_CONTRAST):
        raise DataError("the image is blank", file=path, remedy="Pass an image of digits")
    strip = ((strip - low) / (high - low)).float()
    return 1 - strip if float(strip.mean()) > 0.5 else strip


@dataclass(frozen=True)
class Strip:
    """A strip as it was found in a picture.

    Attributes:
        ink: Float32 [8, 8n] in 0..1, 1 is ink.
        digits: What the eye reads, from left to right.
        strangeness: How far the strangest of its digits is from those that the eye was trained on.
    """

    ink: Tensor
    digits: tuple[int, ...]
    strangeness: float


@dataclass(frozen=True)
class Reader:
    """Reads strips with a trained eye, and measures how strange they are to it.

    The strangeness of a digit is its squared Mahalanobis distance from the nearest class of the
    training digits, whole and distorted, in the space of the eye's maps, [256], with one
    covariance for all classes (Lee et al. 2018, arXiv:1807.03888).
    """

    eye: DigitPatches

    @cached_property
    def _classes(self) -> tuple[Tensor, Tensor]:
        """The means of the classes, [10, 256], and the inverse of their covariance."""
        images, labels = (torch.from_numpy(a[CUT["train"]]) for a in scans())
        generator = torch.Generator().manual_seed(0)
        many = torch.cat([images, *(distort(images, generator) for _ in range(4))])
        maps, labels = self.eye.maps(many).flatten(1), labels.repeat(5)
        means = torch.stack([maps[labels == digit].mean(0) for digit in range(10)])
        left = maps - means[labels]
        covariance = left.T @ left / len(left)
        # a direction in which training digits do not vary must not decide alone
        covariance += 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
        return means, torch.linalg.inv(covariance)

    @cached_property
    def _least_ink(self) -> float:
        """Half as much ink as the faintest training digit has."""
        return float(scans()[0][CUT["train"]].sum((1, 2)).min()) / 2

    @torch.no_grad()
    def strangeness(self, digits: Tensor) -> Tensor:
        """Return how strange digits [N, 8, 8] are, [N]."""
        means, inverse = self._classes
        away = self.eye.maps(digits).flatten(1)[:, None] - means  # [N, 10, 256]
        return torch.einsum("ncd,de,nce->nc", away, inverse, away).amin(1)

    @torch.no_grad()
    def look(self, ink: Tensor) -> Strip:
        """Read a strip [8, 8n]."""
        (digits,) = tiles(ink[None])
        read = self.eye.logits(digits).mean(1).argmax(-1)
        strange = float(self.strangeness(digits).max())
        if float(digits.sum((1, 2)).min()) < self._least_ink:  # a place that is blank
            strange = math.inf
        return Strip(ink, tuple(read.tolist()), strange)

    def find(self, path: str | Path, limit: float) -> Strip:
        """Find the strip in a picture: one to four digits, with or without a margin.

        A picture whose sides are exactly n to 1 is a strip of n digits, unless that one is stranger
        than `limit`. Otherwise all places where a strip could lie are looked at, and the one that
        is the least strange is taken. A picture that is too narrow or too wide for a strip is
        infinitely strange.

        Raises:
            DataError: The file is missing, damaged, not an image, or blank.
        """
        grey = _grey(path)
        ratio = grey.width / grey.height
        exact = round(ratio)
        seen = []
        if exact in PLACES and math.isclose(ratio, exact, rel_tol=0.02):
            seen = [self.look(_as_strip(grey, exact, path))]
            if seen[0].strangeness <= limit:
                return seen[0]
        _as_strip(grey, 3, path)  # a blank one is an error
        seen += [self.look(ink) for ink in _strips(grey, path)]
        if not seen:  # too narrow or too wide for any strip: what the eye reads there is nothing
            count = min(PLACES, key=lambda n: abs(math.log(ratio / n)))
            return replace(self.look(_as_strip(grey, count, path)), strangeness=math.inf)
        return min(seen, key=lambda strip: strip.strangeness)


def _strips(grey: Image.Image, path: str | Path) -> Iterator[Tensor]:
    """Yield every strip that a picture could be: whole, and cut to its ink."""
    for count in PLACES:
        if 0.7 < grey.width / grey.height / count < 1.4:
            yield _as_strip(grey, count, path)
    light = np.asarray(grey)
    ink = (light - light.min()) / (light.max() - light.min())
    ink = 1 - ink if ink.mean() > 0.5 else ink
    rows, columns = (np.flatnonzero((ink > 0.5).any(axis)) for axis in (1, 0))
    top, bottom, first, last = (
        int(i) for i in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
    )
    high, wide, inked = bottom - top, last - first, Image.fromarray(np.float32(255 * ink))
    for count in PLACES:
        room = count * high - wide  # digits fill their rows, but not their columns
        if -0.1 * high <= room <= 0.8 * high:
            for left in np.linspace(0, max(room, 0), 1 + max(0, round(16 * room / high))):
                x = round(first - left)
                box = (x, top, x + max(count * high, wide), bottom)
                yield _as_strip(inked.crop(box), count, path)  # outside it is paper, 0
