"""HyperNetwork: the tensors it generates for each method, which task acts, and training."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modgraft as mg
from common import counted, forge
from computation.hypernetworks import DE, FR, METHODS, TASKS, drawn, grafted, run
from computation.methods import Nothing
from contract.hosts import FEATURES, HOSTS, QV, WIDTH, ids, tensor_of

# -- over every method --------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("name", METHODS)
def test_it_generates_the_tensors_of_any_method(
    name: str, hidden: int | None, tmp_path: Path
) -> None:
    """Each task acts as the method itself does with the tensors that the equation gives."""
    module, at = METHODS[name]
    host = grafted(module, at, hidden=hidden).double()
    needs = module.side_source is not None
    plain = mg.Host(HOSTS["bert"].model()).eval()
    plain.implant("m", module, at=at).double()
    plain.double()
    h = host["h"]
    outs = {}
    for number, task in enumerate(TASKS):
        for place, own in zip(h.places, plain["m"].places, strict=True):
            for key, p in own.named_parameters():
                with torch.no_grad():
                    p.copy_(drawn(h, place, number, key, p.shape))
        outs[task] = run(host, f"h['{task}']", needs=needs)
        torch.testing.assert_close(outs[task], run(plain, "m", needs=needs), rtol=1e-8, atol=1e-9)
    assert not torch.allclose(outs["fr"], outs["de"])

    twin = copy.deepcopy(host)
    with torch.no_grad():
        for p in host["h"].parameters():
            p.add_(1)
    for task in TASKS:
        assert torch.equal(run(twin, f"h['{task}']", needs=needs), outs[task])
    twin.save("h", tmp_path / "h")
    fresh = mg.Host(HOSTS["bert"].model()).eval()
    loaded = fresh.double().load(tmp_path / "h", strict=False)
    assert repr(loaded.method) == repr(h.method)
    assert fresh.composition is None  # the user says which task acts
    for task in TASKS:
        assert torch.equal(run(fresh, f"h['{task}']", needs=needs), outs[task])
    assert loaded.size == h.size == sum(t.numel() for t in learned(loaded))


def learned(implant: mg.Implant) -> list[Tensor]:
    """List the stored tensors, without the masks."""
    return [t for t in implant.tensors().values() if t.is_floating_point()]


@pytest.mark.parametrize("name", METHODS)
def test_each_task_is_born_as_its_module(name: str) -> None:
    module, at = METHODS[name]
    host = grafted(module, at, stir=False)
    needs = module.side_source is not None
    bare = run(host, None)
    for task in (FR, DE):
        assert torch.equal(run(host, task, needs=needs), bare) == module.identity
        for _, view in host["h"].at_sites(task):
            start = {k: b for k, b in host["h"].places[0].state_dict().items() if "bias" in k}
            for key, shape in shapes(module, at).items():
                drawn_at_birth = start[f"generator.heads.{key.replace('.', '-')}-{shape}.bias"]
                value: Any = view
                for part in key.split("."):
                    value = getattr(value, part, None)
                if isinstance(value, Tensor):  # Compacter's A is at the first site alone
                    assert torch.equal(value.flatten(), drawn_at_birth)


def shapes(module: mg.Computation, at: Any) -> dict[str, str]:
    host = mg.Host(HOSTS["bert"].model())
    place = host.implant("m", module, at=at).places[0]
    return {k: "x".join(map(str, p.shape)) for k, p in place.named_parameters()}


def test_gradients() -> None:
    """Gradients of t, s, H and b equal finite differences."""
    host = grafted(mg.Adapter(width=2), "0", "plain").double()
    names = [k for k, _ in host["h"].named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in host["h"].parameters())
    x = HOSTS["plain"].batch()["input"][:1, :2].double()

    def out(*tensors: Tensor) -> Tensor:
        own = {f"implants.h.{k}": t for k, t in zip(names, tensors, strict=True)}
        with host.using("h['fr'] - 0.5*h['de']"):
            return torch.func.functional_call(host, own, (x,))

    assert torch.autograd.gradcheck(out, values)


@pytest.mark.parametrize("name", METHODS)
def test_a_task_becomes_a_module_of_its_own(name: str, tmp_path: Path) -> None:
    """The module computes bit by bit what the task did, and is saved without the generator."""
    module, at = METHODS[name]
    host, needs = grafted(module, at), module.side_source is not None
    out = run(host, DE, needs=needs)
    made = mg.own_module(host, DE, into="de")
    assert repr(made.method) == repr(module)
    assert host.composition is None
    torch.testing.assert_close(run(host, "de", needs=needs), out)
    # generated tensors are no parameters: for weights that train, torch may take another kernel
    host["de"].requires_grad_(False)
    assert torch.equal(run(host, "de", needs=needs), out)
    host.remove("h")
    host.save("de", tmp_path / "de")
    fresh = mg.Host(HOSTS["bert"].model()).eval()
    fresh.load(tmp_path / "de").requires_grad_(False)
    assert torch.equal(run(fresh, "de", needs=needs), out)


def test_a_shared_module_becomes_one_with_tensors_at_each_site() -> None:
    host = mg.Host(HOSTS["bert"].model()).eval()
    for name, module in (("m", mg.SparseDelta(density=0.1)), ("n", mg.LoRA(rank=2))):
        host.implant(name, mg.Shared(module), at="query")
    place: Any = host["m"].places[0]
    place.keep(torch.arange(20))
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0, 0.3)
    out = run(host, "m + n")
    host.use(None)
    mg.own_module(host, "m", into="a")
    assert host["a"].size == 2 * host["m"].size == 40
    mg.own_module(host, "n", into="b")
    assert torch.equal(run(host, "a + b"), out)
    for wrong, message in (
        ("m + n", "one module or one task"),
        ("2*m", "one module or one task"),
        ("x", "no module 'x'"),
    ):
        with pytest.raises(mg.ModgraftError, match=message):
            mg.own_module(host, wrong, into="c")
    with pytest.raises(mg.ModgraftError, match="implanted already"):
        mg.own_module(host, "m", into="a")


# -- which task acts ----------------------------------------------------------------------------


def test_tasks_in_compositions() -> None:
    host = grafted(mg.LoRA(rank=2), QV)
    host.implant("qa", mg.Adapter(width=3), at="output", active=False)
    with torch.no_grad():
        for p in host["qa"].parameters():
            p.normal_(0, 0.3)
    host.use(FR)
    assert str(host.composition) == FR
    host.use(f"{FR} >> qa")
    stacked = run(host, ...)
    host.use(None)
    assert torch.equal(run(host, "h['fr'] >> qa"), stacked)
    a, b, mixed = (
        host.merge(c)(**HOSTS["bert"].batch()).logits for c in (FR, DE, f"0.5*{FR} + 0.5*{DE}")
    )
    torch.testing.assert_close(a, run(host, FR), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed, run(host, f"0.5*{FR} + 0.5*{DE}"), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(a, b)
    with pytest.raises(mg.ModgraftError, match=r"a composition; a module is host\['h'\]"):
        host[FR]
    assert host["h"].names == [FR, DE]
    host.use(f"{FR} >> qa >> {DE}")
    host.remove("h")
    assert str(host.composition) == "qa"
    with pytest.raises(mg.ModgraftError, match="no module 'h'"):
        host.use(FR)
    host.remove("qa")
    assert not any("_modgraft_state" in m.__dict__ for m in host.model.modules())


def test_the_table_shows_which_tasks_are_in_force() -> None:
    host = grafted(mg.LoRA(rank=2), "query")
    host.use(f"{FR} - 0.5*{DE}")
    assert f"{FR}, {DE} × -0.5" in repr(host)
    assert "HyperNetwork(module=LoRA(rank=2), tasks=('fr', 'de'), embedding=4)" in repr(host)


def test_a_task_has_to_be_said() -> None:
    host = grafted(mg.LoRA(rank=2), "query")
    with pytest.raises(mg.ModgraftError, match=r"has 2 tasks and 'h' does not say which; write"):
        host.use("h")
    with pytest.raises(mg.ModgraftError, match=r"no task 'frr'; .* did you mean h\['fr'\]"):
        host(**HOSTS["bert"].batch(), modules="h['frr']")
    two = mg.HyperNetwork(mg.LoRA(rank=2), tasks=TASKS)
    with pytest.raises(mg.ModgraftError, match=r"active=False\), then host\.use\(\"g\['fr'\]\"\)"):
        host.implant("g", two, at="query")
    assert "g" not in host
    host.implant("one", mg.HyperNetwork(mg.LoRA(rank=2), tasks=["only"]), at="query")
    assert str(host.composition) == "one['only']"
    assert torch.equal(run(host, "one"), run(host, "one['only']"))


@pytest.mark.parametrize("name", ["t5", "gpt2", "vit", "plain"])
def test_one_graph_for_all_tasks(name: str) -> None:
    host = grafted(mg.Adapter(width=3), HOSTS[name].adapter_at, name, hidden=5)
    host.implant("qa", mg.LoRA(rank=2), at=HOSTS[name].lora_at, active=False)
    compiled, graphs = counted(host)
    for composition in (FR, None, DE, f"{FR} >> qa", f"0.3*{DE}", f"{FR} >> 2*{DE} >> qa"):
        host.use(composition)
        with torch.no_grad():
            batch = HOSTS[name].batch()
            torch.testing.assert_close(
                tensor_of(compiled(**batch)), tensor_of(host(**batch)), rtol=1e-4, atol=1e-5
            )
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_tasks_generate_by_the_cache_as_without(name: str) -> None:
    host = grafted(mg.LoRA(rank=2), QV, name)
    batch = HOSTS[name].batch()
    batch.pop("labels", None)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    for task in (FR, DE):
        out = host.generate(**batch, modules=task, **settings)
        assert torch.equal(out, host.generate(**batch, modules=task, use_cache=False, **settings))
        assert torch.equal(out, host.merge(task).generate(**batch, **settings))


def test_threads_with_two_tasks_at_once() -> None:
    host = grafted(mg.GatedFusion(dim=FEATURES, form="released"), "encoder.output")
    wanted = [FR, DE, None, f"{FR} >> {DE}"] * 6
    alone = [run(host, c, needs=True) for c in wanted]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda c: run(host, c, needs=True), wanted))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_tokens_module_by_task() -> None:
    host = grafted(mg.LinearMap(dim=FEATURES), None, "gpt2")
    a, b = run(host, FR, "gpt2", needs=True), run(host, DE, "gpt2", needs=True)
    assert not torch.allclose(a, b)
    with pytest.raises(mg.ModgraftError, match="cannot be added or scaled"):
        host.use(f"0.5*{FR}")
    with pytest.raises(mg.ModgraftError, match="needs the side input 'image'"):
        run(host, FR, "gpt2")


# -- learning -----------------------------------------------------------------------------------


def test_two_tasks_trained_together_learn_different_things() -> None:
    """Under fr the host learns one set of labels, under de another."""
    host = grafted(mg.LoRA(rank=4), QV, stir=False, embedding=8, hidden=16)
    labels = {FR: ids(seed=5), DE: ids(seed=6)}
    rows = [{"input_ids": ids(), "labels": y, "modules": task} for task, y in labels.items()]

    def losses() -> dict[str, float]:
        with torch.no_grad():
            return {r["modules"]: host(**r).loss.item() for r in rows}

    before = losses()
    assert before[FR] != before[DE]
    theta = {k: v.clone() for k, v in host.model.state_dict().items()}
    host.fit(rows, train="h", steps=150, lr=2e-2, progress=False)
    after = losses()
    assert all(after[task] < 0.5 * before[task] for task in labels)
    crossed = [host(input_ids=ids(), labels=labels[FR], modules=DE).loss.item()]
    crossed += [host(input_ids=ids(), labels=labels[DE], modules=FR).loss.item()]
    assert min(crossed) > 2 * max(after.values())
    assert all(torch.equal(v, theta[k]) for k, v in host.model.state_dict().items())


def test_what_it_costs_is_what_the_page_says() -> None:
    """Heads have (2e + 1)·n or (e + 1)·n parameters, n once a name and shape; others are e each."""
    n, e, hidden = 2 * WIDTH + WIDTH * 2, 4, 6
    for tasks in (("a",), ("a", "b", "c")):
        host = mg.Host(HOSTS["bert"].model())
        kw = {"tasks": tasks, "embedding": e}
        one = host.implant("a", mg.HyperNetwork(mg.LoRA(rank=2), **kw), at=QV, active=False)
        assert one.size == (2 * e + 1) * n + e * (len(tasks) + 4)
        two = mg.HyperNetwork(mg.LoRA(rank=2), **kw, hidden=hidden)
        layers = hidden * (2 * e + 1) + e * (hidden + 1)
        size = host.implant("b", two, at=QV, active=False).size
        assert size == (e + 1) * n + layers + e * (len(tasks) + 4)


def test_buffers_are_one_for_all_tasks() -> None:
    host = grafted(mg.SparseSubnetwork(), "query")
    one, two = host["h"].places[0].per_task()
    mask = torch.rand(WIDTH, WIDTH) < 0.5
    one.prune(mask)
    assert torch.equal(two.get_buffer("mask"), mask)
    assert sum("mask" in key for key in host["h"].tensors()) == 2  # one for each site


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mg.HyperNetwork(mg.LoRA(), tasks=()), r"tasks=\('fr', 'de'\)"),
        (lambda: mg.HyperNetwork(mg.LoRA(), tasks="fr"), r"tasks='fr'\): one or more"),
        (lambda: mg.HyperNetwork(mg.LoRA(), tasks=("a", "a")), "different names"),
        (lambda: mg.HyperNetwork(mg.LoRA(), tasks=("a", 2)), "different names"),
        (lambda: mg.HyperNetwork(mg.LoRA(), tasks=("a",), embedding=0), "at least 1"),
        (lambda: mg.HyperNetwork(mg.LoRA(), tasks=("a",), hidden=0), "at least 1"),
        (lambda: mg.HyperNetwork(mg.LoRA, tasks=("a",)), r"mg\.LoRA\(rank=8\)"),
        (
            lambda: mg.HyperNetwork(mg.Shared(mg.LoRA(rank=2)), tasks=("a",)),
            r"write HyperNetwork\(LoRA\(rank=2",
        ),
        (lambda: mg.HyperNetwork(Nothing(), tasks=("a",)), "no parameters that could be generated"),
        (lambda: mg.HyperNetwork(mg.LoRA(rank=99), tasks=("a",)), "at most 16"),
    ],
)
def test_what_makes_no_hypernetwork(make: Any, message: str) -> None:
    host = mg.Host(HOSTS["bert"].model())
    with pytest.raises(mg.ModgraftError, match=message):
        host.implant("h", make(), at="query")
    written = mg.HyperNetwork(mg.Prompt("a b", ids=(3, 4)), tasks=("a",))
    with pytest.raises(mg.ModgraftError, match="no parameters that could be generated"):
        host.implant("h", written)
    assert not list(host.implants)


def test_damaged_cards(tmp_path: Path) -> None:
    host = grafted(mg.LoRA(rank=2), "query")
    host.save("h", tmp_path / "h")
    card = json.loads((tmp_path / "h" / "module.json").read_text())["modules"][0]
    assert card["config"]["module"] == {"type": "LoRA", "config": mg.LoRA(rank=2).config()}
    inner = card["config"]["module"]
    for module, message in (
        ({**inner, "more": 1}, "is described as"),
        ({"type": "LoRA"}, "is described as"),
        ({"type": 3, "config": {}}, "is described as"),
        ({"type": "LoRA", "config": {"rank": 2, "speed": 9}}, "LoRA takes no speed"),
        ({"type": "Computation.__init__", "config": {}}, "no computation"),
        ({"type": "LinearMap", "config": {"dim": {"type": "x"}}}, "is described as"),
        ("LoRA", r"mg\.LoRA\(rank=8\)"),
    ):
        damaged = {**card, "config": {**card["config"], "module": module}}
        forge(tmp_path / "h", modules=[damaged])
        with pytest.raises(mg.ModgraftError, match=message):
            mg.Host(HOSTS["bert"].model()).load(tmp_path / "h")
    lacking = {k: v for k, v in card["config"].items() if k != "tasks"}
    forge(tmp_path / "h", modules=[{**card, "config": lacking}])
    with pytest.raises(mg.ModgraftError, match="cannot be made from"):
        mg.Host(HOSTS["bert"].model()).load(tmp_path / "h")
