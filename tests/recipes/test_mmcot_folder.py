"""The recipe on folders in ScienceQA's format: the sample, and one made here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from command import Result, files, modgraft, refused, train
from modgraft.data.tokenizer import train_tokenizer
from modgraft.models.transformers_t5 import small_t5
from modgraft.recipes.mmcot.data import load_questions
from modgraft.report.run import read_run
from questions import SAMPLE, needs_sample

SHORT = ("--steps", "2", "--batch", "4", "--set", "max_rationale=8", "--set", "max_answer=8")
COLOURS = ("red", "green", "blue")


def problems() -> dict[str, dict[str, Any]]:
    """Sixteen questions about squares of one colour; every fourth has no image."""
    out = {}
    for i in range(16):
        colour = COLOURS[i % 3]
        out[str(i)] = {
            "question": f"What colour is square {i}?" if i % 4 else f"What is {i} plus 1?",
            "choices": list(COLOURS) if i % 4 else [str(i), str(i + 1)],
            "answer": i % 3 if i % 4 else 1,
            "hint": "Look at the square." if i % 2 else "",
            "image": "image.png" if i % 4 else None,
            "task": "closed choice",
            "grade": f"grade{1 + i % 12}",
            "subject": "natural science",
            "topic": "colours",
            "category": "Squares" if i % 4 else "Sums",
            "skill": "Name a colour",
            "lecture": "A colour has a name.",
            "solution": f"The square is {colour}." if i % 4 else f"It is {i + 1}.",
            "split": "train" if i < 8 else "val" if i < 11 else "test",
        }
    return out


def write_data(folder: Path, raw: dict[str, dict[str, Any]]) -> Path:
    """The questions as a folder, with a picture and a caption for each that has an image."""
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[str]] = {}
    for qid, record in raw.items():
        splits.setdefault(record["split"], []).append(qid)
        if record.get("image"):
            picture = Image.new("RGB", (20, 20), "white")
            ImageDraw.Draw(picture).rectangle((4, 4, 16, 16), fill=COLOURS[int(qid) % 3])
            path = folder / "images" / record["split"] / qid / "image.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    captions = {qid: "A square." for qid, record in raw.items() if record.get("image")}
    write(folder / "problems.json", raw)
    write(folder / "pid_splits.json", splits)
    write(folder / "captions.json", {"captions": captions})
    return folder


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", problems())


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    words = "Question: Context: Options: Solution: Answer: The answer is (A) (B) (C)."
    tokenizer = train_tokenizer([words, *(str(r) for r in problems().values())])
    tokenizer.save_pretrained(folder)
    small_t5(len(tokenizer), d_model=16, d_ff=16, heads=2, layers=1).save_pretrained(folder)
    return folder


def learn(run: Path, data: Path, *args: str | Path, rows: str = "fused,text") -> Result:
    return train(run, "--data", data, "--rows", rows, *SHORT, *args)


def measured(run: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((run / "results.json").read_text())["rows"]
    return {row["key"]: row["seeds"]["0"] for row in rows}


def write_features(path: Path, ids: list[str], width: int = 6) -> Path:
    """One array of features, and the rows beside it."""
    generator = np.random.default_rng(0)
    np.save(path, generator.normal(size=(len(ids), 3, width)).astype(np.float32))
    write(path.with_suffix(".json"), {qid: row for row, qid in enumerate(ids)})
    return path


def with_image(raw: dict[str, dict[str, Any]]) -> list[str]:
    return [qid for qid, record in raw.items() if record.get("image")]


# end to end


def test_a_folder_from_images_to_the_report(
    tmp_path: Path, data: Path, vit: Path, t5: Path
) -> None:
    run = tmp_path / "run"
    args = ("--features", vit, "--model", t5, "--seeds", "0,1")
    result = learn(run, data, *args, rows="fused,shuffled,text")
    assert result.code == 0, result
    read = read_run(run)
    assert read.results is not None
    for row in read.results.rows:
        assert {m.n for m in row.seeds.values()} == {5}
        assert list(row.seeds) == [0, 1]
        assert set(row.seeds[0].families) == {"Squares", "Sums"}
    raw = json.loads((run / "results.json").read_text())
    assert (raw["split"], raw["notes"], raw["skipped"]) == ("test", [], [])
    assert (run / "report.html").is_file()
    assert (run / "features.safetensors").is_file()  # once, for all seeds
    assert not list(run.glob("seed*/data/features.safetensors"))

    before = files(run)
    assert learn(run, data, *args, rows="fused,shuffled,text").code == 0
    assert files(run) == before

    picture = data / "images" / "test" / "13" / "image.png"
    asked = modgraft("mmcot", "ask", picture, "What colour?", *COLOURS, "--run", run)
    assert asked.code in (0, 2), asked
    assert asked.out.startswith("Rationale")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:40])
    cut = modgraft("mmcot", "ask", tmp_path / "cut.png", "What?", "a", "b", "--run", run)
    refused(cut, "cut.png", "damaged")


@needs_sample
def test_the_sample_of_scienceqa(tmp_path: Path, t5: Path) -> None:
    raw = json.loads((SAMPLE / "problems.json").read_text(encoding="utf-8"))
    features = write_features(tmp_path / "vit.npy", with_image(raw))
    run = tmp_path / "run"
    result = learn(run, SAMPLE, "--features", features, "--model", t5)
    assert result.code == 0, result
    assert "There is no test split: the results are those of the split val." in result.out
    assert {m["n"] for m in measured(run).values()} == {80}
    assert measured(run)["fused"]["columns"]["IMG"] is not None
    (lines,) = (read_run(run).predictions[k][0] for k in ["text"])
    assert {p.id for p in lines} <= set(raw)


def test_text_alone_needs_no_image(tmp_path: Path, data: Path) -> None:
    shutil.rmtree(data / "images")
    (data / "captions.json").unlink()
    result = learn(tmp_path / "run", data, rows="text")  # a small T5 and a tokenizer of its own
    assert result.code == 0, result
    assert "There is no captions.json: the questions go without captions." in result.out
    assert measured(tmp_path / "run")["text"]["n"] == 5
    said = refused(learn(tmp_path / "run", data), "no image features", "fused", "--features")
    assert "--rows text" in said


def test_splits(tmp_path: Path, data: Path) -> None:
    raw = problems()
    for record in raw.values():
        record["split"] = record["split"].replace("val", "train")
    other = write_data(tmp_path / "two", raw)
    result = learn(tmp_path / "two-run", other, rows="text")
    assert result.code == 0, result
    assert "There is no val split: no loss was measured beside training." in result.out

    result = learn(tmp_path / "val-run", data, "--split", "val", rows="text")
    assert result.code == 0, result
    assert measured(tmp_path / "val-run")["text"]["n"] == 3
    refused(learn(tmp_path / "a", data, "--split", "hard"), "split hard", "--split", "test (5)")
    for record in raw.values():
        record["split"] = "train"
    one = write_data(tmp_path / "one", raw)
    refused(learn(tmp_path / "a", one, rows="text"), "pid_splits.json", "test or val", "--split")
    for record in raw.values():
        record["split"] = "test"
    none = write_data(tmp_path / "none", raw)
    refused(learn(tmp_path / "a", none, rows="text"), "pid_splits.json", "train")
    assert not (tmp_path / "a").exists()


# bad input


def no_choices(data: Path) -> None:
    change(data, "9", choices=[])


def far_answer(data: Path) -> None:
    change(data, "9", answer=3)


def change(data: Path, qid: str, **values: Any) -> None:
    raw = json.loads((data / "problems.json").read_text())
    raw[qid] |= values
    write(data / "problems.json", raw)


def only_in_splits(data: Path) -> None:
    splits = json.loads((data / "pid_splits.json").read_text())
    splits["test"].append("99")
    write(data / "pid_splits.json", splits)


def in_no_split(data: Path) -> None:
    splits = json.loads((data / "pid_splits.json").read_text())
    splits["val"].remove("9")
    write(data / "pid_splits.json", splits)


def no_caption(data: Path) -> None:
    captions = json.loads((data / "captions.json").read_text())["captions"]
    del captions["9"]
    write(data / "captions.json", {"captions": captions})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_choices, ["problems.json", "'9'", "no choices"]),
        (far_answer, ["problems.json", "'9'", "answer index 3 is out of range for 3 choices"]),
        (only_in_splits, ["pid_splits.json", "'99'", "problems.json does not have it"]),
        (in_no_split, ["pid_splits.json", "'9'", "in no list"]),
        (no_caption, ["captions.json", "'9'", "no caption"]),
    ],
)
def test_bad_records_are_refused_before_anything_is_written(
    tmp_path: Path, data: Path, spoil: Any, words: list[str]
) -> None:
    spoil(data)
    refused(learn(tmp_path / "run", data, rows="text"), *words, "--skip-bad")
    assert not (tmp_path / "run").exists()


def test_bad_texts_are_found_before_training_and_skipped(tmp_path: Path, data: Path) -> None:
    run, args = tmp_path / "run", ("--split", "val", "--set", "published=true")
    change(data, "9", choices=["red " * 600, "green", "blue"])
    long = ["'9'", "options alone are longer than max_input=512", "--skip-bad"]
    refused(learn(run, data, *args, rows="text"), *long)
    assert not list(run.glob("seed0/*/metrics.jsonl"))
    change(data, "2", hint="half \ud83d")
    half = ["problems.json", "'2'", "'hint' holds half a character", "--skip-bad"]
    refused(learn(run, data, *args, rows="text"), *half)

    result = learn(run, data, *args, "--skip-bad", rows="text")
    assert result.code == 0, result
    assert "Skipped 2 bad questions (--skip-bad)" in result.out
    raw = json.loads((run / "results.json").read_text())
    assert {s["id"] for s in raw["skipped"]} == {"2", "9"}
    assert measured(run)["text"]["n"] == 2  # of three in val
    assert set(load_questions(run, 0, features=False).ids) == set(problems()) - {"2", "9"}

    # the report is one of ScienceQA's form, and of that split
    assert "Questions of the split val, decoded freely" in result.out
    assert "Test questions" not in result.out
    assert "Accuracy by column" in result.out
    assert "NAT" in result.out
    assert "BLEU-4" in result.out
    page = (run / "report.html").read_text("utf-8")
    for words in (
        "questions of the split val",
        "BLEU-1",
        "<details open>",
        "Not shown.</strong> At",
    ):
        assert words in page, words
    assert "No gates.json" not in page


def test_bad_images_and_then_skipping_them(tmp_path: Path, data: Path, vit: Path, t5: Path) -> None:
    images, run = data / "images", tmp_path / "run"
    (images / "train" / "2" / "image.png").unlink()
    cut = images / "test" / "14" / "image.png"
    cut.write_bytes(cut.read_bytes()[:50])
    args = ("--features", vit, "--model", t5)
    refused(
        learn(run, data, *args),
        "image features", str(images / "train/2/image.png"), "'2'", "missing", "--skip-bad",
    )  # fmt: skip
    change(data, "9", choices=["only"])
    # what the message said, with everything else as it was
    result = learn(run, data, *args, "--skip-bad")
    assert result.code == 0, result
    _, _, listed = result.out.partition("Skipped 3 bad questions (--skip-bad):\n")
    assert listed, result.out
    lines = [line.strip() for line in listed.splitlines()[:3]]
    assert [line.split()[0] for line in sorted(lines)] == ["14", "2", "9"]
    assert any("only one choice" in line for line in lines)
    assert any(str(cut) in line and "truncated" in line for line in lines)
    skipped = json.loads((run / "results.json").read_text())["skipped"]
    assert {s["id"] for s in skipped} == {"2", "9", "14"}
    # both rows are about the same questions
    assert {row: m["n"] for row, m in measured(run).items()} == {"fused": 4, "text": 4}

    again = learn(run, data, *args, "--skip-bad")
    assert "Skipped 3 bad questions" in again.out


def test_bad_features(tmp_path: Path, data: Path, t5: Path) -> None:
    ids, run = with_image(problems()), tmp_path / "run"
    maps = {qid: torch.randn(3, 6) for qid in ids}
    save_file(maps | {"5": torch.randn(3, 7)}, tmp_path / "wide.safetensors")
    save_file({q: m for q, m in maps.items() if q != "5"}, tmp_path / "few.safetensors")
    save_file(maps | {"77": torch.randn(3, 6)}, tmp_path / "many.safetensors")
    for name, words in {
        "wide": ["'5'", "7 wide, expected 6"],
        "few": ["'5'", "the question has an image, but no features"],
        "many": ["'77'", "features for an unknown question"],
    }.items():
        file = tmp_path / f"{name}.safetensors"
        refused(learn(run, data, "--features", file), str(file), *words, "--skip-bad")
    refused(learn(run, data, "--features", tmp_path / "no.npy"), "no.npy", "no such file")
    # no net has begun, so other settings are no other run
    good = write_features(tmp_path / "good.npy", ids)
    result = learn(run, data, "--features", good, "--model", t5, rows="gold")
    assert result.code == 0, result
    asked = modgraft("mmcot", "ask", data / "images/test/13/image.png", "What?", "a", "b",
                     "--run", run)  # fmt: skip
    refused(asked, "stage1", "no such file", "modgraft mmcot train")
    save_file(maps | {"5": torch.randn(3, 7)}, tmp_path / "wide.safetensors")
    result = learn(tmp_path / "skip", data, "--features", tmp_path / "wide.safetensors",
                   "--skip-bad", rows="gold")  # fmt: skip
    assert result.code == 0, result
    assert "Skipped 1 bad questions" in result.out
    assert "7 wide, expected 6" in result.out


def test_bad_models(tmp_path: Path, data: Path, vit: Path, t5: Path) -> None:
    run = tmp_path / "run"
    refused(learn(run, data, "--model", vit, rows="text"), str(vit), "--model")
    (tmp_path / "empty").mkdir()
    said = refused(learn(run, data, "--model", tmp_path / "empty", rows="text"), "empty", "--model")
    assert "no T5 with a tokenizer there" in said
    broken = shutil.copytree(t5, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    refused(learn(run, data, "--model", broken, rows="text"), str(broken), "--model")
    refused(learn(run, data, "--features", t5, rows="fused"), str(t5))
    assert not (run / "results.json").exists()
    assert learn(run, data, "--model", t5, rows="text").code == 0
