"""``add_task`` gives a hypernetwork another task: old tasks stay, and the new one trains alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import modgraft as mg
from computation.hypernetworks import DE, FR, METHODS, drawn, grafted, run
from contract.hosts import HOSTS, QV, ids, tensor_of


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("name", METHODS)
def test_a_task_more_leaves_the_others_to_the_bit(
    name: str, hidden: int | None, tmp_path: Path
) -> None:
    module, at = METHODS[name]
    host, needs = grafted(module, at, hidden=hidden), module.side_source is not None
    host.implant("qa", mg.LoRA(rank=2), at=QV, active=False)
    with torch.no_grad():
        host["qa"].places[0].B.normal_(0, 0.3)
    old = (FR, DE, f"{FR} >> {DE} >> qa", f"qa >> {FR}")
    outs = [run(host, c, needs=needs) for c in old]
    handle, parameters = host["h"], list(host["h"].parameters())

    new = mg.add_task(host, "h", "it")
    assert host.composition is None
    assert host["h"] is handle
    assert handle.names == [FR, DE, "h['it']"]
    learn = {id(p) for p in handle.parameters()}
    assert learn == {id(p) for p in (*parameters, new)}
    assert all(
        torch.equal(run(host, c, needs=needs), out) for c, out in zip(old, outs, strict=True)
    )
    t = handle.places[0].state_dict()
    mean = (t["generator.tasks.0"] + t["generator.tasks.1"]) / 2
    torch.testing.assert_close(new.detach(), mean)
    mg.add_task(host, "h", "es", like="de")
    assert torch.equal(run(host, "h['es']", needs=needs), outs[1])
    with torch.no_grad():
        new.normal_(0, 0.3)
    made = run(host, "h['it']", needs=needs)
    assert not any(torch.equal(made, out) for out in outs)
    assert all(
        torch.equal(run(host, c, needs=needs), out) for c, out in zip(old, outs, strict=True)
    )

    twin = copy.deepcopy(host)
    with torch.no_grad():
        new.add_(1)
    assert torch.equal(run(twin, "h['it']", needs=needs), made)
    twin.save("h", tmp_path / "h")
    fresh = mg.Host(HOSTS["bert"].model()).eval()
    loaded = fresh.load(tmp_path / "h")
    assert loaded.names == [*handle.names[:3], "h['es']"]
    for composition, out in ((FR, outs[0]), (DE, outs[1]), ("h['it']", made)):
        assert torch.equal(run(fresh, composition, needs=needs), out)
    host.remove("h")
    host.remove("qa")
    assert not any("_modgraft_state" in m.__dict__ for m in host.model.modules())


def test_a_task_more_computes_what_the_equation_says() -> None:
    host = grafted(mg.Adapter(width=3), "output", hidden=5).double()
    new = mg.add_task(host, "h", "it")
    assert new.dtype == torch.float64
    plain = mg.Host(HOSTS["bert"].model()).eval()
    plain.implant("m", mg.Adapter(width=3), at="output")
    plain.double()
    for place, own in zip(host["h"].places, plain["m"].places, strict=True):
        for key, p in own.named_parameters():
            with torch.no_grad():
                p.copy_(drawn(host["h"], place, 2, key, p.shape))
    torch.testing.assert_close(run(host, "h['it']"), run(plain, "m"), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("hidden", [None, 16])
def test_its_embedding_alone_is_trained(hidden: int | None) -> None:
    """The task starts as fr, learns what de has learned, and changes neither."""
    host = grafted(mg.LoRA(rank=4), QV, stir=False, embedding=8, hidden=hidden)
    rows = {
        task: {"input_ids": ids(), "labels": ids(seed=seed), "modules": task}
        for task, seed in ((FR, 5), (DE, 6))
    }
    host.fit(list(rows.values()), train="h", steps=60, lr=2e-2, progress=False)
    host.eval()
    outs = {task: run(host, task) for task in (FR, DE)}
    new = mg.add_task(host, "h", "it", like="fr")
    before = {k: v.clone() for k, v in host["h"].tensors().items()}
    row = {**rows[DE], "modules": "h['it']"}
    first = host(**row).loss.item()
    host["h"].requires_grad_(False)
    new.requires_grad_(True)
    host.fit([row], steps=60, lr=2e-2, progress=False)
    host.eval()
    assert host(**row).loss.item() < 0.7 * first
    changed = [k for k, v in host["h"].tensors().items() if not torch.equal(v, before[k])]
    assert changed == [f"{host['h'].paths[0]}:generator.tasks.2"]
    assert all(torch.equal(run(host, task), out) for task, out in outs.items())


@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_a_task_more_in_compiled_code(name: str) -> None:
    host = grafted(mg.Adapter(width=3), HOSTS[name].adapter_at, name)
    torch._dynamo.reset()
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    host.use(FR)
    with torch.no_grad():
        first = tensor_of(compiled(**HOSTS[name].batch()))
        new = mg.add_task(host, "h", "it")
        new.normal_(0, 0.3)
        assert torch.equal(tensor_of(compiled(**HOSTS[name].batch())), first)
        host.use("h['it']")
        out = tensor_of(compiled(**HOSTS[name].batch()))
    torch.testing.assert_close(out, run(host, "h['it']", name), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, first)


def test_a_task_more_of_tokens_and_in_weights() -> None:
    host = grafted(mg.SoftPrompt(length=2), None, "gpt2")
    mg.add_task(host, "h", "it", like="de")
    batch = HOSTS["gpt2"].batch()
    batch.pop("labels", None)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5}
    out = host.generate(**batch, modules="h['it']", **settings)
    assert torch.equal(out, host.generate(**batch, modules=DE, **settings))
    host = grafted(mg.LoRA(rank=2), QV)
    mg.add_task(host, "h", "it", like="de")
    one, other = (host.merge(c)(**HOSTS["bert"].batch()).logits for c in ("h['it']", DE))
    assert torch.equal(one, other)
    mg.own_module(host, "h['it']", into="italian")
    assert torch.equal(run(host, "italian"), run(host, DE))


def test_what_is_no_task_more() -> None:
    host = grafted(mg.LoRA(rank=2), "query")
    host.implant("qa", mg.LoRA(rank=3), at=QV)
    for args, message in (
        (("h", "fr"), "has that task; its tasks are fr, de"),
        (("h", ""), r"a task is a name, as add_task\(host, 'h', 'it'\)"),
        (("h", 3), "a task is a name"),
        (("h", "it", "frr"), "like='frr' is no task of 'h'; its tasks are fr, de"),
        (("qa", "it"), r"'qa' is a LoRA, which has no tasks; mg\.HyperNetwork\(LoRA\(rank=3"),
        (("g", "it"), "no module 'g'"),
    ):
        with pytest.raises(mg.ModgraftError, match=message):
            mg.add_task(host, *args)
    assert host["h"].names == [FR, DE]
    mg.add_task(host, "h", "it's")
    assert torch.isfinite(run(host, 'h["it\'s"]')).all()
