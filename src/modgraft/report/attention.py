"""Show what the fusion attended to: each token's attention over image patches, and its gate."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure as Canvas
from PIL import Image

from modgraft.report.figures import LIGHT, Picture, Scheme, draw, short
from modgraft.report.run import Gate, grid_of

TINT = np.array([217, 108, 0], dtype=np.float64)
"""The colour of attention, RGB; it multiplies the image, so that ink stays visible."""

SPECIAL = {"<pad>", "</s>", "<s>", "<unk>", "<bos>", "<eos>", "[PAD]", "[CLS]", "[SEP]", "[UNK]"}
PADS = {"<pad>", "[PAD]"}
ENLARGE = 12
CHOSEN = 4
LOWEST, HIGHEST = 0.06, 0.9
"""How strongly the page tints the tokens with the smallest and the largest gate."""


@dataclass(frozen=True)
class Token:
    """A token on the page; `strength` is its tint, `spaced` whether a blank precedes it."""

    text: str
    gate: float
    strength: float
    spaced: bool
    chosen: bool


@dataclass(frozen=True)
class AttentionImage:
    """One token's attention over the patches, as an image; `peak` is its largest value."""

    token: Token
    image: str
    peak: float


@dataclass(frozen=True)
class QuestionView:
    """All that the page shows of one question; `picture` has the same in a single figure."""

    seed: int
    gate: Gate
    strip: str
    images: list[AttentionImage]
    tokens: list[Token]
    peak: float
    even: float
    lowest: float
    highest: float
    picture: Picture


def data_uri(png: bytes) -> str:
    """Return PNG bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def enlarged(image: Sequence[Sequence[float]] | np.ndarray) -> str:
    """Return ink [h][w] in 0..1, or RGB [h, w, 3] in 0..255, as the data URI of a large PNG."""
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = _ink_to_grey(pixels)[..., 0]
    out = io.BytesIO()
    large = np.kron(pixels, np.ones((ENLARGE, ENLARGE, 1)[: pixels.ndim]))
    Image.fromarray(large.astype(np.uint8)).save(out, format="png", optimize=True)
    return data_uri(out.getvalue())


def _ink_to_grey(ink: np.ndarray) -> np.ndarray:
    """Convert ink [h, w] in 0..1 to grey on white, [h, w, 3] in 0..255."""
    return np.repeat(255 * (1 - np.clip(ink, 0, 1))[..., None], 3, axis=-1)


def overlay(gate: Gate, token: int, peak: float) -> np.ndarray:
    """Return the image [h, w, 3] in 0..255, tinted by one token's attention; `peak` tints fully."""
    ink = np.asarray(gate.image, dtype=np.float64)  # [h, w]
    height, width = ink.shape
    rows, columns = grid_of(len(gate.attention[token]), height, width, gate.grid)
    heat = np.asarray(gate.attention[token]).reshape(rows, columns)
    # Each pixel takes the value of its patch.
    y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
    strength = (heat / peak if peak > 0 else heat)[np.ix_(y, x)][..., None]  # [h, w, 1]
    return _ink_to_grey(ink) * (1 - strength * (1 - TINT / 255))


def view(seed: int, gate: Gate) -> QuestionView:
    """Prepare one question for the page: tokens with the largest gates, and their attention."""
    plain = [_readable(token) for token in gate.tokens]
    chosen = _choose(gate, [text for text, _ in plain])
    peak = max((max(gate.attention[i]) for i in chosen), default=0.0)
    shown = [i for i, text in enumerate(gate.tokens) if text not in PADS]
    lowest = min((gate.gate[i] for i in shown), default=0.0)
    highest = max((gate.gate[i] for i in shown), default=0.0)
    marked = any(token.startswith(("▁", "Ġ")) for token in gate.tokens)
    span = highest - lowest

    def token(i: int) -> Token:
        share = (gate.gate[i] - lowest) / span if span > 0 else 0.0
        text, spaced = plain[i]
        strength = LOWEST + (HIGHEST - LOWEST) * share
        return Token(text, gate.gate[i], strength, spaced or not marked, i in chosen)

    images = [
        AttentionImage(token(i), enlarged(overlay(gate, i, peak)), max(gate.attention[i]))
        for i in chosen
    ]
    return QuestionView(
        seed, gate, enlarged(gate.image), images, [token(i) for i in shown], peak,
        1 / len(gate.attention[0]), lowest, highest, _draw_sheet(gate, chosen, plain, peak),
    )  # fmt: skip


def _readable(token: str) -> tuple[str, bool]:
    """Return a token's text, and whether a blank precedes it, without the tokenizer's marks."""
    spaced = token.startswith(("▁", "Ġ"))
    text = token.lstrip("▁Ġ").replace("\n", "⏎").replace("Ċ", "⏎")
    return text or "␣", spaced


def _choose(gate: Gate, texts: Sequence[str]) -> list[int]:
    """Choose the `CHOSEN` different tokens with the largest gates, in reading order."""
    chosen: dict[str, int] = {}
    for i in sorted(range(len(texts)), key=lambda i: -gate.gate[i]):
        if gate.tokens[i] not in SPECIAL and texts[i] not in chosen and len(chosen) < CHOSEN:
            chosen[texts[i]] = i
    return sorted(chosen.values())


def _draw_sheet(
    gate: Gate, chosen: Sequence[int], plain: Sequence[tuple[str, bool]], peak: float
) -> Picture:
    images = [("the image", _ink_to_grey(np.asarray(gate.image, dtype=np.float64)))]
    images += [
        (f"“{short(plain[i][0], 12)}”, gate {gate.gate[i]:.2f}", overlay(gate, i, peak))
        for i in chosen
    ]
    n = len(gate.tokens)

    def paint(canvas: Canvas, scheme: Scheme) -> None:
        parts = canvas.add_gridspec(2, len(images), height_ratios=[1, 1.1])
        for place, (title, pixels) in enumerate(images):
            axes = canvas.add_subplot(parts[0, place])
            axes.imshow(pixels.astype(np.uint8), interpolation="nearest")
            axes.set_title(title, fontsize=7.5)
            axes.set_axis_off()
        axes = canvas.add_subplot(parts[1, :])
        axes.bar(range(n), gate.gate, 0.85, color=scheme.series[1])
        axes.set_xticks(range(n), [short(text, 14) for text, _ in plain], rotation=90, fontsize=6.5)
        axes.tick_params(axis="x", length=0, labelcolor=scheme.ink)
        axes.set_xlim(-0.6, n - 0.4)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("gate")

    alt = f"Image, attention and gates of question {gate.id}"
    return draw((max(8.6, 0.13 * n), 3.0), alt, paint, schemes=[LIGHT])
