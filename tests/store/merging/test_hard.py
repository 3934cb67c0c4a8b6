"""Checkpoints that are hard to merge, each beside a reference in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from modgraft.core.errors import CheckpointError, ModgraftError
from modgraft.store.merging.checkpoints import merge_checkpoints
from modgraft.store.merging.table import METHODS
from store.merging.test_methods import merged

TINY = GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=12, n_inner=24)


def written(folder: Path, several: Sequence[dict[str, Tensor]]) -> list[Path]:
    paths = []
    for number, tensors in enumerate(several):
        paths.append(folder / f"m{number}")
        paths[-1].mkdir()
        save_file(tensors, paths[-1] / "model.safetensors", {"format": "pt"})
    return paths


def read(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def drawn(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count + sum(shape))
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"dare"}))
def test_every_type_is_rounded_once(method: str, kind: torch.dtype, tmp_path: Path) -> None:
    """To half a step of the type, and what float32 errs."""
    tensors = [t.to(kind) for t in drawn(3, 12, 9)]
    base, *models = written(tmp_path, [{"w": t} for t in tensors])
    found = read(merge_checkpoints(models, tmp_path / "out", method, base=base))["w"]
    assert found.dtype == kind
    origin, *others = (t.double() for t in tensors)
    expected = origin + merged(method, [t - origin for t in others])
    step = torch.finfo(kind).eps / 2
    bound = (step * 1.01 * expected.abs() + (0 if kind == torch.float64 else 1e-5)).clamp_min(1e-12)
    assert bool(((found.double() - expected).abs() <= bound).all())


def test_the_types_are_those_of_the_base(tmp_path: Path) -> None:
    origin, one, two = drawn(3, 5, 4)
    base, *models = written(tmp_path, [{"w": origin.half()}, {"w": one}, {"w": two.bfloat16()}])
    found = read(merge_checkpoints(models, tmp_path / "out", "arithmetic", base=base))["w"]
    expected = one.double() + two.bfloat16().double() - origin.half().double()
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_odd_shapes_are_merged(method: str, tmp_path: Path) -> None:
    """A number alone, no rows, no columns, rows of zeros, one number, one row."""
    shapes = {"number": (), "none": (0, 3), "thin": (3, 0), "one": (1,), "row": (1, 5), "w": (4, 3)}
    several = [{n: t for n, s in shapes.items() for t in drawn(3, *s)[i : i + 1]} for i in range(3)]
    for tensors in several:
        tensors["zeros"] = torch.zeros(4, 4)
        tensors["w"][1:3] = 0
    base, *models = written(tmp_path, several)
    options: dict[str, Any] = {"density": 1.0} if method == "dare" else {}
    found = read(merge_checkpoints(models, tmp_path / "out", method, base=base, **options))
    origin, *others = several
    for name, tensor in found.items():
        deltas = [each[name].double() - origin[name].double() for each in others]
        expected = origin[name].double()
        if tensor.numel():
            expected = expected + merged(method, deltas, **options)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-5, msg=name)


def test_negative_weights_and_weights_that_cancel(tmp_path: Path) -> None:
    origin, one, two = drawn(3, 6, 5)
    base, *models = written(tmp_path, [{"w": t} for t in (origin, one, two)])
    a, b = (t.double() - origin.double() for t in (one, two))
    cases: list[tuple[str, list[float], Any]] = [
        ("arithmetic", [1, -1], a - b),
        ("average", [3, -1], (3 * a - b) / 2),
        ("ties", [1, -1], merged("ties", [a, b], [1, -1], density=0.4)),
    ]
    for method, weights, change in cases:
        options: dict[str, Any] = {"density": 0.4} if method == "ties" else {}
        out = tmp_path / method
        merge_checkpoints(models, out, method, base=base, weights=weights, **options)
        expected = origin.double() + change
        torch.testing.assert_close(read(out)["w"].double(), expected, rtol=1e-5, atol=1e-5)
    for method in ("average", "tsv"):
        with pytest.raises(ModgraftError, match="their sum is 0"):
            merge_checkpoints(models, tmp_path / "no", method, base=base, weights=[1, -1])


def test_a_model_beside_itself(tmp_path: Path) -> None:
    """Its copies average to it, SLERP to it, and what it learned twice is twice that."""
    origin, one = drawn(2, 6, 5)
    base, *models = written(tmp_path, [{"w": origin}, {"w": one}, {"w": one}, {"w": one}])
    assert torch.equal(read(merge_checkpoints(models[:2], tmp_path / "two"))["w"], one)
    thirds = read(merge_checkpoints(models, tmp_path / "three"))["w"]
    torch.testing.assert_close(thirds, one, rtol=3e-7, atol=0)
    turned = read(merge_checkpoints(models[:2], tmp_path / "slerp", "slerp", t=0.3))["w"]
    torch.testing.assert_close(turned, one, rtol=3e-7, atol=0)
    twice = read(merge_checkpoints(models[:2], tmp_path / "sum", "arithmetic", base=base))["w"]
    torch.testing.assert_close(twice.double(), 2 * one.double() - origin.double())
    dense = merge_checkpoints(models[:2], tmp_path / "ties", "ties", base=base, density=1.0)
    torch.testing.assert_close(read(dense)["w"], one)


def test_slerp_of_parallel_and_opposite_models(tmp_path: Path) -> None:
    """Along the line: θ and 3θ at a half are 2θ; θ and −θ at a quarter θ/2, and at a half 0."""
    (one,) = drawn(1, 6, 5)
    a, b, c = written(tmp_path, [{"w": one}, {"w": 3 * one}, {"w": -one}])
    cases = (([a, b], 0.5, 2.0), ([a, c], 0.25, 0.5), ([a, c], 0.5, 0.0))
    for number, (pair, t, times) in enumerate(cases):
        found = read(merge_checkpoints(pair, tmp_path / f"out{number}", "slerp", t=t))["w"]
        torch.testing.assert_close(found, times * one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_a_density_that_keeps_nothing_is_refused(density: float, tmp_path: Path) -> None:
    base, *models = written(tmp_path, [{"w": t} for t in drawn(3, 4, 4)])
    for method in ("ties", "dare", "knots"):
        with pytest.raises(ModgraftError, match="density="):
            merge_checkpoints(models, tmp_path / "out", method, base=base, density=density)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", [0, 2])
def test_nan_and_infinity_are_named(method: str, bad: float, which: int, tmp_path: Path) -> None:
    tensors = drawn(3, 4, 4)
    tensors[which][1, 2] = bad
    base, *models = written(tmp_path, [{"w": t} for t in tensors])
    options: dict[str, Any] = {"density": 1.0} if method == "dare" else {}
    with pytest.raises(CheckpointError, match=rf"w holds NaN or infinity: .*m{which} does"):
        merge_checkpoints(models, tmp_path / "out", method, base=base, **options)
    assert not (tmp_path / "out").exists()


def test_a_score_that_is_none_leaves_nothing(tmp_path: Path) -> None:
    models = written(tmp_path, [{"w": t} for t in drawn(3, 4, 4)])

    def raises(folder: Path) -> float:
        raise KeyError("validation set")

    def gives(value: Any) -> Any:
        return lambda folder: value

    with pytest.raises(KeyError, match="validation set"):
        merge_checkpoints(models, tmp_path / "out", "greedy_soup", validate=raises)
    for wrong in (math.nan, None, "good", torch.tensor([1.0, 2.0])):
        with pytest.raises(ModgraftError, match=r"validate gave .* it returns a number"):
            merge_checkpoints(models, tmp_path / "out", "greedy_soup", validate=gives(wrong))
    assert {path.name for path in tmp_path.iterdir()} == {"m0", "m1", "m2"}


# -- tensors in some of them alone ----------------------------------------------------------------


def three(tmp_path: Path, **more: Any) -> list[Path]:
    paths = [tmp_path / f"m{seed}" for seed in range(3)]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        GPT2LMHeadModel(TINY).save_pretrained(path, **more)
    return paths


def with_own(folder: Path, **tensors: Tensor) -> None:
    own = read(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({**own, **tensors}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("place", [0, 1, 2])
def test_tied_embeddings_that_one_has_twice(place: int, tmp_path: Path) -> None:
    """In shards beside one file; a head that is a copy of the embeddings is no tensor by itself."""
    paths = three(tmp_path, max_shard_size="4KB")
    several = [read(path) for path in paths]
    with_own(paths[place], **{"lm_head.weight": several[place]["transformer.wte.weight"].clone()})
    out = merge_checkpoints(paths[1:], tmp_path / "out", "ties", base=paths[0], density=0.5)
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    origin, *others = ({k: t.double() for k, t in each.items()} for each in several)
    for name, tensor in model.state_dict().items():
        key = "transformer.wte.weight" if name == "lm_head.weight" else name
        change = merged("ties", [each[key] - origin[key] for each in others], density=0.5)
        torch.testing.assert_close(tensor.double(), origin[key] + change, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.transformer.wte.weight
    with_own(paths[place], **{"lm_head.weight": several[place]["transformer.wte.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is in .* and not in"):
        merge_checkpoints(paths[1:], tmp_path / "no", "ties", base=paths[0])


def test_shards_of_one_tensor_and_an_index_of_one_shard(tmp_path: Path) -> None:
    """A file that held the copied head alone is not written; one shard keeps its index."""
    paths = three(tmp_path)
    several = [read(path) for path in paths]
    own = several[0] | {"lm_head.weight": several[0]["transformer.wte.weight"].clone()}
    (paths[0] / "model.safetensors").unlink()
    (paths[1] / "model.safetensors").rename(paths[1] / "model-00001-of-00001.safetensors")
    head, rest = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"lm_head.weight": own["lm_head.weight"]}, paths[0] / head, {"format": "pt"})
    save_file(several[0], paths[0] / rest, {"format": "pt"})
    placed = {name: head if name == "lm_head.weight" else rest for name in own}
    for path, where in (
        (paths[0], placed),
        (paths[1], dict.fromkeys(several[1], "model-00001-of-00001.safetensors")),
    ):
        index = {"metadata": {}, "weight_map": where}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for number, order in enumerate(([0, 1, 2], [1, 0, 2])):
        out = merge_checkpoints([paths[i] for i in order], tmp_path / f"out{number}")
        assert len(list(out.glob("*.safetensors"))) == 1
        found = AutoModelForCausalLM.from_pretrained(out).state_dict()
        for name in several[0]:
            mean = sum(each[name].double() for each in several) / 3
            torch.testing.assert_close(found[name].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [0, 1])
def test_a_buffer_of_whole_numbers_in_one_alone(place: int, tmp_path: Path) -> None:
    """As older checkpoints have the positions, which a model counts itself."""
    paths = three(tmp_path)
    with_own(paths[place], positions=torch.arange(12)[None])
    with pytest.warns(UserWarning, match=r"positions is in .* alone, .* the first one's stay"):
        out = merge_checkpoints(paths, tmp_path / "out")
    assert ("positions" in read(out)) == (place == 0)
    if place == 0:
        with_own(paths[2], positions=torch.arange(12)[None] + 1)
        with (
            pytest.warns(UserWarning, match="alone"),
            pytest.raises(CheckpointError, match="have others"),
        ):
            merge_checkpoints(paths, tmp_path / "no")


def test_another_vocabulary_is_named(tmp_path: Path) -> None:
    paths = three(tmp_path)
    model: Any = GPT2LMHeadModel.from_pretrained(paths[1])
    model.resize_token_embeddings(33)
    model.save_pretrained(paths[1])
    with pytest.raises(CheckpointError, match=r"wte.weight is .*30, 16.* and .*33, 16.* vocabular"):
        merge_checkpoints(paths, tmp_path / "out")
