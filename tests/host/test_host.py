"""Host beyond the contract: transformers' Trainer, DDP, threads and compilation."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import modgraft as mg
from contract.hosts import BATCH, FEATURES, HOSTS, QV, ids, side


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": ids()[i % BATCH], "labels": ids(5, 5)[i % BATCH], "row": i % BATCH}


def gather(rows: list[dict[str, Any]]) -> dict[str, Any]:
    given, picked = side(), [r["row"] for r in rows]
    return {
        "input_ids": torch.stack([r["input_ids"] for r in rows]),
        "labels": torch.stack([r["labels"] for r in rows]),
        "side": {"image": mg.Side(given.tensor[picked], given.mask[picked])},
    }


def test_the_trainer_of_transformers_trains_a_host(tmp_path: Path) -> None:
    host = mg.Host(HOSTS["t5"].model())
    host.implant("fusion", mg.GatedFusion(dim=FEATURES), at="encoder.output")
    host.implant("lora", mg.LoRA(rank=2), at=QV)
    theta = {k: v.clone() for k, v in host.model.state_dict().items()}
    phi = {k: v.clone() for k, v in host.implants.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=40, learning_rate=3e-2,
        report_to=[], remove_unused_columns=False, use_cpu=True, label_names=["labels"],
        eval_strategy="steps", eval_steps=6, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        host, arguments, data_collator=gather, train_dataset=Rows(), eval_dataset=Rows()
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert any("eval_loss" in row for row in trainer.state.log_history)
    assert all(torch.equal(v, theta[k]) for k, v in host.model.state_dict().items())
    assert all(not torch.equal(v, phi[k]) for k, v in host.implants.state_dict().items())


def test_threads_do_not_see_each_others_compositions() -> None:
    case = HOSTS["gpt2"]
    host = mg.Host(case.model()).eval()
    for name in ("a", "b"):
        host.implant(name, mg.LoRA(rank=4), at=QV)
        with torch.no_grad():
            for p in host[name].parameters():
                p.normal_(0, 0.3)
    wanted = ["a", "b", None, "a + b"] * 6

    def run(composition: str | None) -> torch.Tensor:
        with torch.no_grad(), host.using(composition):
            return host(**case.batch()).logits

    alone = [run(c) for c in wanted]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, wanted))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_hidden_states_are_still_recorded() -> None:
    case = HOSTS["t5"]
    host = mg.Host(case.model()).eval()
    host.implant("fusion", mg.GatedFusion(dim=FEATURES), at="encoder.output")
    out = host(**case.batch(), side={"image": side()}, output_hidden_states=True)
    assert len(out.encoder_hidden_states) == 3
    assert len(out.decoder_hidden_states) == 3
    host.remove("fusion")
    host.implant("inside", mg.GatedFusion(dim=FEATURES), at="encoder.block.0")
    out = host(**case.batch(), side={"image": side()}, output_hidden_states=True)
    assert len(out.encoder_hidden_states) == 3


def test_ddp_on_two_processes(tmp_path: Path) -> None:
    """Each rank has half of the batch with its side inputs; the gradients are those of one process
    with the whole batch."""
    script = tmp_path / "ddp.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch, torch.distributed as dist
            sys.path.insert(0, sys.argv[1])
            from contract.hosts import HOSTS, QV, FEATURES, side, ids
            import modgraft as mg
            torch.set_num_threads(1)
            dist.init_process_group("gloo")
            rank, world = dist.get_rank(), dist.get_world_size()
            assert world == 2, world
            host = mg.Host(HOSTS["t5"].model())
            torch.manual_seed(0)
            host.implant("fusion", mg.GatedFusion(dim=FEATURES), at="encoder.output")
            host.implant("lora", mg.LoRA(rank=2), at=QV)
            net = torch.nn.parallel.DistributedDataParallel(host)
            x, y = ids()[:2], ids(5, 5)[:2]
            given = side()
            def loss(model, rows):
                one = mg.Side(given.tensor[rows], given.mask[rows])
                return model(input_ids=x[rows], labels=y[rows], side={"image": one}).loss
            loss(net, slice(rank, rank + 1)).backward()
            shared = [p.grad.clone() for p in host.implants.parameters()]
            host.zero_grad()
            loss(host, slice(0, 2)).backward()
            for a, p in zip(shared, host.implants.parameters()):
                torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)
            dist.destroy_process_group()
            print("equal on rank", rank)
            """
        )
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        str(script), str(Path(__file__).parents[1]),
    ]  # fmt: skip
    out = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count("equal on rank") == 2


def test_one_host_a_model() -> None:
    host = mg.Host(HOSTS["gpt2"].model())
    host.implant("m", mg.LoRA(rank=2), at="query")
    other = mg.Host(host.model)
    with pytest.raises(mg.ModgraftError, match="another Host has modules"):
        other.implant("n", mg.LoRA(rank=2), at="value")
    mg.Host(host.merge(None)).implant("n", mg.LoRA(rank=2), at="value")
    with pytest.raises(mg.ModgraftError, match="a Host already"):
        mg.Host(host)


def test_compositions_that_are_none() -> None:
    host = mg.Host(HOSTS["gpt2"].model())
    host.implant("m", mg.LoRA(rank=2), at="query")
    batch = HOSTS["gpt2"].batch()
    with pytest.raises(mg.ModgraftError, match="gives 5 compositions for a batch of"):
        host(**batch, modules=["m", None, "m", "m", None])
    with pytest.raises(mg.ModgraftError, match="one composition for each example"):
        host(**batch, modules=[])
    with pytest.raises(mg.ModgraftError, match="a composition is a text"):
        host(**batch, modules=3)


@torch.no_grad()
def test_compiled_in_another_order_than_they_were_implanted() -> None:
    case = HOSTS["bert"]
    host = mg.Host(case.model()).eval()
    for name in ("m", "n"):
        host.implant(name, mg.Adapter(width=4), at="down")
        for p in host[name].parameters():
            p.normal_(0, 0.3)
    torch._dynamo.reset()
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    bare = host(**case.batch(), modules=None).logits
    for composition in ("n >> m", "m - 2*n"):
        with host.using(composition):
            out = compiled(**case.batch()).logits
            torch.testing.assert_close(out, host(**case.batch()).logits)
            assert not torch.allclose(out, bare)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="before the call"):
        compiled(**case.batch(), modules="n >> m")


@pytest.mark.parametrize("name", ["names", "computation", "at_sites", "paths", "method", "tensors"])
def test_a_module_may_be_called_as_a_method_of_the_engine(name: str, tmp_path: Path) -> None:
    host = mg.Host(HOSTS["t5"].model())
    host.implant(name, mg.LoRA(rank=2), at=QV)
    host.save(name, tmp_path / "m")
    assert host.implants[name] is host[name]
    twin = copy.deepcopy(host)
    twin.remove(name)
    assert name not in twin
    assert twin.load(tmp_path / "m").paths == host[name].paths
