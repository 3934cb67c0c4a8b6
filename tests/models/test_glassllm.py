"""The Llamas of glassllm: against its equations written out, and where it was fetched, its code."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modgraft.core.errors import MissingFileError, ModgraftError
from modgraft.data import fetch
from modgraft.models.glassllm import LANGUAGES, load
from modgraft.models.pretrained import from_transformers

CONFIG = {
    "vocab_size": 12, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_len": 10,
    "rope_base": 100.0, "eps": 1e-3, "init_std": 0.02,
}  # fmt: skip
TOKENS = {"version": 1, "alphabet": ["\n", "a", "b", "é", "▁"], "merges": [["▁", "a"], ["▁a", "b"]]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Random weights as the package stores them."""
    rng = np.random.default_rng(0)
    d, h, kv, inner = 16, 16, 8, int(8 * 16 / 3)
    shapes: dict[str, tuple[int, ...]] = {"E": (12, d), "norm_f.gamma": (d,)}
    for i in range(2):
        for name, shape in {
            "norm1.gamma": (d,), "attn.W_Q": (d, h), "attn.W_K": (d, kv), "attn.W_V": (d, kv),
            "attn.W_O": (h, d), "norm2.gamma": (d,), "ffn.W1": (d, inner), "ffn.W3": (d, inner),
            "ffn.W2": (inner, d),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = shape
    arrays: dict[str, Any] = {
        n: rng.normal(0, 0.5, s).astype(np.float16) for n, s in shapes.items()
    }
    home = tmp_path / "glassllm" / "weights"
    home.mkdir(parents=True)
    np.savez_compressed(home / "en.npz", __config__=np.array(json.dumps(CONFIG)), **arrays)
    (home / "en.tokenizer.json").write_text(json.dumps(TOKENS), "utf-8")
    return tmp_path


def reference(w: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """The logits ``[n, V]`` by the package's equations, in float64."""
    n, d, heads = len(ids), 4, 4
    angles = np.outer(np.arange(n), 100.0 ** (-2 * np.arange(d // 2) / d))  # [n, d / 2]

    def norm(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * gamma

    def turned(x: np.ndarray) -> np.ndarray:  # [n, heads, d], each even number with the next
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = w["E"][ids]
    for i in range(2):
        p = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}")}
        h = norm(x, p["norm1.gamma"])
        q = turned((h @ p["attn.W_Q"]).reshape(n, heads, d))
        k = turned((h @ p["attn.W_K"]).reshape(n, 2, d)).repeat(2, 1)
        v = (h @ p["attn.W_V"]).reshape(n, 2, d).repeat(2, 1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(d)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", weights, v).reshape(n, -1) @ p["attn.W_O"]
        h = norm(x, p["norm2.gamma"])
        gate = h @ p["ffn.W1"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["ffn.W3"])) @ p["ffn.W2"]
    return norm(x, w["norm_f.gamma"]) @ w["E"].T


def test_the_weights_compute_what_the_package_does(folder: Path) -> None:
    model, _ = load("en", folder)
    with np.load(folder / "glassllm/weights/en.npz") as data:
        stored = {k: data[k].astype(np.float64) for k in data.files if k != "__config__"}
    ids = [5, 9, 1, 1, 11, 0, 7]
    want = torch.from_numpy(reference(stored, ids))
    with torch.no_grad():
        for each in (model.double(), from_transformers(model)):
            got = each(input_ids=torch.tensor([ids])).logits[0]
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_its_tokenizer(folder: Path) -> None:
    tokenizer = load("en", folder)[1]
    assert tokenizer.encode(" ab a\nba").tokens == ["▁ab", "▁a", "\n", "b", "a"]
    assert tokenizer.encode("  ab").tokens == ["▁", "▁ab"]
    assert tokenizer.encode("e\u0301x").tokens == ["é", "<unk>"]  # composed first
    assert tokenizer.decode(tokenizer.encode("a ab\nx").ids) == "a ab\n⁇"


def test_what_cannot_be_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModgraftError, match=r"no language of glassllm is named 'de'"):
        load("de", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    with pytest.raises(MissingFileError, match="modgraft data fetch glassllm"):
        load("en")
    file = folder / "glassllm/weights/en.npz"
    with np.load(file) as data:
        arrays = {k: data[k] for k in data.files}
    np.savez(file, **arrays | {"E": arrays["E"][:5]})
    with pytest.raises(ModgraftError, match=r"no weights of glassllm 0\.1\.0: .*embed_tokens"):
        load("en", folder)


# -- the package itself ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package() -> Any:
    """Its own code, where ``modgraft data fetch glassllm`` has put it."""
    try:
        home = fetch.path("glassllm")
    except MissingFileError as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("glassllm", home / "glassllm" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["glassllm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [n for n in sys.modules if n.partition(".")[0] == "glassllm"]:
        del sys.modules[name]


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_writes_what_its_own_code_writes(package: Any, language: str) -> None:
    model, tokenizer = load(language)
    theirs, their_tokenizer = package.load_pretrained(language)
    begin = {"en": "Alice was beginning to get very tired", "pt": "Capitu olhou para mim"}[language]
    text = f"{begin},\n\n  “so”  — 12 ö ▁x\t"
    ids = their_tokenizer.encode(text)
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == their_tokenizer.decode(ids)
    ids = their_tokenizer.encode(begin)
    want = [step.token for step in theirs.generate(ids, 40, greedy=True)]
    logits = torch.from_numpy(theirs.forward(ids).data).float()
    for each in (model, from_transformers(model)):
        with torch.no_grad():
            got = each(input_ids=torch.tensor([ids])).logits
        torch.testing.assert_close(got, logits, atol=1e-5, rtol=0)
        written = each.generate(input_ids=torch.tensor([ids]), max_new_tokens=40, do_sample=False)
        assert written[0, len(ids) :].tolist() == want


def test_a_lora_learns_another_author(package: Any, tmp_path: Path) -> None:
    """The example, a few steps of it, on what the standard library says of itself."""
    from examples import another_author

    from modgraft.data.corpus import standard_library

    file = tmp_path / "text.txt"
    file.write_text(standard_library(60_000), "utf-8")
    before, after = another_author.learn(file, tmp_path / "author", steps=12)
    assert after < before - 0.1
    assert (tmp_path / "author" / "module.safetensors").is_file()
