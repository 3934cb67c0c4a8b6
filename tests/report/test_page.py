"""The page: complete, self-contained, escaped, and seen in a browser where there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from modgraft.report import write
from modgraft.report.attention import overlay, view
from modgraft.report.figures import _smooth
from modgraft.report.run import Gate
from modgraft.report.wrong_answers import Piece, differences

VOID = {"meta", "link", "img", "source", "br"}
EVIL = "<script>alert('x')</script> & \"q\" {{ 7 * 7 }} $x_1$ 漢"


class Reader(HTMLParser):
    """Collects what a page loads and links, and checks that its elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [v or "" for k, v in attrs if k in {"src", "srcset", "action"}]
        self.links += [v or "" for k, v in attrs if k == "href"]

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
    assert all(load.startswith("data:") for load in reader.loads)
    beside = [link for link in reader.links if not link.startswith(("#", "data:"))]
    assert len(beside) >= 27  # the predictions of nine rows under three seeds
    assert all((page.parent / unquote(link)).is_file() for link in beside)
    assert "script" not in reader.tags
    text = page.read_text("utf-8")
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text


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
                  "Questions about three digits.", "modgraft mmcot train --run &#39;a b&#39;",
                  "0123456789ab, tree clean", "Python 3.11.2, torch 2.13.0", "of these fusion",
                  "Frozen parameters", "natural science; SOC: social science", ">31.5</td>",
                  "<mark>"):  # fmt: skip
        assert piece in text, piece
    assert "Not run." not in text


def test_every_wrong_answer_is_on_the_page(page: Path) -> None:
    lines = (page.parent / "seed0/fused/predictions.jsonl").read_text("utf-8").splitlines()
    wrong = [made["id"] for made in map(json.loads, lines) if not made["correct"]]
    text = page.read_text("utf-8")
    cards = text.split('<article class="card">')[1:]
    assert len(cards) == len(wrong) > 12
    assert {card.split('class="meta">')[1].split(" ")[0] for card in cards} == set(wrong)
    assert "<details><summary>The other " in text


def test_no_run_says_that_it_does_not_know_where_it_comes_from(small_run: Path) -> None:
    results = json.loads((small_run / "results.json").read_text())
    for name in ("task", "command", "commit", "versions"):
        del results[name]
    (small_run / "results.json").write_text(json.dumps(results))
    text = write(small_run).read_text("utf-8")
    assert "results.json does not say what the task is" in text
    assert text.count("not recorded</dd>") == 3


def test_the_running_mean_ends_as_a_mean() -> None:
    """One low step at the end is a fortieth of the curve at most, and not the curve's end."""
    noisy = np.full(400, 2.0)
    noisy[[0, -1]] = 8.0, 0.01
    smooth = _smooth(noisy)
    assert smooth[-1] == pytest.approx((5 * 2.0 + 0.01) / 6)  # half of a window of eleven
    assert smooth[0] == pytest.approx((5 * 2.0 + 8.0) / 6)
    assert smooth[200] == 2.0
    assert _smooth(np.array([3.0])) == [3.0]


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


OVERFLOWS = """<script>
const wide = [...document.querySelectorAll("body, body *")].filter(
  e => e.getBoundingClientRect().right > document.body.getBoundingClientRect().right + 0.5
       || e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== "visible");
document.title = "cut: " + wide.map(e => e.tagName + "." + e.className).slice(0, 9).join(" ");
</script>"""
"""Writes into the title what stands out of the page, and what is to be scrolled sideways."""


def browse(address: str, folder: Path, width: int, *arguments: str) -> str:
    """Run headless Chromium on a page, and return what it prints."""
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},3000", *arguments, address,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, timeout=120)
    return done.stdout.decode("utf-8")


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it(page: Path, tmp_path: Path, width: int) -> None:
    shot = tmp_path / "page.png"
    browse(page.as_uri(), tmp_path, width, f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    # Something stands in every stretch of the page, and nothing runs over its right edge.
    paper = pixels[2, 2]
    differs = np.abs(pixels - paper).sum(-1) > 60
    assert all(differs[top : top + 300].any() for top in range(0, 2700, 300))
    assert not differs[:, -10:].any()


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 990, 700, 500])
def test_nothing_is_cut_off(page: Path, tmp_path: Path, width: int) -> None:
    text = page.read_text("utf-8").replace("<details>", "<details open>")
    policy = text[text.index('<meta http-equiv="Content') :].split(">", 1)[0] + ">"
    looked = tmp_path / "looked.html"
    looked.write_text(text.replace(policy, "").replace("</body>", f"{OVERFLOWS}</body>"), "utf-8")
    dom = browse(looked.as_uri(), tmp_path, width, "--dump-dom")
    assert dom.split("<title>")[1].split("</title>")[0] == "cut: "
