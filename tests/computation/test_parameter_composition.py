"""ParameterComposition beyond the contract: embeddings, biases, sizes on disk, bad input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modgraft as mg
from common import forge, kept
from contract.hosts import HOSTS, ids, tensor_of
from modgraft.computation.intrinsic_dimension import hadamard
from modgraft.core.sites import Site

METHODS: dict[str, Callable[[], mg.Computation]] = {
    "lora": lambda: mg.LoRA(rank=2, alpha=3.0),
    "dora": lambda: mg.LoRA(rank=2, alpha=3.0, dora=True),
    "subnetwork": mg.SparseSubnetwork,
    "supermask": lambda: mg.Supermask(density=0.6),
    "sparse": mg.SparseDelta,
    "intrinsic": lambda: mg.IntrinsicDimension(dim=5),
}


def words() -> nn.Module:
    """Make an embedding of ten words, the last one all zeros, and a layer with a bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[9] = 0
    return model.double()


@pytest.mark.parametrize("method", METHODS)
def test_an_embedding_is_looked_up_in_the_changed_table(method: str) -> None:
    host, x = mg.Host(words()), torch.tensor([[1, 9, 3], [3, 0, 9]])
    bare = host(x)
    host.implant("m", METHODS[method](), at=nn.Embedding)
    if METHODS[method]().identity:
        assert torch.equal(host(x), bare)
    with torch.no_grad():
        for p in host["m"].parameters():
            p.normal_()
    host(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in host["m"].parameters())
    assert not torch.allclose(host(x), bare)
    torch.testing.assert_close(host.merge("m")(x), host(x), rtol=1e-10, atol=1e-12)


def test_dora_leaves_an_output_without_weights_at_zero_and_finite() -> None:
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight[2] = 0
    host, x = mg.Host(nn.Sequential(layer)), torch.randn(5, 3)
    bare = host(x)
    host.implant("m", mg.LoRA(rank=2, dora=True), at="0")
    assert torch.equal(host(x), bare)
    host(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in host["m"].parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m]().identity])
def test_born_as_the_identity_in_every_floating_type(method: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(37, 19)).to(dtype)
    host, x = mg.Host(model), torch.randn(8, 37, dtype=dtype)
    bare = host(x)
    host.implant("m", METHODS[method](), at="0")
    assert torch.equal(host(x), bare)


@pytest.mark.parametrize("dora", [False, True])
def test_a_bias_changes_and_merges_also_in_a_part(dora: bool) -> None:
    case = HOSTS["gpt2"]
    host = mg.Host(case.model()).eval().double()
    host.implant("m", mg.LoRA(rank=2, dora=dora, bias=True), at="value")
    before = host.model.get_submodule("transformer.h.0.attn.c_attn").bias.clone()
    with torch.no_grad():
        for p in host["m"].parameters():
            p.normal_(0, 0.3)
    plain = host.merge("2*m")
    change = plain.get_submodule("transformer.h.0.attn.c_attn").bias - before
    assert torch.equal(change[:32], torch.zeros(32, dtype=torch.float64))
    torch.testing.assert_close(change[32:], 2 * host["m"].places[0].b.detach())
    expected = tensor_of(host(**case.batch(), modules="2*m"))
    torch.testing.assert_close(tensor_of(plain(**case.batch())), expected)


def test_the_gradient_of_a_supermask_is_that_of_its_mask() -> None:
    """∂L/∂s = ∂L/∂W' ⊙ W at every weight, masked or not (Ramanujan et al. 2020)."""
    weight = torch.randn(4, 6, dtype=torch.float64)
    layer = nn.Linear(6, 4, bias=False).double()
    layer.weight = nn.Parameter(weight)
    mask = mg.Supermask(density=0.5).at(Site("0", layer))
    probe = torch.randn(4, 6, dtype=torch.float64)
    ((weight + mask.delta(weight)) * probe).sum().backward()
    torch.testing.assert_close(mask.scores.grad, probe * weight)
    assert mask.kept().sum() == 12
    assert mask.scores[mask.kept()].min() > mask.scores[~mask.kept()].max()


def test_what_a_sparse_module_saves_follows_its_mask(tmp_path: Path) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 50)))
    host.implant("m", mg.SparseDelta(density=0.01), at=nn.Linear)
    host.save("m", tmp_path / "dense")
    for place, k in zip(host["m"].places, (40, 0), strict=True):
        place.keep(torch.randperm(place.values.numel())[:k])
    with torch.no_grad():
        host["m"].places[0].values.normal_()
    folder = host.save("m", tmp_path / "m")
    assert (tmp_path / "dense/module.safetensors").stat().st_size > 100_000
    assert (folder / "module.safetensors").stat().st_size < 40 * 8 + 2_500  # with its card
    host.load(folder, "again")
    x = torch.randn(3, 200)
    assert torch.equal(host(x, modules="again"), host(x, modules="m"))
    assert not torch.equal(host(x, modules="m"), host(x, modules=None))

    fresh = copy.deepcopy(host)
    fresh.remove("m")
    fresh.implant("m", mg.SparseDelta(density=0.01), at=nn.Linear)
    fresh.load_state_dict(host.state_dict())  # it was in its first phase, without a mask
    assert torch.equal(fresh(x, modules="m"), host(x, modules="m"))

    tensors = kept(folder)
    for change, message in (
        ({"m:0:indices": tensors["m:0:indices"] + 20_000}, r"is outside"),
        ({"m:0:indices": tensors["m:0:indices"] * 0}, "one is there twice"),
        ({"m:0:indices": tensors["m:0:indices"][:-1].clone()}, "39 indices for 40 values"),
        ({"m:0:values": tensors["m:0:values"] * torch.nan}, "NaN"),
    ):
        forge(folder, {**tensors, **change})
        with pytest.raises(mg.ModgraftError, match=message):
            host.load(folder, "broken")
        assert "broken" not in host


def test_an_intrinsic_map_is_of_its_seed_and_site_alone_and_never_saved(tmp_path: Path) -> None:
    host = mg.Host(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 40)))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        host.implant(name, mg.IntrinsicDimension(dim=100, seed=seed), at=nn.Linear)
        with torch.no_grad():
            for place in host[name].places:
                place.phi.copy_(torch.linspace(-1, 1, 100))
    a, b, c = (
        [place.delta(torch.empty(0)).detach() for place in host[n].places] for n in ("a", "b", "c")
    )
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    for other in (a[1].T, c[0]):  # another site, another seed: as good as orthogonal
        cosine = nn.functional.cosine_similarity(a[0].flatten(), other.flatten(), dim=0)
        assert abs(cosine) < 0.15
    phi = host["a"].places[0].phi.norm()
    assert 0.8 * phi < a[0].norm() < 1.2 * phi  # M keeps lengths
    assert list(host["a"].tensors()) == ["0:phi", "1:phi"]
    card = json.loads((host.save("a", tmp_path / "a") / "module.json").read_text())
    assert card["modules"][0]["config"] == {"dim": 100, "seed": 1}


def test_the_map_is_the_same_on_every_machine() -> None:
    """A saved φ means something only with these numbers: they may never change."""
    place = mg.IntrinsicDimension(dim=4, seed=7).at(Site("block.0", nn.Linear(3, 3)))
    assert place.signs[0].tolist() == [1, -1, 1, -1]
    assert place.order[0].tolist() == [3, 0, 1, 2]
    torch.testing.assert_close(
        place.gauss[0], torch.tensor([0.90625, 1.9375, -1.59375, 0.92578125]), rtol=0, atol=0
    )


def test_the_fast_transform_is_the_hadamard_matrix() -> None:
    from scipy.linalg import hadamard as matrix

    for size in (1, 2, 8, 64):
        x = torch.randn(3, size, dtype=torch.float64)
        expected = x @ torch.tensor(matrix(size), dtype=torch.float64)
        torch.testing.assert_close(hadamard(x), expected)


def at(method: mg.Computation, layer: nn.Module) -> Any:
    return mg.Host(nn.Sequential(layer)).implant("m", method, at="0")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: mg.LoRA(rank=0), r"the rank is at least 1"),
        (lambda: at(mg.LoRA(rank=9), nn.Linear(8, 20)), r"20 × 8, so the rank is at most 8"),
        (
            lambda: at(mg.LoRA(rank=2, bias=True), nn.Linear(4, 4, bias=False)),
            r"LoRA\(bias=True\) at 0: this Linear has no bias .* use LoRA\(rank=2\) there",
        ),
        (
            lambda: at(mg.LoRA(rank=2, bias=True), nn.Embedding(4, 4)),
            r"this Embedding has no bias",
        ),
        (lambda: mg.Supermask(density=0.0), r"density=0\.0\).* in \(0, 1\), such as density=0\.1"),
        (lambda: mg.SparseDelta(density=1.5), r"SparseDelta\(density=1\.5\)"),
        (lambda: mg.IntrinsicDimension(dim=0), r"dim is at least 1"),
        (lambda: at(mg.IntrinsicDimension(dim=13), nn.Linear(4, 3)), r"3 × 4 = 12 numbers"),
        (lambda: at(mg.SparseSubnetwork(), nn.LayerNorm(4)), r"LayerNorm has no weight that"),
        (
            lambda: at(mg.SparseSubnetwork(), nn.Linear(4, 3)).places[0].prune(torch.ones(3, 4)),
            r"torch\.bool \[3, 4\] \(True where a weight stays\), got torch\.float32",
        ),
        (
            lambda: at(mg.SparseDelta(), nn.Linear(4, 3)).places[0].keep(torch.tensor([0, 12])),
            r"positions 0 … 11 of its \[3, 4\] weight.*; 12 is outside",
        ),
    ],
)
def test_bad_input_is_refused_with_the_numbers(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(mg.ModgraftError, match=message):
        act()


def test_what_is_pruned_stays_out() -> None:
    place = mg.SparseSubnetwork().at(Site("0", nn.Linear(2, 1)))
    for mask in ([[True, False]], [[False, True]]):
        place.prune(torch.tensor(mask))
    weight: Tensor = torch.tensor([[3.0, 4.0]])
    assert torch.equal(weight + place.delta(weight), torch.zeros(1, 2))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lora_at_an_embedding(name: str) -> None:
    """Row i of the table gets s·B[i] A; a table tied to the output layer refuses to be merged."""
    case = HOSTS[name]
    host = mg.Host(case.model()).eval()
    host.implant("m", mg.LoRA(rank=2, alpha=4.0), at="embedding")
    place, table = host["m"].places[0], host.model.get_input_embeddings()
    with torch.no_grad():
        place.B.normal_(0, 0.3)
        expected = table.weight[ids()] + 2.0 * place.B[ids()] @ place.A
        torch.testing.assert_close(table(ids()), expected)
        if name == "gpt2":
            with pytest.raises(mg.ModgraftError, match=r"lm_head share it"):
                host.merge("m")
        else:
            merged = host.merge("m")(**case.batch()).logits
            torch.testing.assert_close(merged, host(**case.batch()).logits, rtol=1e-4, atol=1e-5)
