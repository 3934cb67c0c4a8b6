"""Modules that travel together: whatever can be in a host is saved, loaded and trained on."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from common import kept
from contract.hosts import FEATURES, HOSTS, QV, HostCase, side, tensor_of
from contract.modules import MODULES

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

MIXTURES: dict[str, Callable[[tuple[str, ...]], mg.Mixture]] = {
    "soft": lambda over: mg.Mixture(over, router=mg.Soft(), width=FEATURES),
    "by_task": lambda over: mg.Mixture(over, router=mg.Soft(level="task", tasks=("fr", "de"))),
    "top_1": lambda over: mg.Mixture(over, router=mg.Top1(), width=FEATURES),
    "top_k": lambda over: mg.Mixture(over, router=mg.TopK(1), width=FEATURES),
    "noisy": lambda over: mg.Mixture(over, router=mg.NoisyTopK(1), width=FEATURES),
    "threshold": lambda over: mg.Mixture(over, router=mg.Threshold(), width=FEATURES),
    "skills": lambda over: mg.Mixture(over, router=mg.SkillMatrix(tasks=("fr", "de"))),
    "fixed": lambda over: mg.Mixture(over, router=mg.Fixed(over[:1])),
    "fuse": lambda over: mg.Mixture(over, aggregate=mg.Fuse()),
    "fuse_effects": lambda over: mg.Mixture(over, aggregate=mg.Fuse(effects=True)),
    "averaged": lambda over: mg.Mixture(over, router=mg.Soft(level="task"), aggregate=mg.Average()),
    "sequential": lambda over: mg.Mixture(
        over, router=mg.Soft(level="task"), aggregate=mg.Sequential()
    ),
    "arrow": lambda over: mg.Mixture(over, router=mg.Arrow()),
    "phatgoose": lambda over: mg.Mixture(over, router=mg.Phatgoose(k=1)),
    "similarity": lambda over: mg.Mixture(over, router=mg.Similarity(k=2), width=FEATURES),
    "similarity_of_tokens": lambda over: mg.Mixture(over, router=mg.Similarity(level="token")),
}
"""Mixtures of two modules, by name."""

PROMPTS: dict[str, Callable[[], mg.Computation]] = {
    "early_prompt": lambda: mg.SoftPrompt(length=3, at_start=True),
    "attempt": lambda: mg.Attempt(over=["soft_prompt", "early_prompt"], length=3, rank=2),
}
"""What needs an input to put tokens before, beside the rows of the contract."""

OTHERS: dict[str, Callable[[], mg.Computation]] = {
    "lora_bias": lambda: mg.LoRA(rank=2, bias=True),
    "lora_patterns": lambda: mg.LoRA(rank=2, rank_pattern={"*": 3}, alpha_pattern={"*": 5.0}),
}
"""Changes of weights beside the rows of the contract."""


def everything(case: HostCase) -> tuple[mg.Host, list[str]]:
    """Make a host with a module of every kind that it takes, and mixtures over two of them.

    The composition in force has two modules that change what it puts out.
    """
    host = mg.Host(case.model(shallow=True)).eval()
    for name, module in MODULES.items():
        if case.name not in module.refused:
            host.implant(name, module.make(), at=module.at(case), active=False)
            module.prepare(host, name)
    for name, make in {**OTHERS, **(PROMPTS if case.text else {})}.items():
        if name == "lora_bias" and case.name not in ("bert", "vit", "gpt2", "plain", "cnn"):
            continue  # their layers have none
        at = case.lora_at if name in OTHERS else None
        host.implant(name, make(), at=at, active=False)
    for i in range(2):
        host.implant(f"mixed_{i}", mg.Adapter(reduction=4), at=case.adapter_at, active=False)
    for name, mixture in MIXTURES.items():
        host.implant(name, mixture(("mixed_0", "mixed_1")), active=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in host.implants.parameters():
            p.normal_(0.0, 0.2)
        for name, buffer in host.implants.named_buffers():
            if name.endswith(".embeddings"):  # what mg.embed_tasks takes
                buffer.normal_()
    host.use("0.5*lora + adapter")
    return host, [n for name in host.implants for n in host[name].names]


def test_every_kind_is_among_them() -> None:
    made = [module.make() for module in MODULES.values()]
    made += [make() for make in (OTHERS | PROMPTS).values()]
    mixtures = [mixture(("a", "b")) for mixture in MIXTURES.values()]
    parts = [part for m in mixtures for part in (m.router, m.aggregate)]
    seen = {type(each) for each in (*made, *mixtures, *parts)}
    public = [getattr(mg, name) for name in mg.__all__]
    kinds = [
        each
        for each in public
        if isinstance(each, type)
        and issubclass(each, mg.Computation | mg.Router | mg.Aggregation)
        and vars(each).get("__final__")  # others are what these are made from
    ]
    assert len(kinds) > 30
    assert not {each.__name__ for each in kinds if each not in seen}


def run(host: mg.Host, case: HostCase, **given: Any) -> Tensor:
    with torch.no_grad():
        return tensor_of(host(**case.batch(), side=sides(given.get("modules")), **given))


def sides(name: str | None) -> dict[str, mg.Side]:
    """Return the side inputs; Attempt goes by the text itself, and mixtures by a vector."""
    return {"image": side()} | ({} if name == "attempt" else {"example": example()})


def example() -> mg.Side:
    return mg.Side(torch.randn(3, 1, FEATURES, generator=torch.Generator().manual_seed(5)))


def step(host: mg.Host, case: HostCase, name: str) -> None:
    """Train a module, and those it is over, by a step of Adam."""
    handle = host[name.partition("[")[0]]
    with host.training_only([handle.name, *handle.method.members]):
        learns = [p for p in host.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(learns, lr=0.01)
        optimiser.zero_grad()
        out = host(**case.batch(), side=sides(name), modules=name)
        tensor_of(out).square().mean().backward()
        optimiser.step()


def equal(one: mg.Host, other: mg.Host) -> bool:
    mine, theirs = one.implants.state_dict(), other.implants.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in mine.items())


@pytest.mark.parametrize("case", HOSTS.values(), ids=list(HOSTS))
def test_all_of_a_host_is_saved_loaded_and_trained_on(case: HostCase, tmp_path: Path) -> None:
    host, names = everything(case)
    host.save(None, tmp_path / "all")
    other = mg.Host(case.model(shallow=True)).eval()
    other.load(tmp_path / "all")
    assert list(other.implants) == list(host.implants)
    assert equal(host, other)
    assert str(other.composition) == str(host.composition) == "0.5*lora + adapter"
    assert torch.equal(run(host, case), run(other, case))
    for name in names:
        assert torch.equal(run(host, case, modules=name), run(other, case, modules=name)), name
        if any(p.requires_grad for p in host[name.partition("[")[0]].parameters()):
            step(host, case, name)
            step(other, case, name)
    assert equal(host, other)
    other.save(None, tmp_path / "again")
    host.save(None, tmp_path / "all")
    first, second = kept(tmp_path / "all"), kept(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[k]) for k, t in first.items())


@pytest.mark.parametrize("case", HOSTS.values(), ids=list(HOSTS))
def test_each_module_is_saved_loaded_and_trained_on(case: HostCase, tmp_path: Path) -> None:
    """By itself, or with those that it is over."""
    host, _ = everything(case)
    model = case.model(shallow=True)
    for name in list(host.implants):
        host.save(name, tmp_path / name)
        other = mg.Host(copy.deepcopy(model)).eval()
        other.load(tmp_path / name, active=False)
        assert list(other.implants) == [*host[name].method.members, name]
        for task in host[name].names:
            assert torch.equal(run(host, case, modules=task), run(other, case, modules=task)), task
            if any(p.requires_grad for p in host[name].parameters()):
                before = {k: t.clone() for k, t in host.implants.state_dict().items()}
                step(host, case, task)
                step(other, case, task)
                after = host.implants.state_dict()
                assert any(not torch.equal(t, before[k]) for k, t in after.items()), task
        for each in other.implants:
            mine, theirs = host[each].tensors(), other[each].tensors()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(t, theirs[k]) for k, t in mine.items()), each


def bert() -> mg.Host:
    """A host with a module that a part of it trained with, and another, which none did."""
    host = mg.Host(HOSTS["bert"].model(shallow=True)).eval()
    for name in ("qa", "style"):
        host.implant(name, mg.LoRA(rank=2), at=QV, active=False)
        with torch.no_grad():
            for p in host[name].parameters():
                p.normal_(0.0, 0.3)
    return host


def logits(host: nn.Module, **given: Any) -> Tensor:
    with torch.no_grad():
        return tensor_of(host(**HOSTS["bert"].batch(), **given))


def test_a_part_of_the_host_stays_with_the_module_it_trained_with(tmp_path: Path) -> None:
    host = bert()
    batch = HOSTS["bert"].batch()
    data = [{**batch, "labels": batch["input_ids"], "modules": "qa"}]
    host.fit(data, train=["qa", "host.cls.predictions.transform"], steps=3, progress=False)
    host.save(["qa", "style"], tmp_path / "both")
    plain = HOSTS["bert"].model(shallow=True)
    fresh = mg.Host(plain).eval()
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    handle = fresh.load(tmp_path / "both")
    assert handle.name == "style"
    for name in ("qa", "style"):
        assert torch.equal(logits(fresh, modules=name), logits(host, modules=name))
        assert fresh[name].beside == host[name].beside
        for each, which in ((host, "host"), (fresh, "fresh")):
            each.save(name, tmp_path / which)
        assert kept(tmp_path / "host").keys() == kept(tmp_path / "fresh").keys()
    fresh.remove("qa")  # the part was its own
    assert all(torch.equal(v, before[k]) for k, v in fresh.model.state_dict().items())


def test_the_composition_comes_with_several_and_one_joins(tmp_path: Path) -> None:
    host = bert()
    host.use("0.5*qa >> style")
    expected = logits(host)
    host.save(["qa", "style"], tmp_path / "both")
    fresh = mg.Host(HOSTS["bert"].model(shallow=True)).eval()
    fresh.load(tmp_path / "both", active=False)
    assert fresh.composition is None
    fresh = mg.Host(HOSTS["bert"].model(shallow=True)).eval()
    fresh.load(tmp_path / "both")
    assert torch.equal(logits(fresh), expected)
    host.save("qa", tmp_path / "one")  # of which only a part is here
    fresh.use(None)
    fresh.load(tmp_path / "one", "again")
    assert str(fresh.composition) == "again"

    host.remove("style")
    host.use("0.5*qa")
    expected = logits(host)
    host.save(None, tmp_path / "all")  # all, although it is one
    fresh = mg.Host(HOSTS["bert"].model(shallow=True)).eval()
    fresh.load(tmp_path / "all", "mine")
    assert str(fresh.composition) == "0.5*mine"
    assert torch.equal(logits(fresh), expected)


def test_what_is_refused(tmp_path: Path) -> None:
    host = bert()
    host.save(["qa", "style"], tmp_path / "both")
    fresh = mg.Host(HOSTS["bert"].model(shallow=True)).eval()
    for lazy in (False, True):
        with pytest.raises(mg.ModgraftError, match=r"holds qa, style, which name='x' cannot all"):
            fresh.load(tmp_path / "both", "x", lazy=lazy)
    fresh.implant("style", mg.LoRA(rank=2), at=QV)
    out = logits(fresh)
    with pytest.raises(mg.ModgraftError, match="'style' is implanted already"):
        fresh.load(tmp_path / "both")
    assert list(fresh.implants) == ["style"]
    assert str(fresh.composition) == "style"
    assert torch.equal(logits(fresh), out)
    for names in ([], ["qa", "none"], "none"):
        with pytest.raises(mg.ModgraftError, match=r"no module to save|'none'"):
            host.save(names, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_module_that_waits_is_the_one_a_mixture_needs(tmp_path: Path) -> None:
    host = bert()
    host.implant("m", mg.Mixture(["qa", "style"], router=mg.Soft(level="task")), active=False)
    for name in ("qa", "m"):
        host.save(name, tmp_path / name)
    fresh = mg.Host(HOSTS["bert"].model(shallow=True)).eval()
    fresh.load(tmp_path / "qa", lazy=True)
    fresh.load(tmp_path / "m")
    assert list(fresh.implants) == ["qa", "style", "m"]
    assert torch.equal(logits(fresh), logits(host, modules="m"))


def listed() -> set[str]:
    return {path.name for path in Path().iterdir()}


def test_a_folder_keeps_what_is_its_owners(tmp_path: Path, monkeypatch: Any) -> None:
    host = bert()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    Path("notes.txt").write_text("mine")
    with pytest.raises(mg.ModgraftError, match="holds no module"):
        host.save("qa", ".")
    assert listed() == {"notes.txt"}

    umask = os.umask(0o022)
    try:
        host.save("qa", tmp_path / "new")
    finally:
        os.umask(umask)
    monkeypatch.chdir(tmp_path / "new")
    files = {"module.safetensors", "module.json", "README.md"}
    assert listed() == files
    assert {Path(name).stat().st_mode & 0o777 for name in files} == {0o644}
    Path("notes.txt").write_text("mine")
    first = Path("README.md").read_text()
    host.save("style", ".")
    assert listed() == {*files, "notes.txt"}
    assert Path("README.md").read_text() != first
    assert json.loads(Path("module.json").read_text())["names"] == ["style"]
    Path("README.md").write_text("My own page.")
    host.save("qa", ".")
    assert Path("README.md").read_text() == "My own page."
    assert Path("notes.txt").read_text() == "mine"


def test_the_derived_files_are_not_read(tmp_path: Path) -> None:
    host = bert()
    host.save("qa", tmp_path / "qa")
    (tmp_path / "qa" / "module.json").write_text("{")
    (tmp_path / "qa" / "README.md").unlink()
    fresh = mg.Host(HOSTS["bert"].model(shallow=True)).eval()
    fresh.load(tmp_path / "qa")
    assert torch.equal(logits(fresh), logits(host, modules="qa"))
