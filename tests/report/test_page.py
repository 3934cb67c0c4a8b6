"""The page: complete, self-contained, escaped, and seen in a browser where there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modgraft.report import write
from modgraft.report.attention import overlay, view
from modgraft.report.run import Gate
from modgraft.report.wrong_answers import Piece, differences

VOID = {"meta", "link", "img", "source", "br"}
EVIL = "<script>alert('x')</script> & \"q\" {{ 7 * 7 }} $x_1$ 漢"


class Reader(HTMLParser):
    """Collects what a page would load, and checks that its elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [v or "" for k, v in attrs if k in {"src", "srcset", "href", "action"}]

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"li"}:
            while self.open[-1] == "li" and tag != "li":
                self.open.pop()
        assert self.open.pop() == tag


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text("utf-8"))
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def page(full_run: Path) -> Path:
    return write(full_run)


def test_the_page_needs_nothing_else(page: Path) -> None:
    reader = read(page)
    assert all(load.startswith(("data:", "#")) for load in reader.loads)
    assert "script" not in reader.tags
    text = page.read_text("utf-8")
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_every_figure_is_a_png_beside_the_page(page: Path) -> None:
    names = {path.name for path in page.parent.glob("*.png")}
    assert {"results.png", "columns.png", "families.png", "loss-answer.png"} <= names
    assert len([name for name in names if name.startswith("gate-0-")]) == 4
    for name in names:
        with Image.open(page.parent / name) as image:
            assert image.width > 600
    assert not list(page.parent.glob("*.new"))


def test_the_page_says_what_matters(page: Path) -> None:
    text = page.read_text("utf-8")
    for piece in ("Two stages, fused", "2026-03-14 15:09 UTC", "Controls (not competitors)",
                  'class="leak"', "Teacher-forced rationale", "Chance", "sample standard deviation",
                  "not measured: G7-12", "Option mapping", "✓ right", "✗ chosen",
                  "<mark>"):  # fmt: skip
        assert piece in text, piece
    assert "Not run." not in text


def test_everything_is_escaped(small_run: Path) -> None:
    results = json.loads((small_run / "results.json").read_text())
    results["name"] = results["created"] = EVIL
    results["settings"] = {EVIL: EVIL}
    for row in results["rows"]:
        row["title"] = row["note"] = EVIL
        for metrics in row["seeds"].values():
            metrics["families"] = {EVIL: 50.0}
            metrics["errors"] = {EVIL: 3}
    (small_run / "results.json").write_text(json.dumps(results))
    path = small_run / "seed0" / "gates.json"
    (gate,) = json.loads(path.read_text())
    gate |= {"id": "../../" + EVIL, "question": EVIL, "rationale": EVIL, "text": EVIL}
    gate["tokens"][0] = EVIL
    path.write_text(json.dumps([gate]))
    path = small_run / "seed0" / "fused" / "predictions.jsonl"
    wrong = {"id": EVIL, "category": EVIL, "question": EVIL, "choices": [EVIL, EVIL], "answer": 0,
             "image": False, "gold_rationale": EVIL, "rationale": EVIL + " b", "text": EVIL,
             "choice": None, "correct": False, "error": EVIL}  # fmt: skip
    path.write_text(json.dumps(wrong) + "\n")
    page = write(small_run)
    assert "script" not in read(page).tags
    text = page.read_text("utf-8")
    assert "{{ 7 * 7 }}" in text
    assert "no option could be read" in text
    assert {path.parent for path in small_run.parent.rglob("*.png")} == {small_run}


def test_one_seed_has_no_spread(small_run: Path) -> None:
    shutil.rmtree(small_run / "seed0")  # no curves, no gates: fewer figures to draw
    text = write(small_run).read_text("utf-8")
    assert "of one seed: no spread" in text
    assert "±" not in text.split('id="by"')[0].split("<table")[1].split("</table>")[0]
    assert 'class="best"' not in text


def test_attention_tints_its_patch_alone() -> None:
    gate = Gate(id="q", question="?", image=[[0.0] * 24] * 8, tokens=["a", "▁left", "</s>"],
                attention=[[1 / 12] * 12, [0] * 7 + [1] + [0] * 4, [1 / 12] * 12],
                gate=[0.1, 0.5, 0.9])  # fmt: skip
    tinted = (overlay(gate, 1, peak=1.0) < 250).any(-1)  # [8, 24]
    expected = np.zeros((8, 24), dtype=bool)
    expected[4:, 4:8] = True  # patch 7 of two rows of six: second row, second column
    assert (tinted == expected).all()
    shown = view(0, gate)
    assert [each.token.text for each in shown.images] == ["a", "left"]  # no special token
    assert (shown.lowest, shown.highest) == (0.1, 0.9)


def test_equal_gates_and_no_attention_are_drawn() -> None:
    gate = Gate(id="q", question="?", image=[[1.0]], tokens=["<pad>"], attention=[[0.0]], gate=[0])
    assert view(0, gate).images == []
    gate = Gate(id="q", question="?", image=[[1.0]], tokens=["a"], attention=[[0.0]], gate=[0])
    assert view(0, gate).peak == 0


def test_differences_mark_what_was_written_wrongly() -> None:
    assert differences("left 3, right 4. so 7.", "left 3, right 9. so 7.") == [
        Piece("left 3, right", False), Piece("9.", True), Piece("so 7.", False),
    ]  # fmt: skip
    assert differences("a b", "") == []


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1100, 500])
def test_a_browser_shows_it(page: Path, tmp_path: Path, width: int) -> None:
    shot = tmp_path / "page.png"
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}",
        f"--window-size={width},3000", page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    # Something stands in every stretch of the page, and nothing runs over its right edge.
    paper = pixels[2, 2]
    differs = np.abs(pixels - paper).sum(-1) > 60
    assert all(differs[top : top + 300].any() for top in range(0, 2700, 300))
    assert not differs[:, -10:].any()
