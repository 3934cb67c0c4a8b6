"""What the judge of ``modgraft mmcot ask`` asks: 200 questions and 100 odd pictures.

None of it is used in training or calibration. The questions stand in ask_questions.txt; the
pictures are drawn here, from fixed seeds, of the test scans, of photographs that ship with
scikit-learn and matplotlib, of a font, and of noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from sklearn.datasets import load_sample_image

from modgraft.data.digits import CUT, scans

QUESTIONS = Path(__file__).with_name("ask_questions.txt")


@dataclass(frozen=True)
class Item:
    """One thing to ask.

    `picture` is None for a question without one; `answer` is the right option's index, and None
    where nothing but a flag is right.
    """

    group: str
    kind: str
    picture: Image.Image | None
    question: str
    options: tuple[str, ...]
    answer: int | None
    hint: str = ""


# -- questions ----------------------------------------------------------------------------------


def questions() -> list[Item]:
    """Return the 200 questions worded anew, each with its strip."""
    rng, items, kind = np.random.default_rng(16), [], ""
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        if line.startswith("# -- "):
            kind = line.removeprefix("# -- ")
        if not line or line.startswith("#"):
            continue
        strip, question, options, right, *hint = (part.strip() for part in line.split(" | "))
        choices = tuple(option.strip() for option in options.split(","))
        answer = None if right == "-" else choices.index(_written(right, choices))
        group = "questions to flag" if answer is None else "questions to answer"
        picture = None if strip == "-" else picture_of(ink(strip, rng), 10)
        items.append(Item(group, kind, picture, question, choices, answer, "".join(hint)))
    return items


def _written(right: str, choices: tuple[str, ...]) -> str:
    """Return how the options write a code or a number: "Q" or "q", "7" or "seven"."""
    if not right.isdecimal():
        return right if right in choices else right.lower()
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return right if right in choices else words[int(right)]


# -- pictures -----------------------------------------------------------------------------------


def ink(digits: str, rng: np.random.Generator) -> np.ndarray:
    """Return test scans of these digits side by side, float32 [8, 8n] in 0..1, ink high."""
    images, labels = scans()
    where = np.arange(len(labels))[CUT["test"]]
    rows = [images[rng.choice(where[labels[where] == int(d)])] for d in digits]
    return np.concatenate(rows, axis=1)


def picture_of(strip: np.ndarray, zoom: int) -> Image.Image:
    """Draw a strip black on white, every pixel as a square."""
    grey = np.rint(255 * (1 - strip)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.kron(grey, np.ones((zoom, zoom), np.uint8)))


def pictures() -> list[Item]:
    """Return the 100 odd pictures, each with a question in DigitsQA's own words."""
    items = []
    for number, (kind, count, draw) in enumerate(_KINDS):
        for index in range(count):
            rng = np.random.default_rng([16, number, index])
            picture, digits = draw(rng, index)
            question, options, answer = _asked(rng, index, digits)
            group = "pictures to flag" if answer is None else "pictures to answer"
            items.append(Item(group, kind, picture, question, options, answer))
    return items


def _asked(
    rng: np.random.Generator, index: int, digits: str | None
) -> tuple[str, tuple[str, ...], int | None]:
    """Ask for the left or right digit, their sum or the larger; four options."""
    shown = digits or "".join(map(str, rng.integers(10, size=3)))
    left, right = int(shown[0]), int(shown[-1])
    kinds = [("What is the left digit?", left), ("What is the right digit?", right)]
    if len(shown) > 1:
        kinds += [("What is left plus right?", left + right)]
        kinds += [("Which digit is larger, left or right?", max(left, right))]
    question, value = kinds[index % len(kinds)]
    others = [v for v in rng.permutation(19 if "plus" in question else 10) if v != value]
    options = [str(v) for v in rng.permutation([value, *others[:3]])]
    return question, tuple(options), None if digits is None else options.index(str(value))


Drawn = tuple[Image.Image, str | None]
"""A picture, and the digits that a person reads in it; None where they are none, or not a strip."""


def _strip(rng: np.random.Generator, count: int = 3, of: str = "0123456789") -> tuple[str, Drawn]:
    digits = "".join(rng.choice(list(of), size=count))
    return digits, (picture_of(ink(digits, rng), 10), digits)


@cache
def _photographs() -> list[Image.Image]:
    with get_sample_data("grace_hopper.jpg") as file:
        hopper = Image.open(file).convert("L")
    found = [Image.fromarray(load_sample_image(n)) for n in ("china.jpg", "flower.jpg")]
    return [*(photograph.convert("L") for photograph in found), hopper]


def _photograph(rng: np.random.Generator, index: int) -> Drawn:
    whole = _photographs()[index % 3]
    high = int(rng.integers(40, 140))
    wide = high * (3 if index % 4 else 1)  # most have a strip's shape
    x, y = rng.integers(whole.width - wide), rng.integers(whole.height - high)
    return whole.crop((x, y, x + wide, y + high)), None


def _noise(rng: np.random.Generator, index: int) -> Drawn:
    small = (8, 24) if index % 2 else (80, 240)
    grey = (255 * rng.random(small)).astype(np.uint8)
    picture = Image.fromarray(grey)
    return (picture if index % 3 else picture.filter(ImageFilter.GaussianBlur(2))), None


def _almost_blank(rng: np.random.Generator, index: int) -> Drawn:
    picture = Image.new("L", (240, 80), 255)
    if index:
        x, y = (int(v) for v in rng.integers(10, 60, 2))
        ImageDraw.Draw(picture).ellipse((x, y, x + 6 * index, y + 6 * index), fill=0)
    return picture, None


def _shapes(rng: np.random.Generator, index: int) -> Drawn:
    picture = Image.new("L", (240, 80), 255)
    pen, x = ImageDraw.Draw(picture), int(rng.integers(5, 25))
    for k in range(3):
        box = (80 * k + x, 15, 80 * k + x + 45, 65)
        match index:
            case 0:
                pen.rectangle(box, fill=0)
            case 1:
                pen.line((box[0], 40, box[2], 40), fill=0, width=8)
            case 2:
                pen.polygon([(box[0], 65), (box[2], 65), (box[0] + 22, 15)], outline=0, width=7)
            case 3:
                pen.line(box, fill=0, width=7)
                pen.line((box[0], 65, box[2], 15), fill=0, width=7)
            case 4:
                pen.rectangle(box, outline=0, width=6)
            case _:
                pen.line((0, 70 - 30 * k, 240, 50 - 20 * k), fill=0, width=5)
    return picture, None


def _writing(rng: np.random.Generator, text: str, size: int = 64, margin: int = 6) -> Image.Image:
    font = Path(matplotlib.get_data_path(), "fonts", "ttf")
    name = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono-Bold.ttf")[int(rng.integers(3))]
    letters = ImageFont.truetype(str(font / name), size)
    x0, y0, x1, y1 = (int(v) for v in letters.getbbox(text))
    picture = Image.new("L", (x1 - x0 + 2 * margin, y1 - y0 + 2 * margin), 255)
    ImageDraw.Draw(picture).text((margin - x0, margin - y0), text, fill=0, font=letters)
    return picture


def _words(rng: np.random.Generator, index: int) -> Drawn:
    text = ("CAT", "dog", "hello world", "A B C", "xyz", "modgraft", "#&%", "Hmm", "Q?!")[index]
    return _writing(rng, text), None


def _print(rng: np.random.Generator, index: int) -> Drawn:
    digits = "".join(map(str, rng.integers(10, size=3)))
    return _writing(rng, digits), digits


def _count(count: int) -> Callable[[np.random.Generator, int], Drawn]:
    return lambda rng, index: _strip(rng, count)[1]


def _changed(
    change: Callable[[Image.Image, np.random.Generator], Image.Image], of: str = "0123456789",
    readable: bool = True,
) -> Callable[[np.random.Generator, int], Drawn]:  # fmt: skip
    def draw(rng: np.random.Generator, index: int) -> Drawn:
        digits, (picture, _) = _strip(rng, of=of)
        return change(picture, rng), digits if readable else None

    return draw


def _margin(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.expand(picture, tuple(int(v) for v in rng.integers(5, 70, 4)), fill=255)


def _size(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    wide, high = int(rng.integers(60, 400)), int(rng.integers(20, 130))
    return picture.resize((max(wide, 2 * high), high), Image.Resampling.BICUBIC)


def _noisy(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    grey = np.asarray(picture, float) + 40 * rng.standard_normal((picture.height, picture.width))
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def _two_rows(rng: np.random.Generator, index: int) -> Drawn:
    above, below = (_strip(rng)[1][0] for _ in range(2))
    both = Image.new("L", (above.width, 2 * above.height), 255)
    both.paste(above, (0, 0))
    both.paste(below, (0, above.height))
    return both, None


_KINDS: tuple[tuple[str, int, Callable[[np.random.Generator, int], Drawn]], ...] = (
    ("photograph", 12, _photograph),
    ("noise", 9, _noise),
    ("blank, or almost", 4, _almost_blank),
    ("shapes", 6, _shapes),
    ("words in print", 9, _words),
    ("on its side", 4, _changed(lambda p, _: p.rotate(90, expand=True), readable=False)),
    ("upside down", 4, _changed(lambda p, _: p.rotate(180), of="23457", readable=False)),
    ("mirrored", 3, _changed(lambda p, _: ImageOps.mirror(p), of="2345679", readable=False)),
    ("upper half", 4, _changed(lambda p, _: p.crop((0, 0, 240, 40)), readable=False)),
    ("two rows", 4, _two_rows),
    ("one digit", 6, _count(1)),
    ("two digits", 4, _count(2)),
    ("four digits", 6, _count(4)),
    ("margins", 7, _changed(_margin)),
    ("other size", 5, _changed(_size)),
    ("inverted", 3, _changed(lambda p, _: ImageOps.invert(p))),
    ("turned by 8 degrees", 2, _changed(lambda p, _: p.rotate(8, fillcolor=255))),
    ("faint", 2, _changed(lambda p, _: p.point(lambda v: 170 + v // 6))),
    ("noisy", 2, _changed(_noisy)),
    ("digits in print", 4, _print),
)


def items() -> Iterator[Item]:
    """Yield all 300."""
    yield from questions()
    yield from pictures()
