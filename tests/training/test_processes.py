from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file

from modgraft.core.errors import ModgraftError
from modgraft.training import processes
from modgraft.training.fit import fit
from modgraft.training.processes import check_world
from modgraft.training.stream import label_tokens
from training import two_processes
from training.tiny import loader, t5

FAILS = """
import torch.distributed as dist
from torch.utils.data import DataLoader
from training.two_processes import GIVEN, host_of, rows

def collate(rows, read=[]):
    read.append(len(rows))
    if dist.get_rank() == 1 and len(read) == 4:
        raise ValueError("row 13 is broken")
    return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}

import torch
host_of().fit(DataLoader(rows(52), 2, collate_fn=collate), train="qa", steps=50, **GIVEN)
"""

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch was built without gloo",
)


def torchrun(*command: str | Path, at: Path) -> subprocess.CompletedProcess[str]:
    """Start two processes, and wait for them."""
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launch, *map(str, command)], cwd=at, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes have found, each; see `two_processes`."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(Path(two_processes.__file__), folder, at=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "find_unused_parameters" not in done.stderr  # a warning of DDP's
    return folder, json.loads((folder / "found.json").read_text())


def test_two_processes_train_the_weights_of_one(two):
    folder, found = two
    first, second = (load_file(folder / f"{rank}.safetensors") for rank in (0, 1))
    # one process with twice the batches a step sees the same examples in each step
    host = t5(dropout=0.0).double()
    data = loader(n=16, batch=2, noisy=False, shuffle=False)
    fit(host, data, steps=4, lr=1e-3, weigh=label_tokens, accumulate=4, progress=False)
    for name, p in host.named_parameters():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], p.detach(), rtol=1e-9, atol=1e-12)
    assert (folder / "run" / "metrics.jsonl").read_text().count("\n") == 4 + 2
    assert found[0]["accumulated"] == found[1]["accumulated"]


@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_the_loss_curve_is_that_of_one_process_with_the_same_batches(two, way):
    """Over the end of an epoch, where the first process alone has a batch."""
    one = two_processes.curve(two_processes.over_an_epoch(two_processes.host_of(), 8))
    assert len(one["losses"]) == 14
    assert one["untouched"]  # a module that no process uses
    for here in two[1]:
        for name in ("losses", "evaluations"):
            assert here[way][name] == pytest.approx(one[name], abs=1e-5)
        assert here[way]["untouched"] == one["untouched"]


def test_only_module_parameters_are_sent(two):
    for found in two[1]:
        sent = found["sent"]
        modules = sent["modules"] + 1  # and the number that DDP finds unused
        assert max(sent["gloo:broadcast"]) == modules
        assert sent["gloo:all_reduce"].count(modules) == 3  # a step each
        rest = sum(sent["gloo:broadcast"] + sent["gloo:all_reduce"]) - 4 * modules
        assert rest < 100  # losses, how they are weighed, which parameters were used
        assert sent["host"] > 20 * modules


def test_what_fully_shard_has_spread_is_saved_as_the_whole_host(two):
    folder, found = two
    host = two_processes.host_of()
    host.remove("qa")
    host.load(folder / "qa")  # which compares the hosts by every value
    batch = next(iter(two_processes.shuffled(4)))
    merged = host.merge("qa")
    torch.testing.assert_close(merged(**batch).loss, host(**batch).loss)
    assert all(
        "merge modules in one process" in each["sharded"]["refused"].lower() for each in found
    )


def test_processes_that_read_different_tasks_are_one_with_both(two):
    one = two_processes.curve(two_processes.two_tasks(accumulate=2))
    for found in two[1]:
        assert found["tasks"]["losses"] == pytest.approx(one["losses"], abs=1e-6)
        assert found["tasks"]["parts"] == [pytest.approx(parts, abs=1e-6) for parts in one["parts"]]
    assert any(len(parts) == 2 for parts in one["parts"])


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_a_whole_model_with_sparse_tables_trains_by_any_optimizer(two, optimizer):
    one = two_processes.whole_model(8, optimizer)
    for found in two[1]:
        assert found["tables"][optimizer] == pytest.approx(one, abs=1e-5)


def test_an_evaluation_is_of_one_model_whose_statistics_move(two):
    first, second = (found["moving"] for found in two[1])
    assert first == second


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("host", r"model\.embedding\.weight: other weights.* more"),
        ("module", r"implants\.qa\.places\.0\.A: shape \[3, 32\] there, \[2, 32\] here"),
        ("lr", r"lr: 0\.002 there, 0\.001 here"),
        ("data", r".*the first batch: .*fit itself gives each its own share"),
    ],
)
def test_processes_that_differ_are_told_all_of_them(two, what, words):
    said = r"process 1 \(there\) differs from process 0 \(here\): " + words
    assert all(re.match(said, found["unlike"][what]) for found in two[1])


def test_an_error_in_one_process_ends_all(tmp_path):
    (tmp_path / "script.py").write_text(FAILS)
    done = torchrun("script.py", at=tmp_path)
    assert done.returncode != 0
    assert "ValueError: row 13 is broken" in done.stderr


def test_the_world_is_asserted(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    check_world(1)
    check_world(4, 4)
    with pytest.raises(
        ModgraftError, match=r"4 processes were asked for and 1 run; use .*torchrun"
    ):
        check_world(1, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModgraftError, match="2 processes were asked for and 1 run"):
        check_world(1)


def test_accelerate_launch_that_started_one_process_is_caught(tmp_path):
    """The launcher has been seen to run one process of two without a word."""
    (tmp_path / "script.py").write_text(
        "from modgraft.training.processes import accelerator_for, check_world\n"
        "check_world(accelerator_for().num_processes)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "MASTER_ADDR")}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, "--num_machines", "1", "--mixed_precision", "no", "script.py"],
        cwd=tmp_path, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "asked for several processes and started one" in done.stderr


def test_a_launcher_that_asks_for_another_way_is_told(monkeypatch):
    """As ``accelerate launch --use_fsdp`` does."""
    other = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(processes, "Accelerator", lambda **_: other)
    with pytest.raises(ModgraftError, match=r"set to FSDP, and fit trains by DDP.*fully_shard"):
        processes.accelerator_for()
