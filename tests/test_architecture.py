"""docs/architecture.md is walked: it names the files that a path enters, in their order."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import modgraft as mg
from modgraft.log import Log

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text("utf-8")
ROOT = f"{Path(mg.__file__).parent}/"
IDS = torch.arange(3, 51).view(2, 24) % 57


def entered(run: Callable[[], Any]) -> list[str]:
    """Return the package's files in which a function is called, in the order of the first call."""
    files: dict[str, None] = {}

    def profile(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        a_function = code.co_flags & inspect.CO_OPTIMIZED  # no module or class being defined
        if event == "call" and a_function and code.co_filename.startswith(ROOT):
            files.setdefault(code.co_filename.removeprefix(ROOT))

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return list(files)


def gpt2() -> mg.Host:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=60)
    host = mg.Host(GPT2LMHeadModel(config))
    host.implant("qa", mg.LoRA(rank=4), at=["query", "value"])
    host.implant("style", mg.LoRA(rank=4), at=["query", "value"], active=False)
    return host


def a_batch(folder: Path) -> Callable[[], Any]:
    host = gpt2()
    return lambda: host(input_ids=IDS, labels=IDS).loss.backward()


def a_side_input(folder: Path) -> Callable[[], Any]:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    host = mg.Host(
        T5ForConditionalGeneration(T5Config(vocab_size=60, decoder_start_token_id=0, **shape))
    )
    host.implant("fusion", mg.GatedFusion(source="image", dim=8), at="encoder.output")
    side = {"image": mg.Side(torch.randn(2, 3, 8))}
    return lambda: host(input_ids=IDS, labels=IDS, side=side)


def a_composition(folder: Path) -> Callable[[], Any]:
    host = gpt2()
    return lambda: host.use("qa + 0.5*style")


def a_folder(folder: Path) -> Callable[[], Any]:
    host = gpt2()

    def there_and_back() -> None:
        host.save("qa", folder / "qa")
        host.load(folder / "qa", name="copy")

    return there_and_back


def a_question(folder: Path) -> Callable[[], Any]:
    notes = folder / "log"
    notes.mkdir()
    (notes / "n.md").write_text("# n\n\n[skim(@a2020)] a paper on fusion\n", "utf-8")
    log = Log.open(notes, index=folder / "index.db")
    log.index()
    return lambda: log.ask("what did I skim?")


PATHS = {
    "A batch": a_batch,
    "A side input": a_side_input,
    "A composition's text": a_composition,
    "A module to its folder and back": a_folder,
    "A question to the log": a_question,
}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Walk the paths in a fresh process, in which nothing has been cached or hooked yet."""
    folder = tmp_path_factory.mktemp("paths")
    environment = os.environ | {"PYTHONPATH": str(Path(mg.__file__).parents[1])}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("title", list(PATHS))
def test_a_path_is_walked_as_it_is_written(title: str, walked: dict[str, list[str]]) -> None:
    section = PAGE.split(f"### {title}\n", 1)[1].split("\n### ")[0]
    written = re.findall(r"^([\w/]+\.py) ", section.split("```")[1], flags=re.MULTILINE)
    assert walked[title] == written


if __name__ == "__main__":
    print(json.dumps({title: entered(path(Path(sys.argv[1]))) for title, path in PATHS.items()}))
