"""Each method against its formula, written out in float64, on cases worked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modgraft.core.errors import ModgraftError
from modgraft.store.merging.deltas import Deltas
from modgraft.store.merging.low_rank import Change, LowRank, dense, svd, truncated
from modgraft.store.merging.soup import greedy
from modgraft.store.merging.table import METHODS, asked

A = [[4.0, -1.0, 0.5], [-3.0, 2.0, 0.0]]
B = [[-1.0, -2.0, 3.0], [0.1, 5.0, -4.0]]
C = [[2.0, 0.2, -6.0], [-0.3, -1.0, 7.0]]


def matrices(*values: Any) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values or (A, B, C)]


def merged(
    method: str,
    deltas: Sequence[Change],
    weights: Sequence[float] | None = None,
    names: Sequence[str] = (),
    step: int = 0,
    **options: Any,
) -> Tensor:
    """Merge one tensor, as a whole or in blocks of ``step`` numbers."""
    names = names or [str(i) for i in range(len(deltas))]
    shape = deltas[0].shape
    how = asked(method, len(deltas), weights, options)

    def blocks() -> list[list[Change]]:
        if not step:
            return [list(deltas)]
        flat = [dense(delta).flatten() for delta in deltas]
        return [[d[i : i + step] for d in flat] for i in range(0, shape.numel(), step)]

    found = [dense(each) for each in how.merge("w", names, shape, blocks)]
    return torch.cat([each.flatten() for each in found]).reshape(shape)


def random(*shape: int, count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64))


def low_rank(out: int, ins: int, *ranks: int, dtype: torch.dtype = torch.float64) -> list[Change]:
    generator = torch.Generator().manual_seed(1)
    left = [torch.randn(out, r, generator=generator, dtype=torch.float64) for r in ranks]
    right = [torch.randn(r, ins, generator=generator, dtype=torch.float64) for r in ranks]
    return [LowRank(b.to(dtype), a.to(dtype)) for b, a in zip(left, right, strict=True)]


def close(got: Tensor, expected: Any) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.double(), expected, rtol=1e-12, atol=1e-12)


# -- by hand -------------------------------------------------------------------------------------


def test_average_and_arithmetic() -> None:
    a, b, c = matrices()
    close(merged("average", [a, b, c]), (a + b + c) / 3)
    close(merged("average", [a, b, c], [2, 1, 1]), (2 * a + b + c) / 4)
    close(merged("arithmetic", [a, b, c], [1, -0.5, 2], scale=0.3), 0.3 * (a - 0.5 * b + 2 * c))


def test_ties_trims_elects_and_means() -> None:
    """k = ⌊0.5 · 6⌋ = 3 stay of each: A's 4, −3, 2; B's 3, 5, −4; C's 2, −6, 7."""
    # sums of what stays: 6, 0, −3; −3, 7, 3
    # of the elected sign: 4 and 2, none, −6; −3, 2 and 5, 7
    close(merged("ties", matrices(), density=0.5), [[3, 0, -6], [-3, 3.5, 7]])
    # weights 1, 2, 1: sums 6, 0, 0 (3·2 − 6, elected +); −3, 12, −1 (7 − 8, elected −)
    expected = [[6 / 2, 0, 6 / 2], [-3, (2 + 10) / 3, -8 / 2]]
    close(merged("ties", matrices(), [1, 2, 1], density=0.5), expected)
    expected = [[6, 0, 6], [-3, 12, -8]]
    close(merged("ties", matrices(), [1, 2, 1], density=0.5, normalize=False), expected)
    # by the count of signs: 2 of +, none, 1 of each (+); −, 2 of +, 1 of each (+)
    close(merged("ties", matrices(), density=0.5, elect="count"), [[3, 0, 3], [-3, 3.5, 7]])
    close(merged("ties", matrices(), density=0.5, scale=0.5), [[1.5, 0, -3], [-1.5, 1.75, 3.5]])


def test_ties_rescales_to_the_length_before_trimming() -> None:
    """A's |·|₁ is 10.5 and 9 of it stays, B's 15.1 and 12, C's 16.5 and 15."""
    a, b, c = (torch.zeros(2, 3, dtype=torch.float64) for _ in range(3))
    a[0, 0], a[1, 0], a[1, 1] = 4, -3, 2
    b[0, 2], b[1, 1], b[1, 2] = 3, 5, -4
    c[0, 0], c[0, 2], c[1, 2] = 2, -6, 7
    a, b, c = 10.5 / 9 * a, 15.1 / 12 * b, 16.5 / 15 * c
    expected = merged("ties", [a, b, c], density=1.0)
    close(merged("ties", matrices(), density=0.5, rescale="l1"), expected)
    assert expected[0, 0] == pytest.approx((10.5 / 9 * 4 + 16.5 / 15 * 2) / 2)


@pytest.mark.parametrize("density", [0.02, 0.2, 0.3])
def test_a_share_is_one_where_numbers_are_equal(density: float) -> None:
    """A Δ of two checkpoints in bfloat16 has few magnitudes."""
    (delta,) = random(200, 100, count=1)
    for few in (delta.sign(), (delta * 4).round()):
        found = merged("ties", [few, few * 0], density=density, weights=[1, 0], normalize=False)
        assert found.count_nonzero() == density * few.numel()
        assert torch.equal(found, few * (found != 0))


def test_ties_where_weights_cancel_or_nothing_stays() -> None:
    """A divisor of 0 is 1, and one number stays at least."""
    # 1·2 and −1·(−2) are both +, and their weights sum to 0
    close(merged("ties", matrices([[2.0]], [[-2.0]]), [1, -1], density=1.0), [[4.0]])
    close(merged("ties", matrices([[1.0, 2.0, 3.0]]), density=0.1), [[0, 0, 3]])
    close(merged("ties", matrices([[0.0, 0.0]], [[1.0, -1.0]]), density=0.5), [[1, 0]])


def test_dare_drops_and_rescales() -> None:
    deltas = random(60, 50)
    (kept,) = Deltas("w", "012", [1.0] * 3, lambda: [deltas]).dropped(0.3, 5)
    for delta, each in zip(deltas, kept, strict=True):
        assert 0.27 < each.count_nonzero() / delta.numel() < 0.33
        assert torch.equal(each, delta * (each != 0))
    assert not torch.equal(kept[0] != 0, kept[1] != 0)
    options: dict[str, Any] = {"density": 0.3, "seed": 5}
    close(merged("dare", deltas, **options), sum(kept) / 0.3)
    close(merged("dare", deltas, [1, 2, -1], **options), (kept[0] + 2 * kept[1] - kept[2]) / 0.3)
    close(merged("dare", deltas, rescale="none", **options), torch.stack(kept).sum(0))
    one_norms = [d.abs().sum() / k.abs().sum() * k for d, k in zip(deltas, kept, strict=True)]
    close(merged("dare", deltas, rescale="l1", **options), sum(one_norms))
    close(merged("dare", deltas, [1, 2, 3], normalize=True, **options),
          (kept[0] + 2 * kept[1] + 3 * kept[2]) / 0.3 / 6)  # fmt: skip
    stacked = torch.stack(kept) / 0.3
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == elected
    mean = (stacked * agree).sum(0) / agree.sum(0).clamp_min(1)
    close(merged("dare", deltas, elect="sum", normalize=True, **options), mean)
    assert not torch.equal(
        merged("dare", deltas, density=0.3, seed=6), torch.stack(kept).sum(0) / 0.3
    )


def test_slerp_turns_one_into_the_other() -> None:
    """Of (3, 0) and (0, 4) the angle is π/2: sin(π/6)·a + sin(π/3)·b at t = 2/3."""
    a, b = matrices([[3.0, 0.0]], [[0.0, 4.0]])
    close(merged("slerp", [a, b], t=2 / 3), [[1.5, 2 * math.sqrt(3)]])
    close(merged("slerp", [a, b], t=0.0), a)
    close(merged("slerp", [a, b], t=1.0), b)
    close(merged("slerp", [a, 5 * a], t=0.25), 2 * a)  # parallel: along the line
    close(merged("slerp", [a, 0 * a], t=0.5), math.sqrt(0.5) * a)
    one, other = random(4, 5, count=2)
    angle = torch.acos((one * other).sum() / one.norm() / other.norm())
    expected = (torch.sin(0.7 * angle) * one + torch.sin(0.3 * angle) * other) / torch.sin(angle)
    close(merged("slerp", [one, other], t=0.3), expected)


def test_isotropic_levels_the_singular_values() -> None:
    """Σ = diag(6, 2) becomes diag(4, 4); a sum of rank 1 keeps its one value."""
    a, b = matrices([[0.0, 4.0], [2.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]])
    close(merged("isotropic", [a, b]), [[0, 4], [4, 0]])
    close(merged("isotropic", [a, b], [0, 2], scale=0.5), [[0, 2], [0, 0]])
    close(merged("isotropic", [a, -a]), torch.zeros(2, 2))
    deltas = random(7, 5)
    u, sigma, vh = torch.linalg.svd(torch.stack(deltas).sum(0), full_matrices=False)
    close(merged("isotropic", deltas), sigma.mean() * u @ vh)
    some = [dense(each) for each in low_rank(7, 5, 1, 2)]  # the mean is over 3, and not over 5
    sigma = torch.linalg.svdvals(sum(some, torch.zeros(7, 5, dtype=torch.float64)))
    found = torch.linalg.svdvals(torch.as_tensor(merged("isotropic", some)))
    close(found, torch.cat([sigma[:3].sum().expand(3) / 3, torch.zeros(2)]))


def test_tsv_keeps_what_does_not_interfere() -> None:
    """Two tasks that share no direction stay; others are made orthogonal."""
    a, b = matrices([[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 5.0]])
    close(merged("tsv", [a, b]), a + b)
    deltas = random(8, 6, count=2)
    us, ss, vs = zip(*(torch.linalg.svd(d, full_matrices=False) for d in deltas), strict=True)
    factors = [torch.cat([u[:, :3] for u in us], 1), torch.cat([v[:3].T for v in vs], 1)]
    (p, _, q), (x, _, y) = (torch.linalg.svd(f, full_matrices=False) for f in factors)
    sigma = torch.cat([s[:3] for s in ss])
    close(merged("tsv", deltas), (p @ q) @ torch.diag(sigma) @ (x @ y).T)
    close(merged("tsv", deltas[:1], scale=2.0), 2 * deltas[0])


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)])
def test_knots_merges_in_one_basis(ranks: Sequence[int]) -> None:
    deltas = low_rank(9, 7, *ranks)
    full = [dense(delta) for delta in deltas]
    u, sigma, vh = torch.linalg.svd(torch.cat(full, 1), full_matrices=False)
    k = sum(ranks)
    parts = list((sigma[:k, None] * vh[:k]).split(7, 1))
    expected = u[:, :k] @ merged("ties", parts, density=0.3)
    close(merged("knots", deltas, density=0.3), expected)
    close(merged("knots", full, density=0.3), expected)
    close(merged("knots", deltas, inner="arithmetic", scale=0.5), 0.5 * sum(full))
    close(
        merged("knots", deltas, [1, 1, 2], inner="average"), (full[0] + full[1] + 2 * full[2]) / 4
    )


def test_methods_of_matrices_average_what_is_none() -> None:
    deltas = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    for method in ("isotropic", "tsv", "knots"):
        close(merged(method, deltas), [2, 4])
        with pytest.raises(ModgraftError, match="their sum is 0"):
            merged(method, deltas, [1, -1])


def test_greedy_soup_takes_what_does_not_harm() -> None:
    """Recipe 1 of the paper: the best first, each of the others if the average stays as good."""
    alone = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 2.0}
    scores = {"bc": 3.0, "bcd": 2.9, "bca": 3.5}

    def validate(names: Sequence[str]) -> float:
        return alone[names[0]] if len(names) == 1 else scores["".join(names)]

    soup = greedy(list("abcd"), validate)
    assert soup.chosen == ["b", "c", "a"]
    assert soup.score == 3.5
    assert soup.alone == alone
    for wrong in (math.nan, None, "0.5"):
        with pytest.raises(ModgraftError, match="validate gave"):
            greedy(["a"], lambda names, wrong=wrong: wrong)  # type: ignore[arg-type]


# -- whole tensors, and blocks of them -----------------------------------------------------------


def test_what_is_drawn_does_not_depend_on_the_blocks() -> None:
    """Beyond one portion; the tensor's name, the parent's and the seed alone decide."""
    (delta,) = random(90, 100, count=1)

    def kept(name: str, parent: str, step: int) -> Tensor:
        flat = delta.flatten()
        these = Deltas(name, [parent], [1.0], lambda: [[part] for part in flat.split(step)])
        return torch.cat([block[0] for block in these.dropped(0.5, 0)])

    whole = kept("w", "a", 9000)
    for step in (1, 7, 4096, 5000):
        assert torch.equal(kept("w", "a", step), whole)
    for other in (kept("v", "a", 9000), kept("w", "b", 9000)):
        assert 0.4 < ((other != 0) == (whole != 0)).double().mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.of_matrices])
def test_blocks_give_what_the_whole_gives(method: str, dtype: torch.dtype) -> None:
    deltas = [delta.to(dtype) for delta in random(13, 11, count=2)]
    whole = merged(method, deltas)
    for step in (1, 16, 50, 200):
        torch.testing.assert_close(merged(method, deltas, step=step), whole, rtol=1e-6, atol=1e-6)


@given(
    st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=60), st.floats(0.01, 1)
)
def test_the_k_largest_stay(values: list[float], density: float) -> None:
    delta = torch.tensor(values, dtype=torch.float32)
    these = Deltas("w", ["a"], [1.0], lambda: [[delta[:7]], [delta[7:]]])
    found = torch.cat([block[0] for block in these.trimmed(density)])
    k = len(values) if density == 1 else max(1, int(density * len(values)))
    order = sorted(range(len(values)), key=lambda i: -abs(float(delta[i])))  # equal ones in turn
    expected = torch.zeros_like(delta)
    expected[order[:k]] = delta[order[:k]]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("ranks", [(3, 3), (1, 4), (6, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_factors_give_what_dense_tensors_give(method: str, ranks: Sequence[int]) -> None:
    deltas = low_rank(9, 7, *ranks)
    close(merged(method, deltas), merged(method, [dense(delta) for delta in deltas]))


# -- properties ----------------------------------------------------------------------------------


@given(st.permutations(range(4)), st.sampled_from(sorted(set(METHODS) - {"slerp"})))
def test_order_does_not_matter(order: Sequence[int], method: str) -> None:
    deltas, weights = random(6, 5, count=4), [1.0, 0.5, 2.0, 1.5]
    names = ["qa", "fr", "code", "style"]
    moved = [[each[i] for i in order] for each in (deltas, weights, names)]
    once, again = merged(method, deltas, weights, names), merged(method, *moved)  # type: ignore[arg-type]
    torch.testing.assert_close(once, again, rtol=1e-9, atol=1e-9)


@given(st.sampled_from(["arithmetic", "dare"]), st.floats(-3, 3), st.floats(-3, 3))
def test_weights_are_linear(method: str, x: float, y: float) -> None:
    one, other = random(6, 5, count=2)
    found = merged(method, [one, other], [x, y])
    parts = [merged(method, [one, other], weights) for weights in ([1, 0], [0, 1])]
    torch.testing.assert_close(found, x * parts[0] + y * parts[1], rtol=1e-9, atol=1e-9)


@given(st.sampled_from(sorted(set(METHODS) - {"slerp", "dare"})))
def test_one_module_with_all_its_numbers_stays(method: str) -> None:
    (delta,) = random(6, 5, count=1)
    options: dict[str, Any] = (
        {"density": 1.0} if "density" in METHODS[method].options.model_fields else {}
    )
    if method == "isotropic":
        delta = torch.linalg.svd(delta, full_matrices=False)[0]
    torch.testing.assert_close(merged(method, [delta], **options), delta, rtol=1e-9, atol=1e-9)


# -- factors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_singular_values_of_factors_are_those_of_the_product(dtype: torch.dtype) -> None:
    for delta in [*low_rank(40, 30, 5, 30, 50, dtype=dtype), *low_rank(3, 9, 8, dtype=dtype)]:
        u, sigma, vh = svd(delta)
        rank = min(delta.shape[0], delta.shape[1], delta.rank)  # type: ignore[union-attr]
        assert len(sigma) == rank
        product = dense(delta).double()
        torch.testing.assert_close(
            sigma, torch.linalg.svdvals(product)[:rank], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(u @ torch.diag(sigma) @ vh, product, rtol=1e-5, atol=1e-5)


def test_a_truncation_is_the_nearest_of_its_rank() -> None:
    for delta in (*low_rank(12, 9, 6, 20), *random(12, 9, count=1), random(3, 12, 9, count=1)[0]):
        near, sizes = truncated(delta, 4)
        sigma = torch.linalg.svdvals(dense(delta))
        close(sizes, torch.stack([(sigma**2).sum(), (sigma[..., 4:] ** 2).sum()]))
        close((dense(near) - dense(delta)).norm() ** 2, sizes[1])
        assert near.rank == 4
        both = near.left.norm(dim=-2), near.right.norm(dim=-1)
        torch.testing.assert_close(*both)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "count", "weights", "options", "said"),
    [
        ("fisher", 2, None, {}, "there are average, arithmetic, ties"),
        ("../x", 2, None, {}, "there are average"),
        ("average", 0, None, {}, "one thing at least"),
        ("slerp", 3, None, {}, "merges 2 things"),
        ("slerp", 2, [1, 1], {}, "takes no weights; say t=0.3"),
        ("ties", 2, [1], {}, "one finite number for each of 2"),
        ("ties", 2, [1, math.nan], {}, "one finite number for each of 2"),
        ("ties", 2, [1, "2"], {}, "one finite number for each of 2"),
        ("average", 2, [1, -1], {}, "their sum is 0"),
        ("ties", 2, None, {"density": 0.0}, "density=0.0: .* greater than 0"),
        ("ties", 2, None, {"density": 1.5}, "less than or equal to 1"),
        ("ties", 2, None, {"density": math.nan}, "density=nan"),
        ("ties", 2, None, {"density": "0.2"}, "valid number; its options, .* density=0.2"),
        ("ties", 2, None, {"scale": math.inf}, "scale=inf"),
        ("ties", 2, None, {"normalize": 1}, "normalize=1: .* boolean"),
        ("ties", 2, None, {"elect": "mass"}, "'sum', 'count' or 'none'"),
        ("dare_ties", 2, None, {}, "that is 'dare' with elect='sum', as mergekit's with rescale"),
        ("ties", 2, None, {"int8_mask": True}, "int8_mask is here left out: the type of a mask"),
        ("ties", 2, None, {"lambda": 0.5}, r"lambda=0.5: .* \(lambda is here scale="),
        ("dare", 2, None, {"epsilon": 0.1}, "epsilon=0.1: Extra inputs are not permitted"),
        ("ties", 2, None, {"dens": 0.2}, "dens=0.2: .* its options, with their defaults: density"),
        ("average", 2, None, {"t": 0.2}, "their defaults: none"),
        ("dare", 2, None, {"rescale": "l2"}, "'density', 'l1' or 'none'"),
        ("dare", 2, None, {"seed": 0.5}, "seed=0.5"),
        ("slerp", 2, None, {"t": -0.1}, "t=-0.1"),
        ("knots", 2, None, {"inner": "slerp"}, "'ties', 'dare', 'average' or 'arithmetic'"),
    ],
)
def test_what_a_method_has_not_is_refused(
    method: str, count: int, weights: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModgraftError, match=said):
        asked(method, count, weights, options)
