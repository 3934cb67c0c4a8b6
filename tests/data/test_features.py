from __future__ import annotations

import io
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    DetrConfig,
    DetrModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modgraft.core.errors import DataError, MissingFileError
from modgraft.data.extract import encode_images, extract_features, load_vision
from modgraft.data.features import check_features, load_features
from modgraft.data.records import Questions, Skips
from modgraft.data.scienceqa import load_scienceqa
from questions import record, write_folder

RECORDS = (record("11"), record("12"), record("13"))  # the second has no image
ARRAY = np.arange(1, 25, dtype=np.float16).reshape(3, 2, 4)


def write_rows(folder: Path, array: Any = ARRAY, rows: Any = None, name: str = "detr.npy") -> Path:
    np.save(folder / name, array)
    rows = {"11": 2, "12": 1, "13": "0"} if rows is None else rows
    (folder / "name_map.json").write_text(json.dumps(rows))
    return folder / name


# reading


def test_one_array_and_its_rows(tmp_path: Path) -> None:
    maps = load_features(write_rows(tmp_path), RECORDS, width=4)
    assert list(maps) == ["11", "13"]  # the row of a question without an image is left out
    assert maps["11"].dtype == torch.float16  # until a batch is made
    assert maps["11"].tolist() == ARRAY[2].tolist()
    assert maps["13"].tolist() == ARRAY[0].tolist()


@pytest.mark.parametrize("kind", [f"{order}f{size}" for order in "<>" for size in (2, 4, 8)])
def test_floating_point_of_any_size_and_order_of_bytes(tmp_path: Path, kind: str) -> None:
    maps = load_features(write_rows(tmp_path, ARRAY.astype(kind)), RECORDS)
    assert maps["11"].tolist() == ARRAY[2].tolist()
    assert maps["11"].dtype == {"2": torch.half, "4": torch.float, "8": torch.double}[kind[-1]]


def test_a_file_is_mapped_and_not_read_whole(tmp_path: Path) -> None:
    array = np.lib.format.open_memmap(
        tmp_path / "detr.npy", "w+", np.float16, (20_000, 50, 512)
    )  # a gigabyte of holes
    array[:3, :2, :4] = ARRAY
    del array
    write_rows_only = {"11": 2, "12": 1, "13": "0"}
    (tmp_path / "name_map.json").write_text(json.dumps(write_rows_only))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    maps = load_features(tmp_path / "detr.npy", RECORDS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
    assert maps["11"][:2, :4].tolist() == ARRAY[2].tolist()


def test_features_that_a_batch_cannot_hold(tmp_path: Path) -> None:
    array = ARRAY.astype(float)
    array[0, 0, 0] = 1e300  # infinite as float32
    with pytest.raises(DataError, match="question '13': the features hold NaN or infinity"):
        load_features(write_rows(tmp_path, array), RECORDS)
    frozen = {"11": ARRAY[2].copy(), "13": ARRAY[0].copy()}
    frozen["11"].flags.writeable = False
    assert check_features(frozen, RECORDS)["11"].tolist() == ARRAY[2].tolist()


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.full((3, 2, 4), "x"), "<U1"),
        (np.full((3, 2, 4), b"x"), r"\|S1"),
        (np.full((3, 2, 4), "2026-11-29", "datetime64[D]"), r"datetime64\[D\]"),
        (np.zeros((3, 2, 4), [("a", "f4"), ("b", "f4")]), r"\[\('a', '<f4'\), \('b', '<f4'\)\]"),
        (ARRAY.astype(np.longdouble), "float128"),
    ],
)
def test_arrays_of_no_numbers_are_named(tmp_path: Path, array: np.ndarray, kind: str) -> None:
    match = rf"detr.npy, question '11': the features are {kind}, not floating point of 16, 32 or 64"
    with pytest.raises(DataError, match=match):
        load_features(write_rows(tmp_path, array), RECORDS)


def test_pooled_features_are_one_patch(tmp_path: Path) -> None:
    maps = load_features(write_rows(tmp_path, ARRAY[:, 0]), RECORDS)
    assert maps["13"].tolist() == [[1, 2, 3, 4]]


def test_safetensors_by_id_and_as_one_array(tmp_path: Path) -> None:
    maps = {"11": torch.ones(2, 4).bfloat16(), "13": torch.ones(4)}
    save_file(maps, tmp_path / "by_id.safetensors")
    got = load_features(tmp_path / "by_id.safetensors", RECORDS)
    assert {q: list(m.shape) for q, m in got.items()} == {"11": [2, 4], "13": [1, 4]}
    save_file({"features": torch.from_numpy(ARRAY)}, tmp_path / "whole.safetensors")
    (tmp_path / "whole.json").write_text('{"11": 0, "13": 1}')
    got = load_features(tmp_path / "whole.safetensors", RECORDS)
    assert got["13"].tolist() == ARRAY[1].tolist()
    (tmp_path / "mine.json").write_text('{"11": 1, "13": 0}')
    got = load_features(tmp_path / "whole.safetensors", RECORDS, names=tmp_path / "mine.json")
    assert got["11"].tolist() == ARRAY[1].tolist()


def spoilt(row: int, value: float) -> np.ndarray:
    array = ARRAY.copy()
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("array", "rows", "message"),
    [
        (ARRAY.astype(int), None, r"detr.npy, question '11': the features are torch.int64"),
        (spoilt(0, np.nan), None, r"detr.npy, question '13': the features hold NaN or inf"),
        (spoilt(2, 0.0), None, r"question '11': the features are all zero, as written where"),
        (ARRAY[:, :, :0], None, r"question '11': the features have shape \[2, 0\], expected"),
        (ARRAY[None], None, r"detr.npy: an array of shape \[1, 3, 2, 4\], expected \[n, m, d"),
        (ARRAY, {"11": 0}, r"detr.npy, question '13': the question has an image, but no feat"),
        (ARRAY, {"11": 0, "13": 1, "9": 2}, r"detr.npy, question '9': features for an unknown"),
        (ARRAY, {"11": 3}, r"name_map.json, question '11': row 3 is none of the 3 rows of de"),
        (ARRAY, {"11": -1}, r"question '11': row -1 is none of the 3 rows"),
        (ARRAY, {"11": True}, r"question '11': row True is none of the 3 rows"),
    ],
)
def test_bad_features(tmp_path: Path, array: np.ndarray, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_features(write_rows(tmp_path, array, rows), RECORDS)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"none.npy: there is no such file .*Extract the fe"):
        load_features(tmp_path / "none.npy", RECORDS)
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a.pt: features in the format '.pt' cannot be .*pickles"):
        load_features(tmp_path / "a.pt", RECORDS)
    file = write_rows(tmp_path)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"detr.npy: not a whole .npy array of numbers"):
        load_features(file, RECORDS)
    with file.open("wb") as several:
        np.savez(several, detr=ARRAY, vit=ARRAY)
    with pytest.raises(DataError, match=r"detr.npy: an archive of arrays \(.npz\), and no"):
        load_features(file, RECORDS)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"detr.npy: not a whole .npy array of numbers"):
        load_features(file, RECORDS)
    np.save(file, np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"detr.npy: not a whole .npy array of numbers"):
        load_features(file, RECORDS)
    (tmp_path / "b.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(DataError, match=r"b.safetensors: not a whole .safetensors file"):
        load_features(tmp_path / "b.safetensors", RECORDS)
    (tmp_path / "name_map.json").unlink()
    np.save(file, ARRAY)
    with pytest.raises(MissingFileError, match=r"detr.json: .*names=<file>; it says which row of"):
        load_features(file, RECORDS)


@pytest.mark.parametrize("shape", [str(ARRAY.shape).replace("4", "3"), str((1, *ARRAY.shape[1:]))])
def test_a_header_that_tells_of_another_size(tmp_path: Path, shape: str) -> None:
    path = write_rows(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(str(ARRAY.shape).encode(), shape.encode()))
    assert path.read_bytes() != whole
    with pytest.raises(DataError, match=r"its header tells of"):
        load_features(path, RECORDS)


def test_a_width_that_changes_names_the_question(tmp_path: Path) -> None:
    save_file({"11": torch.ones(2, 4), "13": torch.ones(2, 5)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"a.safetensors, question '13': the features are 5 wide"):
        load_features(tmp_path / "a.safetensors", RECORDS)
    skips = Skips(skip_bad=True)
    assert list(load_features(tmp_path / "a.safetensors", RECORDS, skips=skips)) == ["11"]
    assert skips.ids == {"13"}


# making


def resnet_config(**options: Any) -> ResNetConfig:
    return ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", **options
    )


def small(width: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }


def models() -> dict[str, tuple[PreTrainedModel, Any, int, int]]:
    """Name to model, image processor, patches and width."""
    vit = ViTConfig(image_size=16, patch_size=8, **small(8))
    clip = CLIPVisionConfig(image_size=16, patch_size=8, **small(8))
    detr = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=resnet_config(out_features=["stage2"]),
        num_queries=5,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
    )
    side = {"height": 16, "width": 16}
    return {
        "vit": (ViTModel(vit), ViTImageProcessorPil(size=side), 5, 8),
        "clip": (
            CLIPVisionModel(clip),
            CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side),
            5,
            8,
        ),
        "detr": (
            DetrModel(detr),
            DetrImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 48}),
            5,
            8,
        ),
        "resnet": (
            ResNetModel(resnet_config()),
            ConvNextImageProcessorPil(size={"shortest_edge": 56}, crop_pct=1.0),
            49,
            6,
        ),
    }


@pytest.fixture
def questions(tmp_path: Path) -> Questions:
    """The three, with pictures of unlike sizes and modes for those that have one."""
    folder = tmp_path / "scienceqa"
    folder.mkdir()
    loaded = load_scienceqa(write_folder(folder))
    for one, mode, size in ((loaded[0], "RGBA", (30, 20)), (loaded[2], "L", (17, 40))):
        path = loaded.image_path(one)
        path.parent.mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
        Image.fromarray(noise, "RGBA").convert(mode).save(path)
    return loaded


class Mean(nn.Module):
    """A vision model of the simplest kind, which counts its passes: one patch, the mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.seen = 0

    def forward(self, pixel_values: torch.Tensor) -> Any:
        assert not self.training
        self.seen += len(pixel_values)
        hidden = self.scale * pixel_values.mean(dim=(2, 3))[:, None]

        class Out:
            last_hidden_state = hidden

        return Out


def to_pixels(images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
    assert return_tensors == "pt"
    arrays = [np.asarray(image.resize((4, 4)), np.float32) / 255 for image in images]
    return {"pixel_values": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)}


@pytest.mark.parametrize("name", ["vit", "clip", "detr", "resnet"])
def test_every_kind_of_model_from_a_local_folder(
    name: str, questions: Questions, tmp_path: Path
) -> None:
    model, processor, patches, width = models()[name]
    model.save_pretrained(tmp_path / name)
    processor.save_pretrained(tmp_path / name)
    said = io.StringIO()
    loaded, its_own = load_vision(tmp_path / name, console=Console(file=said))
    assert said.getvalue() == ""  # nothing is fetched
    assert type(loaded) is type(model)
    got = extract_features(questions, loaded, its_own, progress=False)
    assert {q: list(m.shape) for q, m in got.features.items()} == {
        "11": [patches, width],
        "13": [patches, width],
    }
    assert got.width == width
    # the same as the model says by itself, and usable where a gradient is wanted
    image = Image.open(questions.image_path(questions[2])).convert("RGB")
    inputs = processor(images=[image], return_tensors="pt")
    hidden = model.eval()(**inputs).last_hidden_state.detach()
    alone = hidden.reshape(1, width, -1).mT if hidden.ndim == 4 else hidden
    assert torch.allclose(encode_images([image], loaded, its_own), alone, atol=1e-6)
    if name != "detr":  # which pads a batch to its largest picture, and masks
        assert torch.allclose(got.features["13"], alone[0], atol=1e-5)
    (got.features["13"] * nn.Parameter(torch.ones(width))).sum().backward()


def test_only_the_image_half_of_a_whole_clip(tmp_path: Path) -> None:
    text = CLIPTextConfig(vocab_size=9, max_position_embeddings=4, **small(8))
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **small(8))
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=4
    )
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    assert isinstance(load_vision(tmp_path)[0], CLIPVisionModel)


def test_a_name_says_what_it_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, **options: Any) -> None:
        assert options == {"local_files_only": False}
        raise OSError("offline")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    said = io.StringIO()
    with pytest.raises(DataError, match=r"no vision model at some/model: offline. Give a folder"):
        load_vision("some/model", console=Console(file=said, width=200))
    assert said.getvalue().startswith("Fetching some/model (configuration, image processor and wei")


def test_a_model_of_text_is_none_of_images(tmp_path: Path) -> None:
    BertModel(BertConfig(vocab_size=9, **small(8))).save_pretrained(tmp_path)
    ViTImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match=r"is a BertModel, which reads input_ids. Use a model of im"
    ):
        load_vision(tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, **options: Any) -> None:
        raise ImportError("DetrModel requires the timm library")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    with pytest.raises(DataError, match=r"needs a package that is not installed: .*timm library"):
        load_vision(tmp_path)


def test_missing_and_truncated_images(questions: Questions, tmp_path: Path) -> None:
    first, last = (questions.image_path(questions[i]) for i in (0, 2))
    data = last.read_bytes()
    last.write_bytes(data[: len(data) // 2])
    match = r"test/13/image.png, question '13': a damaged image.*Fetch or save the f"
    with pytest.raises(DataError, match=match):
        extract_features(questions, Mean(), to_pixels, progress=False)
    last.write_bytes(b"no image")
    with pytest.raises(DataError, match="question '13': not an image"):
        extract_features(questions, Mean(), to_pixels, progress=False)
    kept = extract_features(questions, Mean(), to_pixels, progress=False, skip_bad=True)
    assert kept.ids == ("11", "12")
    assert [s.id for s in kept.skipped] == ["13"]
    assert kept.summary().splitlines()[0].endswith("width 3; skipped 1:")
    last.write_bytes(data)
    first.unlink()
    match = r"train/11/image.png, question '11': the image is missing. Put it there.* or pass skip"
    with pytest.raises(MissingFileError, match=match):
        extract_features(questions, Mean(), to_pixels, progress=False)


def test_an_unknown_folder_is_not_skipped(questions: Questions) -> None:
    bare = Questions(questions.records)
    with pytest.raises(DataError, match=r"the folder of images is not known. Load the questions"):
        extract_features(bare, Mean(), to_pixels, skip_bad=True)


def test_a_model_without_a_last_hidden_state_of_patches(questions: Questions) -> None:
    class Pooled(Mean):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            out = super().forward(pixel_values)
            out.last_hidden_state = out.last_hidden_state[:, 0]
            return out

    with pytest.raises(DataError, match=r"Pooled's last hidden state has shape \[2, 3\]"):
        extract_features(questions, Pooled(), to_pixels, progress=False)


def test_the_cache(questions: Questions, tmp_path: Path) -> None:
    cache, model = tmp_path / "cache" / "mean.safetensors", Mean().train()

    def run(of: Questions = questions, by: Mean = model) -> Questions:
        return extract_features(of, by, to_pixels, cache=cache, batch_size=1, progress=False)

    # interrupted at the second picture: what was made is kept, whole
    gone = questions.image_path(questions[2])
    away = gone.rename(tmp_path / "away.png")
    with pytest.raises(MissingFileError):
        run()
    assert list(load_file(cache)) == ["11"]
    assert model.training
    away.rename(gone)
    first = run()
    assert model.seen == 2  # each picture once
    assert sorted(load_file(cache)) == ["11", "13"]
    again = run()
    assert model.seen == 2
    assert all(torch.equal(again.features[q], first.features[q]) for q in first.features)
    assert list(run(questions.split("test")).features) == ["13"]  # a part uses the whole's cache
    assert [p.name for p in cache.parent.iterdir()] == ["mean.safetensors"]

    other = Mean()
    other.scale.data += 1
    with pytest.raises(DataError, match=r"mean.safetensors: the cache holds the features of"):
        run(by=other)
    cache.write_bytes(cache.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"the cache is not a whole .safetensors file.*Delete it"):
        run()


def test_the_progress_bar(questions: Questions, capsys: pytest.CaptureFixture[str]) -> None:
    extract_features(questions, Mean(), to_pixels)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "2/2" in shown.err


def test_a_cache_is_a_features_file(questions: Questions, tmp_path: Path) -> None:
    cache = tmp_path / "mean.safetensors"
    made = extract_features(questions, Mean(), to_pixels, cache=cache, progress=False)
    read = load_scienceqa(tmp_path / "scienceqa", features=cache, width=3)
    assert all(torch.equal(read.features[q], made.features[q]) for q in made.features)
