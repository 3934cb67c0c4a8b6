"""The rounds of successive halving, and the Pareto frontier that decides who goes on."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import modgraft as mg
from modgraft.recipes.ladder.halving import Round, schedule, total
from modgraft.recipes.ladder.pareto import by_front, dominates, frontier

Points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 2)), max_size=14)


def test_the_rounds_of_the_default_ladder() -> None:
    assert schedule(36, 150) == [Round(36, 16), Round(12, 50), Round(5, 150)]
    assert total(schedule(36, 150)) == 36 * 16 + 12 * (50 - 16) + 5 * (150 - 50)
    assert schedule(4, 150) == [Round(4, 150)]
    assert schedule(36, 2) == [Round(36, 2)]  # too few steps to divide


@given(st.integers(1, 200), st.integers(1, 5000), st.integers(2, 6), st.integers(1, 12))
def test_it_ends_at_the_last_step_with_those_that_are_kept(
    n: int, steps: int, eta: int, keep: int
) -> None:
    rounds = schedule(n, steps, eta=eta, keep=keep)
    assert rounds[0].candidates == n
    assert rounds[-1].until == steps
    assert rounds[-1].candidates >= min(n, keep)
    for one, then in pairwise(rounds):
        assert 1 <= one.until < then.until
        assert one.candidates > then.candidates >= one.candidates / eta
    assert total(rounds) <= n * steps
    taken = [0] * n  # walked candidate by candidate
    for each in rounds:
        taken[: each.candidates] = [each.until] * each.candidates
    assert sum(taken) == total(rounds)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"candidates": 0}, {"eta": 1}, {"keep": 0}, {"steps": 2.0}]
)
def test_a_plan_that_means_nothing(bad: dict[str, int]) -> None:
    name = next(iter(bad))
    with pytest.raises(mg.ModgraftError, match=f"{name}=.*must be a whole number"):
        schedule(**{"candidates": 3, "steps": 9, **bad})


def test_a_frontier() -> None:
    points = [(1, 5), (3, 5), (2, 1), (3, 9), (0, 0), (2, 1)]
    assert frontier(points) == [1, 2, 4, 5]
    assert by_front(points) == [1, 2, 5, 4, 3, 0]


@given(Points)
def test_who_is_on_the_frontier_is_dominated_by_none_and_all_others_by_one_on_it(
    points: list[tuple[int, int, int]],
) -> None:
    front = frontier(points)
    assert bool(front) == bool(points)
    for i, one in enumerate(points):
        by = [points[j] for j in front if dominates(points[j], one)]
        assert bool(by) == (i not in front)
    if points:
        assert max(points) in [points[i] for i in front] or max(p[0] for p in points) == max(
            points[i][0] for i in front
        )


@given(Points)
def test_the_order_by_fronts_has_all_and_nobody_before_who_dominates_them(
    points: list[tuple[int, int, int]],
) -> None:
    order = by_front(points)
    assert sorted(order) == list(range(len(points)))
    for place, i in enumerate(order):
        assert not any(dominates(points[j], points[i]) for j in order[place:])
    shuffled = [points[i] for i in reversed(range(len(points)))]
    assert [shuffled[i] for i in by_front(shuffled)] == [points[i] for i in order]


@given(Points)
def test_to_dominate_is_a_strict_order(points: list[tuple[int, int, int]]) -> None:
    for a in points:
        assert not dominates(a, a)
        for b in points:
            assert not (dominates(a, b) and dominates(b, a))
