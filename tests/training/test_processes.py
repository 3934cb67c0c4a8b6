from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modgraft.core.errors import ModgraftError
from modgraft.training.fit import fit
from modgraft.training.processes import check_world
from modgraft.training.stream import label_tokens
from training.tiny import loader, t5

SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from training.tiny import loader, t5
from modgraft.training.fit import fit
from modgraft.training.stream import label_tokens
import torch.distributed as dist

folder, steps = sys.argv[1], 4
host = t5(dropout=0.0).double()
given = dict(lr=1e-3, weigh=label_tokens, accumulate=2, evaluate=loader(n=9, noisy=False),
             evaluate_every=2, folder=folder + "/run", progress=False, save_every=2)
data = loader(n=16, batch=2, noisy=False, shuffle=False)
history = fit(host, data, steps=steps, **given)
rank = dist.get_rank()
weights = {n: p.detach().clone() for n, p in host.named_parameters()}
save_file(weights, f"{folder}/{rank}.safetensors")
again = fit(t5(3, dropout=0.0).double(), data, steps=steps, **given)
assert again.losses == history.losses, rank
assert [e["loss"] for e in again.evaluations] == [e["loss"] for e in history.evaluations], rank
assert again.resumed_from == steps
dist.destroy_process_group()
"""


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch was built without gloo",
)
def test_two_processes_train_the_weights_of_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "script.py", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    # one process with twice the batches a step sees the same examples in each step
    host = t5(dropout=0.0).double()
    data = loader(n=16, batch=2, noisy=False, shuffle=False)
    fit(host, data, steps=4, lr=1e-3, weigh=label_tokens, accumulate=4, progress=False)
    for name, p in host.named_parameters():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], p.detach(), rtol=1e-9, atol=1e-12)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 4 + 2


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
