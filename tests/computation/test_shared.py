"""Shared: sites share tensors after copying, saving and training; groups; bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from common import kept
from computation.methods import METHODS, Nothing
from contract.hosts import HOSTS, QV, WIDTH, side, tensor_of
from modgraft.core.config import resolve
from modgraft.core.errors import UnknownNameError


def stirred(module: mg.Computation, at: Any, name: str = "bert") -> mg.Host:
    host = mg.Host(HOSTS[name].model()).eval()
    implant = host.implant("m", module, at=at)
    with torch.no_grad():
        for p in implant.parameters():
            p.normal_(0, 0.3)
    return host


def run(host: mg.Host, name: str = "bert") -> Tensor:
    kind = next(host.parameters()).dtype
    needs = any(host[n].method.side_source for n in host.implants)
    with torch.no_grad():
        given = {"image": side().to(kind)}
        return tensor_of(host(**HOSTS[name].batch(), **({"side": given} if needs else {})))


@pytest.mark.parametrize("name", METHODS)
def test_a_tie_outlives_whatever_is_done_to_a_host(name: str, tmp_path: Path) -> None:
    module, at = METHODS[name]
    host = stirred(mg.Shared(module), at)
    tied = host["m"]
    first, second = tied.places
    assert type(first).__name__ == type(second).__name__ == type(module).__name__
    assert isinstance(second, type(module))
    assert tied.method.config()["module"] is module
    single = mg.Host(HOSTS["bert"].model())
    assert tied.size == single.implant("one", module, at=host["m"].paths[0]).size
    assert all(key.startswith(tied.paths[0]) for key in tied.tensors())
    assert list(second.parameters()) == []

    out = run(host)
    for twin in (copy.deepcopy(host), copy.deepcopy(host).double(), copy.deepcopy(host).train()):
        twin.eval()
        torch.testing.assert_close(run(twin).float(), out, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            for p in twin["m"].parameters():
                p.add_(torch.randn_like(p))
        assert not torch.allclose(run(twin).float(), out)
        one = twin["m"].places
        key = next(k for k, _ in first.named_parameters())
        assert _read(one[1], key) is _read(one[0], key)
    assert torch.equal(run(host), out)

    host.save("m", tmp_path / "m")
    assert set(kept(tmp_path / "m")) == {f"m:{key}" for key in tied.tensors()}
    fresh = mg.Host(HOSTS["bert"].model()).eval()
    loaded = fresh.load(tmp_path / "m")
    assert torch.equal(run(fresh), out)
    assert repr(loaded.method) == repr(tied.method)
    again = mg.Host(HOSTS["bert"].model()).eval()
    again.implant("m", mg.Shared(module), at=at)
    again.load_state_dict(host.state_dict())
    assert torch.equal(run(again), out)


def _read(place: nn.Module, key: str) -> Any:
    value: Any = place
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", METHODS)
def test_a_shared_gradient_is_the_sum_over_its_sites(name: str) -> None:
    """The gradients of unshared modules with the same tensors add up to the shared one."""
    module, at = METHODS[name]
    if name in ("compacter", "invertible", "intrinsic", "prefix_mlp"):
        pytest.skip("these tie their sites themselves, or draw something for each of them")
    host, apart = stirred(mg.Shared(module), at).double(), stirred(module, at).double()
    tensors = host["m"].places[0].state_dict()
    for place in apart["m"].places:
        place.load_state_dict(tensors)
    batch = HOSTS["bert"].batch()
    kw = {"side": {"image": side(dtype=torch.float64)}} if module.side_source else {}
    for one in (host, apart):
        one(**batch, **kw).logits.square().mean().backward()
    for key, p in host["m"].places[0].named_parameters():
        total = sum(place.get_parameter(key).grad for place in apart["m"].places)
        torch.testing.assert_close(p.grad, total, rtol=1e-8, atol=1e-12)


def test_groups() -> None:
    host = mg.Host(HOSTS["t5"].model())

    def owners(group: Any, at: Any = QV, **kw: Any) -> dict[str, list[str]]:
        implant = host.implant("m", mg.Shared(mg.LoRA(rank=2), group=group, **kw), at=at)
        found = {}
        for path, place in zip(implant.paths, implant.places, strict=True):
            own = [key for key, _ in place.named_parameters()]
            if own:
                found[path] = own
        host.remove("m")
        return found

    assert [len(v) for v in owners("all").values()] == [2]
    assert [path[-1] for path in owners("name")] == ["q", "v"]
    parts = owners(("encoder.*", "*.SelfAttention.*", "*"))
    assert [path.split(".")[0] for path in parts] == ["encoder", "decoder", "decoder"]
    assert "EncDec" in list(parts)[2]
    only = owners("all", only=("A",))
    assert len(only) == 12
    assert list(only.values()) == [["A", "B"]] + [["B"]] * 11

    fused = mg.Host(HOSTS["gpt2"].model())
    implant = fused.implant("m", mg.Shared(mg.LoRA(rank=2), group="name"), at=QV)
    own = [
        p for p, place in zip(implant.paths, implant.places, strict=True) if [*place.parameters()]
    ]
    assert [path[-5:] for path in own] == ["[0/3]", "[2/3]"]
    assert implant.size == 2 * (2 * WIDTH + 2 * WIDTH)
    per_site = mg.Shared(mg.Shared(mg.LoRA(rank=2), only=("A",)), group="name", only=("B",))
    assert mg.Host(HOSTS["t5"].model()).implant("m", per_site, at=QV).size == 3 * 2 * WIDTH


def test_intrinsic_dimension_of_a_whole_model() -> None:
    """All sites share φ and each has its own rows of the map, as in the papers."""
    host = stirred(mg.Shared(mg.IntrinsicDimension(dim=9)), ["query", "value"])
    assert host["m"].size == 9
    deltas = [place.delta(torch.zeros(WIDTH, WIDTH)) for place in host["m"].places]
    assert all(not torch.equal(deltas[0], other) for other in deltas[1:])


def test_sparse_finetuning_of_one_mask_for_all_sites() -> None:
    case = HOSTS["bert"]
    host = mg.Host(case.model())
    host.implant("m", mg.Shared(mg.SparseDelta(density=0.1)), at="query")
    rows = [{**case.batch(), "labels": case.batch()["input_ids"]}]
    mg.sparse_finetuning(host, "m", rows, steps=2, lr=1e-2, progress=False)
    assert host["m"].size == round(0.1 * WIDTH * WIDTH)
    weight = torch.zeros(WIDTH, WIDTH)
    one, two = (place.delta(weight) for place in host["m"].places)
    assert torch.equal(one, two)
    assert 0 < one.count_nonzero() <= host["m"].size
    host.implant("n", mg.Shared(mg.SparseSubnetwork()), at="query")
    with pytest.raises(mg.ModgraftError, match="one mask over 2 sites"):
        mg.magnitude_pruning(host, "n", rows, rounds=1, steps=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mg.Shared(mg.LoRA), r"Shared\(mg\.LoRA\(rank=8\), …\)"),
        (lambda: mg.Shared(mg.LoRA(), group="q*"), r"group=\('q\*', '\*'\)"),
        (lambda: mg.Shared(mg.LoRA(), only="A"), r"only=\('A',\)"),
        (lambda: mg.Shared(mg.HyperNetwork(mg.LoRA(), tasks=("a",))), "leave Shared out"),
        (lambda: mg.Shared(mg.LoRA(rank=2), only=("C",)), "no tensor 'C'; it has A, B"),
        (lambda: mg.Shared(mg.LoRA(rank=2), group=("*.q_proj",)), r"group=\('\*\.q_proj', '\*'\)"),
        (lambda: mg.Shared(mg.LoRA(rank=2), group=("*", "x")), "no site is in the group 'x'"),
        (
            lambda: mg.Shared(mg.LoRA(rank=2)),
            r"share B, which is \[16, 2\] at the one and \[8, 2\] at the other; use "
            r"Shared\(module=LoRA\(rank=2.*\), group='name', only=\(\)\) or "
            r"Shared\(.*, only=\('A',\)\)",
        ),
        (lambda: mg.Shared(Nothing()), "no tensors that could be shared"),
    ],
)
def test_what_cannot_be_shared(make: Any, message: str) -> None:
    host = mg.Host(HOSTS["llama"].model())
    with pytest.raises(mg.ModgraftError, match=message):
        host.implant("m", make(), at=QV)
    assert not list(host.implants)


def test_the_corrected_call_works() -> None:
    host = mg.Host(HOSTS["llama"].model())
    host.implant("a", mg.Shared(mg.LoRA(rank=2), group="name"), at=QV)
    host.implant("b", mg.Shared(mg.LoRA(rank=2), group="all", only=("A",)), at=QV)
    for name in ("plain", "cnn", "mha", "rnn"):
        other = mg.Host(HOSTS[name].model())
        with pytest.raises(mg.ModgraftError, match=r"share A, which is \[4, \d+\] at the one and"):
            other.implant("m", mg.Shared(mg.LoRA(rank=4), only=("A",)), at=HOSTS[name].lora_at)
    gpt = mg.Host(HOSTS["gpt2"].model())
    same_end = ["h.*.attn.c_proj", "h.*.mlp.c_proj"]  # 16 and 24 wide inputs under one name
    with pytest.raises(mg.ModgraftError) as error:
        gpt.implant("m", mg.Shared(mg.LoRA(rank=4)), at=[f"transformer.{p}" for p in same_end])
    assert "group='name'" not in str(error.value)
    assert "only=('B',)" in str(error.value)


def test_a_class_with_shared_tensors_is_still_named_among_the_known_ones() -> None:
    stirred(mg.Compacter(width=8), "down")  # its sites share A, by a class made on the fly
    with pytest.raises(UnknownNameError, match=r"known: .*\bCompacter\b"):
        resolve("Compactor", mg.Computation)
