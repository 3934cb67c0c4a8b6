"""Quality against costs: which points are not dominated, and in which order the others follow."""

from __future__ import annotations

from collections.abc import Sequence

Point = Sequence[float]
"""A quality, of which more is better, and then costs, of which less is better."""


def dominates(a: Point, b: Point) -> bool:
    """Return whether ``a`` is nowhere worse than ``b``, and somewhere better."""
    better = a[0] > b[0] or any(x < y for x, y in zip(a[1:], b[1:], strict=True))
    return better and a[0] >= b[0] and all(x <= y for x, y in zip(a[1:], b[1:], strict=True))


def frontier(points: Sequence[Point]) -> list[int]:
    """Return the places of the points that no other one dominates, in their order.

    Equal points do not dominate one another.
    """
    return [i for i, one in enumerate(points) if not any(dominates(p, one) for p in points)]


def by_front(points: Sequence[Point]) -> list[int]:
    """Return the places of all points, those of the frontier first.

    The frontier of what is left follows, and so on (non-dominated sorting, Deb et al. 2002). Within
    a front the better quality comes first, then the lower cost, and then the earlier point.
    """
    left, order = list(range(len(points))), list[int]()
    while left:
        front = [left[i] for i in frontier([points[i] for i in left])]
        order += sorted(front, key=lambda i: (-points[i][0], *points[i][1:], i))
        left = [i for i in left if i not in front]
    return order
