"""InvertibleAdapter: it inverts itself, and equals MAD-X's equations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import modgraft as mg
from contract.hosts import HOSTS, WIDTH, ids


def coupled(width: int, dtype: torch.dtype = torch.float64, **kw: object) -> mg.Host:
    """Make a host of an embedding and an identity layer, both with the adapter."""
    host = mg.Host(nn.Sequential(nn.Embedding(11, width), nn.Linear(width, width))).to(dtype)
    implant = host.implant("m", mg.InvertibleAdapter(**kw), at=["0", "1"])  # type: ignore[arg-type]
    with torch.no_grad():
        layer = host.model[1]  # type: ignore[index]
        layer.weight.copy_(torch.eye(width))
        layer.bias.zero_()
        for p in implant.parameters():
            p.normal_(0, 1)
    return host


@given(
    half=st.integers(1, 9),
    reduction=st.integers(1, 3),
    nonlinearity=st.sampled_from(["relu", "gelu", "tanh"]),
    seed=st.integers(0, 99),
)
def test_what_it_does_at_an_embedding_it_undoes_elsewhere(
    half: int, reduction: int, nonlinearity: str, seed: int
) -> None:
    torch.manual_seed(seed)
    host = coupled(2 * half, reduction=min(reduction, half), nonlinearity=nonlinearity)
    x = torch.arange(11)
    table = host.model[0].weight  # type: ignore[index]
    with torch.no_grad():
        assert not torch.allclose(host.model[0](x), table)  # type: ignore[index]
        torch.testing.assert_close(host(x), table, rtol=0, atol=1e-12 * (1 + table.abs().max()))


def test_without_the_inverse_every_site_applies_the_coupling() -> None:
    host = coupled(6, inverse=False)
    place, again = host["m"].places
    y = torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.equal(place(y, None, None), again(y, None, None))


def test_the_equation_of_the_paper_and_its_gradient() -> None:
    """Row by row, o1 = F(e2) + e1 and o2 = G(o1) + e2, where F and G have two layers each."""
    host = coupled(6)
    place, inverse = host["m"].places
    y = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    t = {key: p.detach() for key, p in place.named_parameters()}

    def two_layers(name: str, v: Tensor) -> Tensor:
        hidden = torch.relu(t[f"D_{name}.weight"] @ v + t[f"D_{name}.bias"])
        return t[f"U_{name}.weight"] @ hidden + t[f"U_{name}.bias"]

    rows = []
    for e in y.detach().reshape(-1, 6):
        e1, e2 = e[:3], e[3:]
        o1 = two_layers("F", e2) + e1
        rows.append(torch.cat([o1, two_layers("G", o1) + e2]))
    out = place(y, None, None)
    torch.testing.assert_close(out, torch.stack(rows).view(2, 3, 6), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inverse(out, None, None), y, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda v: place(v, None, None), y)
    assert torch.autograd.gradcheck(lambda v: inverse(v, None, None), y)
    assert t["D_F.weight"].shape == (1, 3)  # d/2 // 2


def test_in_a_language_model_the_first_site_owns_all() -> None:
    case = HOSTS["bert"]
    host = mg.Host(case.model()).eval()
    m = host.implant("fr", mg.InvertibleAdapter(), at=["embedding", "encoder.output"], expect=2)
    assert m.size == 2 * (2 * 8 * 4 + 4 + 8)
    forward = [place for place, path in zip(m.places, m.paths, strict=True) if "embed" in path]
    assert len(forward) == 1
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(0, 0.3)
        host.implant("same", mg.InvertibleAdapter(), at="embedding", active=False)
        words = host.model.get_input_embeddings()
        changed = words(ids())
        with host.using(None):
            plain = words(ids())
        torch.testing.assert_close(forward[0](plain, None, None), changed)


@pytest.mark.parametrize(
    ("make", "at", "message"),
    [
        (lambda: mg.InvertibleAdapter(), "0", "5 wide, which is odd"),
        (lambda: mg.InvertibleAdapter(reduction=4), "1", "half of its width is 3, .* at most 3"),
        (lambda: mg.InvertibleAdapter(reduction=1), ["1", "2"], "6 wide and 2 8, and the one"),
        (lambda: mg.InvertibleAdapter(), "3", r"is a map \[B, C, …\]"),
        (lambda: mg.InvertibleAdapter(reduction=0), "1", "the reduction is at least 1"),
        (lambda: mg.InvertibleAdapter(nonlinearity="cos"), "1", "one of relu, gelu"),  # type: ignore[arg-type]
    ],
)
def test_sites_it_is_not_defined_at(make, at, message: str) -> None:
    model = nn.Sequential(
        nn.Embedding(4, 5), nn.Linear(5, 6), nn.Linear(6, 8), nn.Conv2d(8, WIDTH, 1)
    )
    host = mg.Host(model)
    with pytest.raises(mg.ModgraftError, match=message):
        host.implant("m", make(), at=at)
    assert not list(host.implants)
