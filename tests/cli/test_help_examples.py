"""Every example of the command line's help runs, each in a fresh folder that has what it names.

Examples of minutes run as small as they can; ``make examples`` runs those, ``make test`` the
others. What needs a network or a bucket is tried without, and is refused in words. A server is
started, asked once, and stopped.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import peft
import pytest
import torch
import typer.main
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import modgraft as mg
from command import SMALL, modgraft
from modgraft.cli.app import app
from modgraft.data.shards import character_tokenizer
from modgraft.models.bag import train_wordpiece
from modgraft.models.gpt import GPT, GPTConfig

ALL = os.environ.get("EXAMPLES") == "all"
TINY = ["--quick", "0.02", "--seeds", "0", "--jobs", "1", *SMALL]

LONG: dict[str, list[str]] = {
    "mmcot train": TINY,
    "mmcot train --rows all --seeds 0,1,2 --run runs/table": [*TINY, "--rows", "fused"],
    "ladder docs/log.md docs/routing.md docs/hub.md": ["--steps", "3", "--rungs", "nothing,lora_1"],
    "ladder reviews.csv --model my-encoder --parameters 100k": ["--steps", "6"],
    "ladder docstrings --memory 500M": [
        "--quick", "0.05", "--steps", "3", "--rungs", "nothing,lora_1",
    ],
    "ladder digitsqa --rungs nothing,lora_4,full": ["--quick", "0.01", "--steps", "3"],
    "recipe chargpt --set corpus=shakespeare.txt": [
        "--quick", "0.01", "--seeds", "0", "--jobs", "1", "--run", "runs/chars",
    ],
    "recipe madx --seeds 0,1,2": ["--quick", "0.01", "--seeds", "0", "--jobs", "1"],
    "recipe madx --quick 0.1 --seeds 0 --run runs/look": ["--quick", "0.01", "--jobs", "1"],
}  # fmt: skip
"""Examples that take minutes, with what makes them small (a later option replaces an earlier)."""

NEEDS_A_RUN = ("mmcot evaluate", "mmcot ask", "report ")
"""Examples that need what ``mmcot train`` leaves."""

REFUSED: dict[str, str] = {
    "mmcot train --data ScienceQA/data": "ScienceQA/data",
    "hub push modules/qa hf:me/qa-lora": "hf:me/qa-lora",
    "hub pull hf:me/qa-lora@main": "hf:me/qa-lora",
    "hub show hf:me/qa-lora": "hf:me/qa-lora",
    'hub lock "fr >> qa" mix.lock.json --module fr=hf:me/fr-lora': "hf:me/fr-lora",
    "hub list qa --hub s3://team/modules": "s3://team/modules",
    "data fetch glassllm": "glassllm 0.1.0 could not be fetched by pip",
    "data fetch flags": "flag-icons",  # npm may be missing
    "data path glassllm": "modgraft data fetch glassllm",
}
"""Examples that need a network, a bucket or somebody's data set, and what the refusal says."""

UNSURE = {'ask "what did the last mmcot run': {2}, "mmcot ask": {0, 2, 3}}
"""Examples that here may have no answer, which their exit codes say: no run has left a note for the
log, and a run as small as can be has learned nothing."""

OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "npm_config_offline": "true"}
"""What keeps the clients of package registries from the network."""

SERVED = ("log page",)


def commands(command: click.Command, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the help of a command and of all below it, by name."""
    yield path.strip(), command.help or ""
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, f"{path} {name}")


def examples() -> list[str]:
    """List the examples of all commands, without what is said beside them."""
    found = []
    for _, text in commands(typer.main.get_command(app)):
        for block in text.split("\n\n"):
            words = " ".join(line.strip() for line in block.splitlines())
            if match := re.match(r"modgraft (.+?)(?: {3,}.*)?$", words):
                found.append(match[1].strip())
    return list(dict.fromkeys(found))


EXAMPLES = examples()


def refusal(example: str) -> str | None:
    return next((says for start, says in REFUSED.items() if example.startswith(start)), None)


def quick(example: str) -> bool:
    return example not in LONG and not example.startswith(NEEDS_A_RUN)


# -- the folder that the examples are run in ------------------------------------------------------


def _model(
    seed: int, kind: type[PreTrainedModel] = BertForMaskedLM, **more: Any
) -> PreTrainedModel:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 41}
    return kind(BertConfig(num_attention_heads=2, max_position_embeddings=32, **size, **more))


NOTE = """# gated_fusion

## Log

- [skim(@pfeifferModularDeepLearning2023) -> _digging]
    - modules at sites
- [question -> is the gate open?]
- [lesson_learned -> a control first]

## Learned
"""
SOURCES = """@article{pfeifferModularDeepLearning2023, title={Modular Deep Learning},
  author={Pfeiffer, Jonas}, year={2023}}
@article{huLoRA2021, title={LoRA}, author={Hu, Edward}, year={2021}}
"""


def _build(folder: Path) -> None:
    """Write models, modules, a hub, a lock file and a log, as the examples name them."""
    for name in ("my-model", "bert-base-uncased", "pretrained", "before"):
        _model(0).save_pretrained(folder / name)
    (folder / "shakespeare.txt").write_text("Now is the winter of our discontent\n" * 200)
    home, writes = folder / "runs" / "chargpt" / "seed0", GPTConfig(vocab_size=96, hidden_size=8)
    GPT(writes).save_pretrained(home / "fast_long" / "model")
    character_tokenizer("\n" + "".join(map(chr, range(32, 127)))).save(f"{home}/tokenizer.json")
    for seed, name in enumerate(("seed0", "seed1", "seed2", "math", "code", "after"), 1):
        model = _model(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))
        torch.manual_seed(seed)
        model.save_pretrained(folder / name)
    host = mg.Host(_model(0)).eval()
    for name in ("qa", "style", "qa_longer", "theirs"):
        host.implant(name, mg.LoRA(rank=4), at=["query", "value"])
        with torch.no_grad():
            for parameter in host[name].parameters():
                parameter.normal_(0, 0.1)
    about: dict[str, Any] = {"metrics": {"f1": 0.9}, "task": "squad"}
    host.save("qa", folder / "modules" / "qa", **about)
    host.save("style", folder / "modules" / "style")
    host.save("qa_longer", folder / "modules" / "qa-longer")
    host.save("theirs", folder / "some-peft-adapter", format="peft")
    config = folder / "some-peft-adapter" / "adapter_config.json"
    said = json.loads(config.read_text("utf-8")) | {"base_model_name_or_path": "bert-base-uncased"}
    config.write_text(json.dumps(said), "utf-8")
    classifier = _model(0, BertForSequenceClassification, num_labels=3)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        peft.get_peft_model(classifier, lora).save_pretrained(folder / "classifier-lora")

    hub = mg.Hub(folder / "hub")
    hub.push(folder / "modules" / "qa")
    host.save("qa_longer", folder / "other")
    hub.push(folder / "other", "qa", "paper")
    hub.push(folder / "modules" / "style")
    for name in ("modules.lock.json", "mix.lock.json"):
        mg.lock("0.5*qa + style", hub=hub).write(folder / name)

    encoder = _model(0, BertForSequenceClassification, num_labels=2)
    encoder.save_pretrained(folder / "my-encoder")
    words = PreTrainedTokenizerFast(
        tokenizer_object=train_wordpiece(["good bad"], 30), pad_token="[PAD]", unk_token="[UNK]"
    )
    words.save_pretrained(folder / "my-encoder")
    reviews = [f"{i} {word},{word}\n" for i in range(20) for word in ("good", "bad")]
    (folder / "reviews.csv").write_text("text,label\n" + "".join(reviews), "utf-8")
    (folder / "docs").mkdir()
    for name in ("log", "routing", "hub"):
        sentences = [f"The {name} has {i} words of its own.\n" for i in range(12)]
        (folder / "docs" / f"{name}.md").write_text("".join(sentences), "utf-8")
    (folder / "log").mkdir()
    (folder / "log" / "gated_fusion.md").write_text(NOTE, "utf-8")
    (folder / "log" / "fusion.md").write_text(NOTE.replace("gated_", ""), "utf-8")
    (folder / "log" / "sources.bib").write_text(SOURCES, "utf-8")
    Image.new("L", (24, 8), 0).save(folder / "strip.png")
    page = "<!-- results:mmcot -->\n<!-- /results -->\n"
    (folder / "docs" / "mmcot.md").write_text(page, "utf-8")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "template"
    folder.mkdir()
    _build(folder)
    return folder


@pytest.fixture
def fresh(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    shutil.copytree(template, folder)
    monkeypatch.setenv("MODGRAFT_HUB", str(folder / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    return folder


def started(example: str, *more: str) -> None:
    result = modgraft(*shlex.split(example), *more)
    assert "Traceback" not in result.err + result.out
    if says := refusal(example):
        assert result.code == 1, result
        assert says in result.err, result
    else:
        codes = next((codes for start, codes in UNSURE.items() if example.startswith(start)), {0})
        assert result.code in codes, result


def test_every_command_has_an_example() -> None:
    named = [name for name, text in commands(typer.main.get_command(app)) if "Example" not in text]
    groups = {"", "data", "hub", "log", "mmcot"}
    assert set(named) <= groups, f"without an example: {set(named) - groups}"
    assert len(EXAMPLES) > 50
    assert not [start for start in REFUSED if not any(e.startswith(start) for e in EXAMPLES)]
    assert LONG.keys() <= {*EXAMPLES}


@pytest.mark.parametrize("example", [e for e in EXAMPLES if quick(e) and not e.startswith(SERVED)])
def test_an_example(example: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start, note in {"log new": "gated_fusion", "log add": "fusion"}.items():
        if example.startswith(start):  # what is new is not there; one of one note needs no name
            (fresh / "log" / f"{note}.md").unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # to what is asked before a removal
    started(example)


@pytest.mark.skipif(not ALL, reason="takes minutes: make examples")
@pytest.mark.parametrize("example", LONG)
def test_a_long_example(example: str, fresh: Path) -> None:
    started(example, *LONG[example])
    if example.startswith("mmcot train --rows all"):
        started(next(e for e in EXAMPLES if e.startswith("report ")), "--name", "mmcot")


@pytest.mark.skipif(not ALL, reason="takes minutes: make examples")
def test_examples_that_need_a_run(fresh: Path) -> None:
    for run in ("runs/mmcot", "runs/table"):
        result = modgraft("mmcot", "train", "--rows", "fused,shuffled", "--run", run, *TINY)
        assert result.code == 0, result
    strip = next(Path("runs/mmcot/seed0/data/images").rglob("image.png"))
    shutil.copy(strip, "strip.png")
    for example in (e for e in EXAMPLES if e.startswith(NEEDS_A_RUN)):
        started(example)


@pytest.mark.parametrize("example", SERVED)
def test_a_server_starts_and_answers(example: str, fresh: Path) -> None:
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "modgraft", *shlex.split(example), "--port", port]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            address = re.search(r"http://\S+", server.stderr.readline())
            assert address
            for _ in range(100):
                try:
                    page = urllib.request.urlopen(address[0]).read()
                    break
                except OSError:
                    time.sleep(0.1)
            assert b"gated_fusion" in page
        finally:
            server.terminate()
